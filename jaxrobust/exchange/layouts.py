"""A network of ours as the files that PyTorch reads: timm's, RobustBench's, or a module alone."""

from collections import OrderedDict
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from jaxrobust import models
from jaxrobust.exchange import references
from jaxrobust.exchange.references import Network
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


_HEAD = '''"""{title}

The network {name} of jaxrobust with {classes} classes, for images with {channels} channels and
{size} px a side; weights: {which}.

    from {name} import load

    net = load()  # the weights in {name}.pt beside this file; in evaluation mode
    logits = net(images)  # f32[B,{channels},{size},{size}] in [0, 1] -> f32[B,{classes}]

{sources}
"""

import hashlib
from pathlib import Path
'''
_TAIL = '''


WEIGHTS = "{name}.pt"
SHA256 = "{sha256}"
ROW: dict = {{
{row}}}


def load(path: str | Path | None = None) -> nn.Module:
    """The network in evaluation mode, with the weights beside this file or those of `path`."""
    file = Path(path) if path else Path(__file__).with_name(WEIGHTS)
    if path is None and hashlib.sha256(file.read_bytes()).hexdigest() != SHA256:
        raise ValueError(f"{{file}} is not the file that was exported beside this one")
    net = model(**ROW)
    net.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    return net.eval()
'''


def module_text(network: Network, which: str, sha256: str) -> str:
    """Return the self-contained file: that of torch_modules with its row and `load()`."""
    docstring, _, code = references.module_file(network.name).read_text()[3:].partition('"""\n')
    title, _, rest = docstring.partition("\n")
    head = _HEAD.format(
        title=title,
        name=network.name,
        classes=network.num_classes,
        channels=network.in_channels,
        size=network.image_size,
        which=which,
        sources=rest[rest.index("Source") :].partition("Parity")[0].strip(),
    )
    fields = references.module_row(network).items()
    row = "".join(f'    "{key}": {value!r},\n' for key, value in fields)
    return head + code.rstrip() + _TAIL.format(name=network.name, sha256=sha256, row=row)


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
        code.write_text(module_text(network, which, file_sha256(file)))
        return code
    file = references.place(folder, layout)
    file.parent.mkdir(parents=True)
    save_pt(file, state)
    return file


def weights_of(file: Path) -> Path:
    """Return the file with the weights, of the one that PyTorch reads first."""
    return file.with_suffix(".pt") if file.suffix == ".py" else file


def usage(network: Network, layout: str, out: Path) -> str:
    """How PyTorch reads what was written."""
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
    """timm's name of a network that it builds without further options."""
    known, row = models.member(network.name).reference, models.variant(network.name)
    changed = known.options or known.strides or getattr(row, "stem_widths", ())
    plain = not changed and not known.base.endswith(".py")
    sizes = (network.num_classes, network.image_size, network.in_channels)
    return known.base if plain and sizes == (1000, 224, 3) else None
