"""A user's PyTorch module as files for RobustBench: `--layout robustbench`.

These are the unchanged source file, the weights of a run, and a file whose `load()` combines both.
A module from an installed package, or from timm, is imported from there.
"""

import ast
import re
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

from jaxrobust.publish import references
from jaxrobust.pytorch.networks import torch_modules
from jaxrobust.pytorch.reading import steps
from jaxrobust.runtime import pytorch
from jaxrobust.weights.store.artifact import Network

_LOADER = '''
{imports}
import torch
from torch import nn


def model(**options) -> nn.Module:
    """Build the module with `{function}` of {place}."""
{before}    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # draws the same constants as the training run
        return {code}.{function}(**options)
'''
_OF_FILE = """\
    spec = spec_from_file_location("{unique}", Path(__file__).with_name("{file}"))
    code = module_from_spec(spec)
    sys.modules[spec.name] = code  # where dataclasses look up their module
    spec.loader.exec_module(code)
"""


class Written(NamedTuple):
    """The parts of a file with `load()` that depend on the module."""

    code: str  # with `model(**row)`
    row: dict[str, Any]
    sources: str


def label(name: str) -> str:
    """Name the file with `load()`, without suffix: an identifier other than the module's name.

    >>> label("torch:nets/mine.py:build"), label("torch:timm/resnet18.a1_in1k")
    ('robust_mine', 'robust_resnet18_a1_in1k')
    """
    place = name.removeprefix(pytorch.PREFIX)
    place = place.removeprefix(pytorch.TIMM) if _of_timm(name) else place.rpartition(":")[0]
    return f"robust_{_identifier(Path(place).stem if place.endswith('.py') else place)}"


def check(network: Network) -> None:
    """Refuse a module that the files cannot rebuild: its source is gone, or imports neighbors."""
    name, layout = network.name, "--layout robustbench: "
    if network.options.get(torch_modules.OUTPUT):
        raise ValueError(
            f"{layout}{name} returns several results, but RobustBench needs logits only; choose "
            "--layout state-dict, and return the logits in your own loader"
        )
    first: dict[str, str] = {}
    for key in references.named(network, wrapped=network.normalised) if network.params else ():
        from jaxrobust.publish.torch_networks import name_in_zoo

        cut = name_in_zoo(key)
        if (other := first.setdefault(cut, key)) != key:
            raise ValueError(
                f"{layout}RobustBench's loader shortens the names {other} and {key} to the same "
                f"{cut}, so one of the weights is lost; rename that part of the module, without "
                "'model.' and 'module.', or choose --layout state-dict"
            )
    now = torch_modules.origin(name)
    if _of_timm(name):
        if not torch_modules.installed("timm"):
            raise ValueError(f"{layout}{name} needs timm: pip install timm")
        return
    if now["sha256"] is None:
        raise ValueError(
            f"{layout}{now['file'] or name} does not exist; run the command in the folder of the "
            "module's file, or choose --layout jaxrobust, which needs no module"
        )
    file = Path(now["file"])
    if _place(name).endswith(".py") and (neighbours := _neighbours(file)):
        raise ValueError(
            f"{layout}{file} imports {', '.join(neighbours)}, which is next to it, but only one "
            "file is exported; put everything into this file, or install a package and name it "
            "torch:my_package.nets:build"
        )


def check_source(network: Network) -> None:
    """Refuse a module whose file has changed since its run began."""
    began = torch_modules.origin(network.name, **network.sizes)
    now = torch_modules.origin(network.name)
    if began["sha256"] != now["sha256"]:
        raise ValueError(
            f"--layout robustbench: {now['file']} has changed since the run began (sha256 "
            f"{str(began['sha256'])[:12]} then, {str(now['sha256'])[:12]} now); restore that "
            "version"
        )


def rebuilt(network: Network) -> Any:
    """Make the module of a network; among several results it returns the one in the options."""
    net = torch_modules.build(network.name, **network.sizes)
    if output := network.options.get(torch_modules.OUTPUT):
        forward = net.forward
        net.forward = lambda images: steps.chosen(forward(images), output)
    return net


def copied(network: Network) -> Path | None:
    """Return the source file to copy, or None if the module is from an installed package."""
    place = _place(network.name)
    return Path(place) if place.endswith(".py") else None


def written(network: Network) -> Written:
    """Write the code that makes a module, and its arguments."""
    name, about = network.name, torch_modules.origin(network.name)
    row = torch_modules.arguments(name, network.sizes)
    of_package = {"imports": "from importlib import import_module\n", "before": ""}
    if _of_timm(name):
        code = 'import_module("timm")'
        code = _LOADER.format(**of_package, function="create_model", place="timm", code=code)
        sources = f"Source: timm {about['timm']}, {row['model_name']}."
        return Written(code, row | {"pretrained": False}, sources)
    function, place = name.rpartition(":")[2], _place(name)
    sources = f"Source: {function} of {Path(about['file']).name}, sha256 {about['sha256']}."
    sources = textwrap.fill(sources, 98, break_long_words=False)
    if not place.endswith(".py"):
        code = f'import_module("{place}")'
        code = _LOADER.format(**of_package, function=function, place=place, code=code)
        return Written(code, row, sources)
    file = Path(place)
    unique = f"{_identifier(file.stem)}_{about['sha256'][:8]}"
    imports = "import sys\nfrom importlib.util import module_from_spec, spec_from_file_location\n"
    file_loader = _OF_FILE.format(unique=unique, file=file.name)
    code = _LOADER.format(
        imports=imports, before=file_loader, function=function, place=file.name, code="code"
    )
    return Written(code, row, sources)


def _identifier(text: str) -> str:
    return re.sub(r"\W", "_", text)


def _of_timm(name: str) -> bool:
    return name.startswith(pytorch.PREFIX + pytorch.TIMM)


def _place(name: str) -> str:
    return name.removeprefix(pytorch.PREFIX).rpartition(":")[0]


def _neighbours(file: Path) -> list[str]:
    """List the modules next to a file that it imports."""
    names: dict[str, None] = {}
    try:
        tree = ast.parse(file.read_text())
    except SyntaxError:  # no run began with this file
        return []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= dict.fromkeys(alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = (node.module or "").partition(".")[0]
            names |= {package or node.names[0].name: None}
    paths = (file.parent / name for name in names)
    return [
        p.name for p in paths if p.with_suffix(".py").is_file() or (p / "__init__.py").is_file()
    ]
