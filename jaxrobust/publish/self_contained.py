"""A network as one PyTorch file that needs nothing but torch: `--layout module`."""

import inspect
import re
import textwrap
from pathlib import Path

import jaxrobust
from jaxrobust import models
from jaxrobust.publish import network_account
from jaxrobust.publish.network_account import Account
from jaxrobust.publish.references import Network
from jaxrobust.runtime import pytorch

_HEAD = '''"""{title}

The network {name}{of} with {classes} classes, for images of {size} x {size} px.

    from {label} import load

    net = load()  # the weights in {file} next to this file; in evaluation mode
    logits = net(images)  # f32[B,{channels},{size},{size}] in [0, 1] -> f32[B,{classes}]

{facts}

{sources}
"""

'''
_TAIL = '''

WEIGHTS = "{file}"
SHA256 = "{sha256}"
{row}{classes}

def load(path: str | Path | None = None) -> nn.Module:
    """The network in evaluation mode, with the weights next to this file or those of `path`."""
    file = Path(path) if path else Path(__file__).with_name(WEIGHTS)
    if path is None and hashlib.sha256(file.read_bytes()).hexdigest() != SHA256:
        raise ValueError(f"{{file}} is not the file that was exported next to this one")
    net = {net}
    net.load_state_dict({read})
    return net.eval()


def network() -> ZooNetwork:
    """The network without its weights, for RobustBench's zoo: {{"model": network, ...}}."""
    return ZooNetwork({net})
'''
_ROW = """ROW: dict = {{
{row}}}
MEAN = {mean}  # of the channels, which the first layer subtracts; None: images stay as they are
STD = {std}
"""
# The suffix of a file -> how `load` reads it.
_READ = {
    ".pt": 'torch.load(file, map_location="cpu", weights_only=True)',
    ".safetensors": "load_file(file)",
}
_ZOO = ("name_in_zoo", "ZooNetwork")


def text(network: Network, account: Account, weights: Path, sha256: str, code: str = "") -> str:
    """Write the file: `code` of a printed network, or what makes a user's module, and `load()`."""
    of_torch, label, row = pytorch.is_name(network.name), identifier(network.name), ""
    title = "A network in PyTorch, printed from its program in JAX; for evaluation only."
    sources = f"Source: {network.name}, printed by jaxrobust {jaxrobust.__version__}."
    from jaxrobust.publish import torch_networks
    from jaxrobust.publish.torch_program import IMPORTS

    wrappers: tuple[str, ...] = _ZOO
    net, imports = "Network()", IMPORTS
    if of_torch:
        title = "A network of PyTorch, trained adversarially in JAX."
        code, fields, sources = pytorch.find("written")(network)
        module_imports, _, code = code.strip().partition("\n\n\n")
        imports = f"{IMPORTS}{module_imports}\n"
        label = pytorch.find("label")(network.name)
        moments: dict[str, tuple[float, ...] | None] = {"mean": None, "std": None}
        if network.normalised:
            moments = {key: tuple(network.stats[f"normalize.{key}"].tolist()) for key in moments}
        row = "".join(f'    "{key}": {value!r},\n' for key, value in fields.items())
        row = _ROW.format(row=row, **moments)
        wrappers, net = ("_Normalize", "normalized", *_ZOO), "normalized(model(**ROW), MEAN, STD)"
    if weights.suffix == ".safetensors":
        imports += "from safetensors.torch import load_file\n"
    head = _HEAD.format(
        title=title,
        name=network.name,
        of=" of jaxrobust" if network.name in models.available() else ", trained with jaxrobust,",
        label=label,
        file=weights.name,
        classes=network.num_classes,
        channels=network.in_channels,
        size=network.image_size,
        facts="\n".join(facts(network, account)),
        sources=sources,
    )
    classes = ""
    if account.classes and not account.imagenet:
        names = "".join(f"    {name!r},\n" for name in account.classes)
        classes = f"CLASSES = (  # in the order of labels\n{names})\n"
    tail = _TAIL.format(
        file=weights.name, sha256=sha256, row=row, classes=classes, net=net,
        read=_READ[weights.suffix],
    )  # fmt: skip
    copied = [inspect.getsource(getattr(torch_networks, name)).strip() for name in wrappers]
    return head + "\n\n\n".join([imports.strip(), code.strip(), *copied]) + tail


def identifier(name: str) -> str:
    """Return a network's name as that of a Python module."""
    return name if name.isidentifier() else re.sub(r"\W", "_", name.rpartition(":")[2])


def facts(network: Network, account: Account) -> list[str]:
    """Write the inputs that a network expects and its accuracies as lines of a docstring."""
    inside = network_account.normalisation(network)
    of_torch = pytorch.is_name(network.name)
    otherwise = ", as the module takes them" if of_torch else ": no layer does that either"
    expects = {
        "Range": f"float32 in [0, 1] ({network_account.channels(network)}), not normalised"
        + (f": the first layer does that, {inside}" if inside else otherwise),
        "Images": network_account.prepared(network, account),
        "Classes": network_account.classes(network, account)
        + (" (CLASSES)" if account.classes and not account.imagenet else ""),
        "Weights": account.which + (f"; {account.trained}" if account.trained else ""),
        "Threat model": network_account.threat(account),
    }
    if licence := network_account.licence(account):
        expects["Licence of the weights"] = licence
    lines = ["Expects", *_listed([f"{key}: {value}" for key, value in expects.items()])]
    rows = [network_account.row(record) for record in account.records]
    reached = [
        f"{clean} clean"
        + (f", {robust} robust ({attack})" if robust != "-" else "")
        + f" on {images}; {stands}"
        for images, attack, clean, robust, stands in rows
    ]
    none = ["not known: there is no record of these weights"]
    return [*lines, "", "Reached", *_listed(reached or none)]


def _listed(items: list[str]) -> list[str]:
    plain = (item.replace("\\", "/").replace('"', "'") for item in items)
    return [
        line
        for item in plain
        for line in textwrap.wrap(item, 98, initial_indent="- ", subsequent_indent="  ")
    ]
