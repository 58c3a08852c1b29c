"""Networks in PyTorch that a command line names: a function that makes a module, or a `.pt2`."""

import contextlib
import hashlib
import importlib.metadata
import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxrobust.pytorch.reading import scripted
from jaxrobust.runtime.commandline import functions
from jaxrobust.runtime.commandline.functions import Named
from jaxrobust.runtime.text.progress import say

HOW = "write my_package.nets:make, my_nets.py:make, or a file.pt2 of torch.export.save"
_WEIGHTS = (".pt", ".pth", ".bin", ".ckpt", ".tar", ".safetensors", ".pkl", ".pickle")


class Built(NamedTuple):
    """A module or an exported program, not yet in JAX."""

    network: Any
    single: bool  # an exported program of one image
    named: Named  # the source; its function is of no use
    record: Mapping[str, Any]  # what a record says beside the source
    output: str | None
    random: bool = False  # it may draw random numbers, of a key per image


def built(
    what: str,
    name: str,
    arguments: Mapping[str, Any] | None,
    output: str | None,
    *,
    random: bool = False,
) -> Built:
    """Build the network that `name`, of the flag `what`, says; only a user's own code is run."""
    path = Path(name)
    archive = scripted.is_file(path)
    if path.suffix in _WEIGHTS and not archive:
        raise ValueError(
            f"{what}={name} holds weights or a pickle, which do not say what to compute (and a "
            f"pickle may run any code, so it is not opened); {HOW}. The function loads the weights"
        )
    try:
        version = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError as error:
        raise ValueError(
            f"{what} needs PyTorch: pip install 'jaxrobust[torch]', before "
            "which, without a GPU, its smaller build for CPUs (the README says how)"
        ) from error
    record = {"torch": version, "arguments": dict(arguments or {}), "output": output}
    if path.suffix == ".pt2" or archive:
        if arguments:
            raise ValueError(f"{what}={name} takes no arguments; leave {what}_args out")
        return _file(what, name, path, record, output)._replace(random=random)
    source = functions.find(what, name)
    with functions.explained(what, name):
        network = _called(what, source, dict(arguments or {}))
    return Built(network, False, source, record, output, random)


def _file(what: str, name: str, path: Path, record: Mapping[str, Any], output: str | None) -> Built:
    from jaxrobust.pytorch.reading import exporting

    if not path.is_file():
        raise ValueError(f"{what}={name}: there is no such file")
    with _explained(what, name):
        scripts = scripted.is_file(path)
        network, single = (scripted.loaded(path), False) if scripts else exporting.loaded(path)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    return Built(network, single, Named(network, name, name, sha256), record, output)


def _called(what: str, source: Named, arguments: dict[str, Any]) -> Any:
    import torch

    if isinstance(source.function, torch.nn.Module):  # the module itself
        if arguments:
            raise ValueError(f"{what}={source.name} is a module; leave {what}_args out")
        return source.function
    try:
        inspect.signature(source.function).bind(**arguments)
    except TypeError as error:
        example = json.dumps({name: "..." for name in _required(source.function)})
        raise ValueError(
            f"{what}={source.name}: {error}; give its arguments as {what}_args '{example}'"
        ) from error
    return source.function(**arguments)


def _required(function: Callable[..., Any]) -> list[str]:
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = inspect.signature(function).parameters.items()
    return [n for n, p in parameters if p.default is p.empty and p.kind not in several]


def in_jax(
    what: str,
    network: Built,
    images: np.ndarray,
    rewrite: Callable[..., Any],
    following: Sequence[str] = (),
) -> tuple[Any, int]:
    """Convert a network; say how many images at once are cheapest, after both sides agreed on some.

    `what` is the flag, for messages; `following`: attacks that are asked for and follow gradients.
    """
    from jaxrobust.pytorch import agreement
    from jaxrobust.pytorch import torch as conversion
    from jaxrobust.pytorch.reading import refusals

    name = network.named.name
    with _explained(what, name):
        shape = tuple(images.shape[1:])
        given: Any = network.network
        how: dict[str, Any] = {"output": network.output, "random": network.random}
        converted = (
            conversion.of_exported(given, single=network.single, **how)
            if name.endswith(".pt2")
            else conversion.converted(given, shape, **how)  # type: ignore[arg-type]
        )
        agreed = agreement.compared(converted, images, rewrite)
        blind = refusals.without_gradient(converted.module, images, following)
    say(f"{name}: {agreed.words()}")
    if network.random:
        times = len(converted.program.draws)
        say(
            f"{name}: it draws random numbers in {times} places, of a key for each image"
            if times
            else f"{name}: it draws no random numbers; --version=standard attacks it better"
        )
    if blind:
        say(f"{name}: {blind}")
    here, there = agreed.seconds
    if here > max(1.2 * there, agreement.DISPATCH):
        say(
            f"{name}: XLA takes {here / there:.1f} times as long as PyTorch for a pass on this "
            "machine; the attacks' own saving may still outweigh that"
        )
    return converted.logits_fn, agreed.at_once


@contextlib.contextmanager
def _explained(what: str, name: str) -> Iterator[None]:
    start = f"{what}={name}: "
    try:
        yield
    except ValueError as error:
        if str(error).startswith(start):
            raise
        raise ValueError(start + str(error)) from error
