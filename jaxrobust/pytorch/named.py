"""PyTorch networks named on the command line: a function that makes a module, or a `.pt2`."""

import contextlib
import hashlib
import importlib.metadata
import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxrobust.pytorch import agreement
from jaxrobust.pytorch import torch as conversion
from jaxrobust.pytorch.reading import exporting, refusals
from jaxrobust.runtime.commandline import functions
from jaxrobust.runtime.commandline.functions import Named
from jaxrobust.runtime.text.progress import say

HOW = "write my_package.nets:make, my_nets.py:make, or a file.pt2 from torch.export.save"
_WEIGHTS = (".pt", ".pth", ".bin", ".ckpt", ".tar", ".safetensors", ".pkl", ".pickle")


class Built(NamedTuple):
    """A module or an exported program, not yet in JAX."""

    network: Any
    single: bool  # an exported program of one image
    source: Named  # its function is unused
    record: Mapping[str, Any]  # stored in a record in addition to the source
    output: str | None
    random: bool = False  # it may draw random numbers, from a key per image


def built(
    flag: str,
    name: str,
    arguments: Mapping[str, Any] | None,
    output: str | None,
    *,
    random: bool = False,
) -> Built:
    """Build the network `name` of a flag; only a user's function is run."""
    path = Path(name)
    is_torchscript = exporting.is_torchscript(path)
    if path.suffix in _WEIGHTS and not is_torchscript:
        raise ValueError(
            f"{flag}={name} holds weights or a pickle, which do not define a network (a pickle "
            f"may run any code, so it is not opened); {HOW}. The function must load the weights"
        )
    try:
        version = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError as error:
        raise ValueError(
            f"{flag} needs PyTorch: pip install 'jaxrobust[torch]'; without a GPU, first install "
            "its smaller CPU build"
        ) from error
    record = {"torch": version, "arguments": dict(arguments or {}), "output": output}
    if path.suffix == ".pt2" or is_torchscript:
        if arguments:
            raise ValueError(f"{flag}={name} does not accept arguments; leave {flag}_args out")
        if not path.is_file():
            raise ValueError(f"{flag}={name}: there is no such file")
        with _explained(flag, name):
            network, single = (
                (exporting.loaded_torchscript(path), False)
                if is_torchscript
                else exporting.loaded(path)
            )
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        return Built(network, single, Named(network, name, name, sha256), record, output, random)
    source = functions.find(flag, name)
    with functions.explained(flag, name):
        network = _called(flag, source, dict(arguments or {}))
    return Built(network, False, source, record, output, random)


def _called(flag: str, source: Named, arguments: dict[str, Any]) -> Any:
    import torch

    if isinstance(source.function, torch.nn.Module):
        if arguments:
            raise ValueError(f"{flag}={source.name} is a module; leave {flag}_args out")
        return source.function
    signature = inspect.signature(source.function)
    try:
        signature.bind(**arguments)
    except TypeError as error:
        several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        required = [
            name
            for name, parameter in signature.parameters.items()
            if parameter.default is parameter.empty and parameter.kind not in several
        ]
        example = json.dumps(dict.fromkeys(required, "..."))
        raise ValueError(
            f"{flag}={source.name}: {error}; give its arguments as {flag}_args '{example}'"
        ) from error
    return source.function(**arguments)


def in_jax(
    flag: str,
    network: Built,
    images: np.ndarray,
    rewrite: Callable[..., Any],
    following: Sequence[str] = (),
) -> tuple[Any, int]:
    """Return a network as a checked JAX function, and the best batch size.

    `flag` is for messages; `following` are this evaluation's attacks that need gradients.
    """
    name = network.source.name
    with _explained(flag, name):
        options: dict[str, Any] = {"output": network.output, "random": network.random}
        converted = (
            conversion.of_exported(network.network, single=network.single, **options)
            if name.endswith(".pt2")
            else conversion.converted(network.network, tuple(images.shape[1:]), **options)  # type: ignore[arg-type]
        )
        agreed = agreement.compared(converted, images, rewrite)
        blind = refusals.without_gradient(converted.module, images, following)
    say(f"{name}: {agreed.words()}")
    if network.random:
        times = len(converted.program.draws)
        say(
            f"{name}: it draws random numbers in {times} places, from a key for each image"
            if times
            else f"{name}: it does not draw random numbers; --version=standard is stronger"
        )
    if blind:
        say(f"{name}: {blind}")
    here, there = agreed.seconds
    if here > max(1.2 * there, agreement.DISPATCH):
        say(
            f"{name}: XLA takes {here / there:.1f} times as long as PyTorch for a pass on this "
            "machine; the faster attacks may still outweigh that"
        )
    return converted.logits_fn, agreed.at_once


@contextlib.contextmanager
def _explained(flag: str, name: str) -> Iterator[None]:
    start = f"{flag}={name}: "
    try:
        yield
    except ValueError as error:
        if str(error).startswith(start):
            raise
        raise ValueError(start + str(error)) from error
