"""One of our networks as files to share: our folder format, or PyTorch's, which are those of timm,
the hub and RobustBench, or a single module.
"""

from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxrobust import models
from jaxrobust.models.published import PUBLISHED, own_id
from jaxrobust.publish import hub, references, self_contained
from jaxrobust.publish.network_account import Account
from jaxrobust.publish.references import Network
from jaxrobust.runtime import pytorch
from jaxrobust.runtime.files import whole
from jaxrobust.runtime.text.spelling import near
from jaxrobust.weights.naming import convert
from jaxrobust.weights.store import files, weights_folder
from jaxrobust.weights.store.hashes import file_sha256

if TYPE_CHECKING:
    from jaxrobust.publish import torch_program

NEEDS_TORCH = "writing .pt files needs PyTorch: pip install 'jaxrobust[torch]'"
_OF_TORCH = ("state-dict", "robustbench")  # only for PyTorch modules
LAYOUTS = (
    "jaxrobust",
    "timm",
    "hub",
    "module",
    *_OF_TORCH,
)  # in addition to the ids of RobustBench
STATE_DICT = "state_dict.pt"
_MODULE = "export the self-contained module (--layout module)"


def known(layout: str, out: Path) -> str:
    """Return the layout unchanged; `ValueError` if it is unknown or nothing reads it."""
    if layout not in LAYOUTS:
        if layout not in PUBLISHED:
            raise ValueError(
                f"unknown layout {layout!r}; {near(layout, [*LAYOUTS, *PUBLISHED])}choose "
                f"{', '.join(LAYOUTS)}, or a RobustBench id such as Salman2020Do_R18"
            )
        references.place(out, layout)  # refuses an id that reads no file
    return layout


def check(network: Network, layout: str) -> None:
    """Refuse a network that a layout cannot name, whatever its weights are."""
    of_torch = pytorch.is_name(network.name)
    if layout != "jaxrobust" and of_torch != (layout in _OF_TORCH):
        choices = "state-dict or robustbench, or jaxrobust," if of_torch else "timm, hub or module"
        raise ValueError(
            f"--layout {layout} does not support {network.name}: choose --layout {choices}"
            + " which names weights as the module does" * of_torch
        )
    if layout == "robustbench":
        pytorch.find("check_export")(network)
    if layout == "timm":
        _same_function(network, network.name, {}, "timm's network")
    if layout in PUBLISHED:
        other = PUBLISHED[layout].model
        if models.family(other) is not models.family(network.name):
            raise ValueError(f"{layout} is a {other}, not a {network.name}")
        _same_function(network, other, PUBLISHED[layout].options, layout)


def arrays(network: Network, layout: str) -> dict[str, np.ndarray]:
    """Build the state dict of a layout other than a printed module; `ValueError`: it cannot be."""
    if layout in _OF_TORCH or pytorch.is_name(network.name):
        check(network, layout)
        if layout == "robustbench":
            pytorch.find("check_source")(network)
        return references.named(network, wrapped=layout == "robustbench" and network.normalised)
    if layout == "hub" and hub.timm_name(network):
        return references.named(network, wrapped=False)  # timm's transforms normalize
    check(network, layout)
    if layout == "timm":
        return convert.to_torch(network.name, network.params, network.stats)
    weights = (network.params, network.stats)
    return convert.to_torch(network.name, *weights, layout=layout, **network.options)


def _same_function(network: Network, other: str, options: dict[str, Any], layout: str) -> None:
    if changed := references.deviations(network, other, options):
        changes = ", ".join(
            f"{key}={value!r} instead of {expected!r}" for key, (value, expected) in changed.items()
        )
        raise ValueError(
            f"this {network.name} has {changes}: {layout} is a different network, so its name "
            f"would be wrong for these weights; {_MODULE}"
        )


def save_pt(path: Path, state: dict[str, np.ndarray] | np.ndarray) -> None:
    """Write a tensor, or a plain OrderedDict of contiguous ones: what `weights_only=True` reads."""
    try:
        import torch
    except ImportError as error:
        raise ValueError(NEEDS_TORCH) from error
    arrays = state if isinstance(state, dict) else {"": state}
    tensors = OrderedDict((k, torch.from_numpy(np.array(v, order="C"))) for k, v in arrays.items())
    try:
        torch.save(tensors if isinstance(state, dict) else tensors[""], path)
    except RuntimeError as error:  # no OSError where the system refuses to write
        reason = str(error).splitlines()[0]
        takes = whole.amount(sum(array.nbytes for array in arrays.values()))
        raise OSError(
            f"cannot write {path} ({reason}): it needs {takes}, and the disk may be full; free "
            "some space, or write elsewhere"
        ) from error


def stage(folder: Path, network: Network, account: Account, layout: str) -> Path:
    """Write the files of a layout into a new folder; return the one that is read first."""
    if layout == "jaxrobust":
        weights_folder.write(folder, network.params, network.stats, described(network, account))
        return folder / weights_folder.WEIGHTS
    code, is_timm = "", layout == "hub" and hub.timm_name(network)
    if layout == "module" or (layout == "hub" and not is_timm):
        check(network, layout)
        code, state = printed(network)
    else:
        state = arrays(network, layout)
    if layout == "hub":
        file = folder / hub.WEIGHTS
        files.write(file, state, {"format": "pt"})
        for name, text in hub.texts(network, account, network.weights_sha256).items():
            (folder / name).write_text(text)
        if is_timm:
            return file
        return _write_module(folder / f"{label(network)}.py", network, account, file, code)
    if layout == "timm":
        file = folder / f"{network.name}.safetensors"
        files.write(file, state, {"format": "pt"})
        return file
    if layout == "state-dict":
        save_pt(folder / STATE_DICT, state)
        return folder / STATE_DICT
    if layout == "robustbench":
        file = folder / f"{pytorch.find('label')(network.name)}.pt"
        save_pt(file, state)
        if copied := pytorch.find("copied")(network):
            (folder / copied.name).write_bytes(copied.read_bytes())
        return _write_module(file.with_suffix(".py"), network, account, file)
    if layout == "module":
        file = folder / f"{label(network)}.pt"
        save_pt(file, state)
        return _write_module(file.with_suffix(".py"), network, account, file, code)
    file = references.place(folder, layout)
    file.parent.mkdir(parents=True)
    save_pt(file, state)
    return file


def described(network: Network, account: Account) -> dict[str, Any]:
    """Return the `config.json` of a folder of ours, with the keys that an import writes."""
    parts = account.which.split(", ")  # "train, epoch 30, raw"
    return {
        "architecture": network.name,
        "options": models.essential(network.name, network.options),
        "num_classes": network.num_classes,
        "image_size": network.image_size,
        "in_channels": network.in_channels,
        "preprocessing": account.preprocessing,
        **(account.threat.settings() if account.threat else {"norm": None, "epsilon": None}),
        "accuracies": [record.to_json() for record in account.records] or None,
        "training": account.training,
        "published_id": account.published,
        "source": account.source or account.which,
        "source_sha256": account.source_sha256,
        "which": next((word for word in ("ema", "raw") if word in parts), None),
        "drawn": None,
    }


def _write_module(
    path: Path, network: Network, account: Account, weights: Path, code: str = ""
) -> Path:
    path.write_text(self_contained.text(network, account, weights, file_sha256(weights), code))
    return path


def printed(network: Network) -> "torch_program.Printed":
    """Return a network's code and arrays in PyTorch; `ValueError` without PyTorch."""
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise ValueError(NEEDS_TORCH) from error
    from jaxrobust.publish import torch_program

    return torch_program.printed(network)


def label(network: Network) -> str:
    """Name the files of an exported module: of a user's function, the function."""
    return self_contained.identifier(network.name)


def weights_of(file: Path) -> Path:
    """Find the file with the weights, given the file that PyTorch reads first."""
    if file.suffix != ".py":
        return file
    pt_file = file.with_suffix(".pt")
    return pt_file if pt_file.exists() else file.with_name(hub.WEIGHTS)


def usage(network: Network, layout: str, out: Path) -> str:
    """Say how what was written is read."""
    if layout == "jaxrobust":
        return (
            f"--config.init.weights={out} trains from it, --weights {out} evaluates it, "
            f"jaxrobust.load('{out}') loads it"
        )
    if layout == "state-dict":
        code = f"build().load_state_dict(torch.load('{out / STATE_DICT}'), strict=True)"
        if not network.normalised:
            return code
        mean, std = (network.stats[f"normalize.{key}"].tolist() for key in ("mean", "std"))
        return f"{code}; it expects (images - {mean}) / {std}"
    if layout == "robustbench":
        file_name = pytorch.find("label")(network.name)
        return (
            f"in {out}: `from {file_name} import load; net = load()`; its row in RobustBench's zoo "
            f'is {{"model": {file_name}.network, "gdrive_id": ID of {file_name}.pt}}'
        )
    if layout == "module":
        return f"in {out}: `from {label(network)} import load; net = load()`"
    if layout == "hub":
        put = f"`hf upload ORG/REPO {out}` uploads it to the hub"
        if hub.timm_name(network):
            return f"timm.create_model('local-dir:{out}', pretrained=True); {put}"
        return f"in {out}: `from {label(network)} import load; net = load()`; {put}"
    if layout == "timm":
        file = out / f"{network.name}.safetensors"
        base, arguments = hub.timm_name(network) or ("", {})
        if base:
            more = {"num_classes": network.num_classes} if network.num_classes != 1000 else {}
            keywords = "".join(f", {key}={value!r}" for key, value in (more | arguments).items())
            return f"timm.create_model({base!r}{keywords}, checkpoint_path='{file}')"
        return "timm lacks this network; to run it in PyTorch, export with --layout module"
    home = "" if "/" in PUBLISHED[layout].file else f"with TORCH_HOME={out}: "
    board = PUBLISHED[layout].board
    return (
        f"{home}robustbench.utils.load_model({own_id(layout)!r}, model_dir='{out}', "
        f"dataset={board.dataset!r}, threat_model={board.threat!r})"
    )
