"""A network as one PyTorch file that needs nothing but torch: `--layout module`."""

import ast
from pathlib import Path

from jaxrobust.convert import references
from jaxrobust.convert.references import Network

_LAYERS = "jaxrobust.convert.torch_modules.layers"
_HEAD = '''"""{title}

The network {name} of jaxrobust with {classes} classes, for images with {channels} channels and
{size} px a side; weights: {which}.

    from {name} import load

    net = load()  # the weights in {name}.pt beside this file; in evaluation mode
    logits = net(images)  # f32[B,{channels},{size},{size}] in [0, 1] -> f32[B,{classes}]

{sources}
"""

'''
_TAIL = '''


WEIGHTS = "{name}.pt"
SHA256 = "{sha256}"
ROW: dict = {{
{row}}}
MEAN = {mean}  # of the channels, which the first layer subtracts; None: images stay as they are
STD = {std}


def load(path: str | Path | None = None) -> nn.Module:
    """The network in evaluation mode, with the weights beside this file or those of `path`."""
    file = Path(path) if path else Path(__file__).with_name(WEIGHTS)
    if path is None and hashlib.sha256(file.read_bytes()).hexdigest() != SHA256:
        raise ValueError(f"{{file}} is not the file that was exported beside this one")
    net = normalized(model(**ROW), MEAN, STD)
    net.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    return net.eval()
'''


def text(network: Network, which: str, sha256: str) -> str:
    """Return the file: that of torch_modules, the layers it imports, its row and `load()`."""
    file = references.module_file(network.name)
    title, _, rest = (ast.get_docstring(ast.parse(file.read_text())) or "").partition("\n")
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
    moments: dict[str, tuple[float, ...] | None] = {"mean": None, "std": None}
    if network.normalised:
        moments = {key: tuple(network.stats[f"normalize.{key}"].tolist()) for key in moments}
    tail = _TAIL.format(name=network.name, sha256=sha256, row=row, **moments)
    return head + _code(file) + tail


def _code(file: Path) -> str:
    """Return the file's code with what it takes from `layers` written out behind it."""
    code, layers = file.read_text(), file.with_name("layers.py").read_text()
    tree, shared = ast.parse(code), ast.parse(layers)
    taken = _taken(tree, shared)
    constants = [_lines(layers, node) for node in taken if isinstance(node, ast.Assign)]
    others = [_lines(layers, node) for node in taken if not isinstance(node, ast.Assign)]
    last = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)][-1]
    body = "\n".join(code.splitlines()[last.end_lineno :]).strip()
    imports = _imports(tree, shared) + "".join(f"\n\n{line}" for line in constants)
    return "\n\n\n".join([imports, body, *others])


def _taken(tree: ast.Module, shared: ast.Module) -> list[ast.stmt]:
    """Return the definitions of `shared` that `tree` imports, and those that these need."""
    wanted = {
        alias.name
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and node.module == _LAYERS
        for alias in node.names
    }
    wanted.add("normalized")  # for load()
    taken: list[ast.stmt] = []
    for node in reversed(shared.body):  # what a definition needs stands above it
        named = node.targets[0] if isinstance(node, ast.Assign) else node
        if getattr(named, "name", getattr(named, "id", None)) in wanted:
            taken.insert(0, node)
            wanted |= {name.id for name in ast.walk(node) if isinstance(name, ast.Name)}
    return taken


def _imports(*trees: ast.Module) -> str:
    """Return the imports of several files and of `load()`, the standard library's first."""
    whole: set[str] = {"hashlib"}
    parts: dict[str, set[str]] = {"pathlib": {"Path"}}
    for node in (node for tree in trees for node in tree.body):
        if isinstance(node, ast.Import):
            whole |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module != _LAYERS:
            parts.setdefault(node.module, set()).update(alias.name for alias in node.names)
    lines = [f"import {name}" for name in sorted(whole)]
    lines += [f"from {name} import {', '.join(sorted(parts[name]))}" for name in sorted(parts)]
    groups = ([line for line in lines if (" torch" in line) == ours] for ours in (False, True))
    return "\n\n".join("\n".join(group) for group in groups)


def _lines(code: str, node: ast.stmt) -> str:
    """Return the whole lines of a statement, with the comment that ends them."""
    return "\n".join(code.splitlines()[node.lineno - 1 : node.end_lineno])
