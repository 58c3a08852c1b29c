"""A user's PyTorch module as files for RobustBench: `--layout robustbench`.

They are its own file as it is, the weights of a run, and a file whose `load()` puts both together.
A module of an installed package, or of timm, is imported from there.
"""

import ast
import re
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

from jaxrobust.publish import references
from jaxrobust.pytorch import modules
from jaxrobust.pytorch.networks import torch_modules
from jaxrobust.pytorch.reading import results
from jaxrobust.runtime import pytorch
from jaxrobust.weights.store.artifact import Network

_OF_FILE = '''
import sys
from importlib.util import module_from_spec, spec_from_file_location

import torch
from torch import nn


def model(**options) -> nn.Module:
    """Make the module as `{function}` of {file} does."""
    spec = spec_from_file_location("{unique}", Path(__file__).with_name("{file}"))
    code = module_from_spec(spec)
    sys.modules[spec.name] = code  # where dataclasses look for theirs
    spec.loader.exec_module(code)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # constants that are drawn are those of the training
        return code.{function}(**options)
'''
_OF_PACKAGE = '''
from importlib import import_module

import torch
from torch import nn


def model(**options) -> nn.Module:
    """Make the module as `{function}` of {place} does."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # constants that are drawn are those of the training
        return import_module("{place}").{function}(**options)
'''


class Written(NamedTuple):
    """What a file of `load()` says of a module."""

    code: str  # with `model(**row)`
    row: dict[str, Any]
    sources: str


def label(name: str) -> str:
    """Name the file of `load()`, without its suffix: an identifier, and not that of the module.

    >>> label("torch:nets/mine.py:build"), label("torch:timm/resnet18.a1_in1k")
    ('robust_mine', 'robust_resnet18_a1_in1k')
    """
    own = name.removeprefix(pytorch.PREFIX)
    own = own.removeprefix(pytorch.TIMM) if _of_timm(name) else own.rpartition(":")[0]
    stem = Path(own).stem if own.endswith(".py") else own
    return f"robust_{_identifier(stem)}"


def check(network: Network) -> None:
    """Refuse a module that the files could not make: its own is gone, or needs others beside it."""
    name = network.name
    if network.options.get(modules.OUTPUT):
        raise ValueError(
            f"--layout robustbench: {name} has several results, and RobustBench takes logits "
            "alone; choose --layout state-dict, and return the logits in your own loader"
        )
    if network.params:  # before a training there are none
        _check_names(network)
    now = torch_modules.origin(name)
    if _of_timm(name):
        if not modules.installed("timm"):
            raise ValueError(f"--layout robustbench: {name} needs timm: pip install timm")
        return
    if now["sha256"] is None:
        raise ValueError(
            f"--layout robustbench: {now['file'] or name} is not there; run the command where the "
            "module's file lies, or choose --layout jaxrobust, which needs no module"
        )
    file = Path(now["file"])
    if _is_file(name) and (beside := _neighbours(file)):
        raise ValueError(
            f"--layout robustbench: {file} imports {', '.join(beside)}, which lies beside it, and "
            "one file is handed on; put all into that file, or install a package and name it "
            "torch:my_package.nets:build"
        )


def _check_names(network: Network) -> None:
    from jaxrobust.publish.torch_modules.layers import name_in_zoo

    first: dict[str, str] = {}
    for key in references.named(network, wrapped=network.normalised):
        cut = name_in_zoo(key)
        if (other := first.setdefault(cut, key)) != key:
            raise ValueError(
                f"--layout robustbench: RobustBench's loader cuts the names {other} and {key} to "
                f"the same {cut}, and one of both weights is lost; call the part of the "
                "module otherwise, without 'model.' and 'module.', or choose --layout state-dict"
            )


def check_source(network: Network) -> None:
    """Refuse a module whose file is another one than when its run began."""
    began = torch_modules.origin(network.name, **network.sizes)
    now = torch_modules.origin(network.name)
    if began["sha256"] != now["sha256"]:
        raise ValueError(
            f"--layout robustbench: {now['file']} is another file than the run began with (sha256 "
            f"{str(began['sha256'])[:12]} then, {str(now['sha256'])[:12]} now); bring back that "
            "version of it"
        )


def rebuilt(network: Network) -> Any:
    """Make the module of a network; of several results it gives the one that the option names."""
    net = torch_modules.build(network.name, **network.sizes)
    if output := network.options.get(modules.OUTPUT):
        forward = net.forward
        net.forward = lambda images: results.chosen(forward(images), output)
    return net


def copied(network: Network) -> Path | None:
    """Return the file that is handed on as it is; None: the module is an installed package's."""
    name = network.name
    return Path(_place(name)) if _is_file(name) else None


def written(network: Network) -> Written:
    """Write the code that makes a module, and with what it is called."""
    name, about = network.name, torch_modules.origin(network.name)
    row = modules.arguments(name, network.sizes)
    if _of_timm(name):
        code = _OF_PACKAGE.format(place="timm", function="create_model")
        sources = f"Source: timm {about['timm']}, {row['model_name']}."
        return Written(code, row | {"pretrained": False}, sources)
    function = name.rpartition(":")[2]
    sources = f"Source: {function} of {Path(about['file']).name}, sha256 {about['sha256']}."
    sources = textwrap.fill(sources, 98, break_long_words=False)
    if not _is_file(name):
        return Written(_OF_PACKAGE.format(place=_place(name), function=function), row, sources)
    file = Path(_place(name))
    unique = f"{_identifier(file.stem)}_{about['sha256'][:8]}"
    code = _OF_FILE.format(function=function, file=file.name, unique=unique)
    return Written(code, row, sources)


def _identifier(text: str) -> str:
    return re.sub(r"\W", "_", text)


def _of_timm(name: str) -> bool:
    return name.startswith(pytorch.PREFIX + pytorch.TIMM)


def _place(name: str) -> str:
    return name.removeprefix(pytorch.PREFIX).rpartition(":")[0]


def _is_file(name: str) -> bool:
    return _place(name).endswith(".py")


def _neighbours(file: Path) -> list[str]:
    found: dict[str, None] = {}
    try:
        tree = ast.parse(file.read_text())
    except SyntaxError:  # no file that a run began with
        return []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= dict.fromkeys(alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            own = (node.module or "").partition(".")[0]
            found |= {own or node.names[0].name: None}
    beside = (file.parent / name for name in found)
    return [
        p.name for p in beside if p.with_suffix(".py").is_file() or (p / "__init__.py").is_file()
    ]
