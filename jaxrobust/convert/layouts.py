"""A network of ours as the files that PyTorch reads: timm's, RobustBench's, or a module alone."""

from collections import OrderedDict
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from jaxrobust import models
from jaxrobust.convert import references, self_contained
from jaxrobust.convert.references import Network
from jaxrobust.models.published import PUBLISHED
from jaxrobust.weights import convert
from jaxrobust.weights.hashes import file_sha256

NEEDS_TORCH = "writing .pt files needs PyTorch: pip install -e '.[torch]'"
_MODULE = "export the self-contained module (--layout module)"


def known(layout: str, out: Path) -> str:
    """Return the layout itself; `ValueError` for one that is not known or that nothing reads."""
    if layout not in ("timm", "module"):
        if layout not in PUBLISHED:
            raise ValueError(
                f"unknown layout {layout!r}; timm, module, or one of {', '.join(sorted(PUBLISHED))}"
            )
        references.place(out, layout)  # refuses an id that reads no file
    return layout


def arrays(network: Network, layout: str) -> dict[str, np.ndarray]:
    """Return the state dict of a layout.

    Raises:
      ValueError: the layout cannot express the network.
    """
    if layout == "module":
        return references.named(network, wrapped=network.normalised)
    if layout == "timm":
        _same_function(network, network.name, "timm's network")
        return convert.to_torch(network.name, network.params, network.stats)
    other = PUBLISHED[layout].model
    if models.family(other) is not models.family(network.name):
        raise ValueError(f"{layout} is a {other}, not a {network.name}")
    _same_function(network, other, layout)
    return convert.to_torch(network.name, network.params, network.stats, layout=layout)


def _same_function(network: Network, other: str, layout: str) -> None:
    """Refuse a layout whose network would compute something else with these weights."""
    if changed := references.deviations(network, other):
        said = ", ".join(
            f"{key}={ours!r} instead of {theirs!r}" for key, (ours, theirs) in changed.items()
        )
        raise ValueError(
            f"this {network.name} has {said}: {layout} is another network, so its name would be "
            f"wrong for these weights; {_MODULE}"
        )


def save_pt(path: Path, state: dict[str, np.ndarray]) -> None:
    """Write a plain OrderedDict of contiguous tensors: what `weights_only=True` reads."""
    try:
        import torch
    except ImportError as error:
        raise ValueError(NEEDS_TORCH) from error
    tensors = OrderedDict((k, torch.from_numpy(np.array(v, order="C"))) for k, v in state.items())
    torch.save(tensors, path)


def stage(folder: Path, network: Network, which: str, layout: str) -> Path:
    """Write the files of a layout into a new folder; return the one that PyTorch reads first."""
    state = arrays(network, layout)
    if layout == "timm":
        file = folder / f"{network.name}.safetensors"
        save_file(state, file, metadata={"format": "pt"})
        return file
    if layout == "module":
        file = folder / f"{network.name}.pt"
        save_pt(file, state)
        code = file.with_suffix(".py")
        code.write_text(self_contained.text(network, which, file_sha256(file)))
        return code
    file = references.place(folder, layout)
    file.parent.mkdir(parents=True)
    save_pt(file, state)
    return file


def weights_of(file: Path) -> Path:
    """Return the file with the weights, of the one that PyTorch reads first."""
    return file.with_suffix(".pt") if file.suffix == ".py" else file


def usage(network: Network, layout: str, out: Path) -> str:
    """Say how PyTorch reads what was written."""
    if layout == "module":
        return f"in {out}: `from {network.name} import load; net = load()`"
    if layout == "timm":
        file = out / f"{network.name}.safetensors"
        if base := _timm(network):
            return f"timm.create_model({base!r}, checkpoint_path='{file}')"
        return "timm's names, but not a network of timm's; --layout module writes one that runs"
    home = "" if "/" in PUBLISHED[layout].file else f"with TORCH_HOME={out}: "
    return (
        f"{home}robustbench.utils.load_model({layout!r}, model_dir='{out}', dataset='imagenet', "
        "threat_model='Linf')"
    )


def _timm(network: Network) -> str | None:
    """Return timm's name of a network; None: timm does not build it without further options."""
    known, row = models.member(network.name).reference, models.variant(network.name)
    changed = known.options or known.strides or getattr(row, "stem_widths", ())
    plain = not changed and not known.base.endswith(".py")
    sizes = (network.num_classes, network.image_size, network.in_channels)
    return known.base if plain and sizes == (1000, 224, 3) else None
