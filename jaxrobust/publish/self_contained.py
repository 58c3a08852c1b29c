"""A network as one PyTorch file that needs nothing but torch: `--layout module`."""

import ast
import textwrap
from pathlib import Path

from jaxrobust.publish import network_account, references
from jaxrobust.publish.network_account import Account
from jaxrobust.publish.references import Network
from jaxrobust.runtime import pytorch

_LAYERS = "jaxrobust.publish.torch_modules.layers"
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
ROW: dict = {{
{row}}}
MEAN = {mean}  # of the channels, which the first layer subtracts; None: images stay as they are
STD = {std}
{classes}

def load(path: str | Path | None = None) -> nn.Module:
    """The network in evaluation mode, with the weights next to this file or those of `path`."""
    file = Path(path) if path else Path(__file__).with_name(WEIGHTS)
    if path is None and hashlib.sha256(file.read_bytes()).hexdigest() != SHA256:
        raise ValueError(f"{{file}} is not the file that was exported next to this one")
    net = normalized(model(**ROW), MEAN, STD)
    net.load_state_dict({read})
    return net.eval()


def network() -> ZooNetwork:
    """The network without its weights, for RobustBench's zoo: {{"model": network, ...}}."""
    return ZooNetwork(normalized(model(**ROW), MEAN, STD))
'''
# The suffix of a file -> how `load` reads it.
_READ = {
    ".pt": 'torch.load(file, map_location="cpu", weights_only=True)',
    ".safetensors": "load_file(file)",
}
_SAFETENSORS = "from safetensors.torch import load_file"


def text(network: Network, known: Account, weights: Path, sha256: str) -> str:
    """Write the file: that of torch_modules, or what makes a user's module; the layers that it
    imports, its row and `load()`.
    """
    if pytorch.is_name(network.name):
        code, fields, sources = pytorch.find("written")(network)
        title, of = (
            "A network of PyTorch, trained adversarially in JAX.",
            ", trained with jaxrobust,",
        )
        label = pytorch.find("label")(network.name)
    else:
        code = references.module_file(network.name).read_text()
        title, _, rest = (ast.get_docstring(ast.parse(code)) or "").partition("\n")
        sources = rest[rest.index("Source") :].partition("Parity")[0].strip()
        fields, of, label = references.module_row(network), " of jaxrobust", network.name
    head = _HEAD.format(
        title=title,
        name=network.name,
        of=of,
        label=label,
        file=weights.name,
        classes=network.num_classes,
        channels=network.in_channels,
        size=network.image_size,
        facts="\n".join(facts(network, known)),
        sources=sources,
    )
    row = "".join(f'    "{key}": {value!r},\n' for key, value in fields.items())
    classes = ""
    if known.classes and not known.imagenet:
        names = "".join(f"    {name!r},\n" for name in known.classes)
        classes = f"CLASSES = (  # in the order of labels\n{names})\n"
    moments: dict[str, tuple[float, ...] | None] = {"mean": None, "std": None}
    if network.normalised:
        moments = {key: tuple(network.stats[f"normalize.{key}"].tolist()) for key in moments}
    tail = _TAIL.format(
        file=weights.name,
        sha256=sha256,
        row=row,
        **moments,
        classes=classes,
        read=_READ[weights.suffix],
    )
    code = _code(code)
    if weights.suffix == ".safetensors":
        code = code.replace("\n\nimport torch", f"\n\n{_SAFETENSORS}\n\nimport torch", 1)
    return head + code + tail


def facts(network: Network, known: Account) -> list[str]:
    """Write the inputs that a network expects and its accuracies as lines of a docstring."""
    inside = network_account.normalisation(network)
    of_torch = pytorch.is_name(network.name)
    otherwise = ", as the module takes them" if of_torch else ": no layer does that either"
    expects = {
        "Range": f"float32 in [0, 1] ({network_account.channels(network)}), not normalised"
        + (f": the first layer does that, {inside}" if inside else otherwise),
        "Images": network_account.prepared(network, known),
        "Classes": network_account.classes(network, known)
        + (" (CLASSES)" if known.classes and not known.imagenet else ""),
        "Weights": known.which + (f"; {known.trained}" if known.trained else ""),
        "Threat model": network_account.threat(known),
    }
    if licence := network_account.licence(known):
        expects["Licence of the weights"] = licence
    lines = ["Expects", *_listed([f"{key}: {value}" for key, value in expects.items()])]
    rows = [network_account.row(record) for record in known.records]
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


def _code(code: str) -> str:
    """Write out a file's code behind the layers that it derives from, before those it calls."""
    layers = references.MODULES.joinpath("layers.py").read_text()
    tree, shared = ast.parse(code), ast.parse(layers)
    taken = _taken(tree, shared)
    last = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)][-1]
    own = [node for node in tree.body if node.lineno > last.lineno]
    first = set().union(*map(_at_import, own))
    parts: dict[str, list[str]] = {"constants": [], "bases": [], "called": []}
    for node in taken:
        at = "bases" if _name(node) in first else "called"
        written = "\n".join(layers.splitlines()[node.lineno - 1 : node.end_lineno])
        parts["constants" if isinstance(node, ast.Assign) else at].append(written)
    body = "\n".join(code.splitlines()[last.end_lineno :]).strip()
    imports = _imports([tree, shared], set().union(*map(_names, [*own, *taken])))
    head = "\n\n".join([imports, *parts["constants"]])
    return "\n\n\n".join([head, *parts["bases"], body, *parts["called"]])


def _taken(tree: ast.Module, shared: ast.Module) -> list[ast.stmt]:
    wanted = {
        alias.name
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and node.module == _LAYERS
        for alias in node.names
    }
    wanted |= {"normalized", "ZooNetwork"}  # for load() and network()
    taken: list[ast.stmt] = []
    for node in reversed(shared.body):  # what a definition needs stands above it
        if _name(node) in wanted:
            taken.insert(0, node)
            wanted |= _names(node)
    return taken


def _name(node: ast.stmt) -> str | None:
    named = node.targets[0] if isinstance(node, ast.Assign) else node
    return getattr(named, "name", getattr(named, "id", None))


def _names(node: ast.AST) -> set[str]:
    """Collect the names that a piece of code reads, without its local variables."""
    names = [part for part in ast.walk(node) if isinstance(part, ast.Name)]
    local = {name.id for name in names if isinstance(name.ctx, ast.Store)}
    return {name.id for name in names} - local


def _at_import(node: ast.stmt) -> set[str]:
    """Collect the names that a statement reads before any function is called."""
    if isinstance(node, ast.FunctionDef):
        return set().union(*map(_names, filter(None, [node.args, node.returns])))
    if isinstance(node, ast.ClassDef):
        return set().union(*map(_names, node.bases), *map(_at_import, node.body))
    return _names(node)


def _imports(trees: list[ast.Module], used: set[str]) -> str:
    whole: set[str] = {"hashlib", "torch"}
    parts: dict[str, set[str]] = {"pathlib": {"Path"}, "torch": {"nn"}}
    for node in (node for tree in trees for node in tree.body):
        if isinstance(node, ast.Import):
            whole |= {alias.name for alias in node.names} & used
        elif isinstance(node, ast.ImportFrom) and node.module and node.module != _LAYERS:
            names = {alias.name for alias in node.names} & used
            if names:
                parts.setdefault(node.module, set()).update(names)
    lines = [f"import {name}" for name in sorted(whole)]
    lines += [f"from {name} import {', '.join(sorted(parts[name]))}" for name in sorted(parts)]
    groups = ([line for line in lines if (" torch" in line) == ours] for ours in (False, True))
    return "\n\n".join("\n".join(group) for group in groups)
