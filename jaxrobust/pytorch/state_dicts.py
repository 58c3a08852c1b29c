"""A state dict of PyTorch's as the weights of the module that training names (`torch:...`).

Its names are those of the module's own state dict. What wrappers put before them is taken off.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxrobust.config import NetworkSpec
from jaxrobust.models.interface.renaming import row
from jaxrobust.pytorch.networks import torch_modules
from jaxrobust.pytorch.trainable import MEAN, STD, Trainable, normalises_itself
from jaxrobust.weights.naming import convert
from jaxrobust.weights.naming.convert import StoredNames
from jaxrobust.weights.store import files

Arrays = dict[str, np.ndarray]
FRESH = "fresh"
_COUNTER = "num_batches_tracked"  # of batch norms; files of PyTorch before 0.4.1 lack it
_SHOWN = 4  # names of a kind in a message


class _Head(NamedTuple):
    """The parts of a module that are drawn anew; none: everything is kept."""

    parts: tuple[str, ...] = ()

    @property
    def pattern(self) -> str:
        own = "|".join(rf"{re.escape(part)}(?:\..+)?" for part in self.parts)
        return own or r"(?!)"

    def has(self, name: str) -> bool:
        return bool(re.fullmatch(self.pattern, name))


def stored(spec: NetworkSpec, arrays: Mapping[str, np.ndarray], head: str) -> StoredNames:
    """Give stored arrays the names of a module's parameters and statistics, all of them.

    Args:
      spec: names the module.
      arrays: of its state dict, or of a run of ours.
      head: "keep", "fresh", which is what the module says of itself (as timm's do), or
        "fresh:PART,..." with parts of the module by their names; theirs are left out.
    Raises:
      ValueError: one sentence with what is missing, unexpected or of another shape.
    """
    network = torch_modules.program(spec.name, **spec.sizes(), **spec.options)
    anew = _Head(_parts(spec, network, head))
    plain = _unwrapped(arrays, network)
    own = _own(plain, network, anew)
    ours = _completed(_float32(own, network), network)
    _check(spec, network, anew, ours)
    _check_integers(plain, network)
    rest = row(r"(?P<name>.+)", r"\g<name>")
    matched = tuple((key, rest, [key]) for key in ours)
    return StoredNames(
        spec.name, [rest], ours, (0.0, 1.0), r"(?!)", anew.pattern, matched, ours=True
    )


def load(spec: NetworkSpec, path: Path) -> tuple[Arrays, Arrays]:
    """Read a module's params and stats from a file of PyTorch's or safetensors.

    Raises:
      ValueError: the file cannot be read, or does not fit; as of `stored`.
    """
    arrays = files.read(path)
    try:
        ours = stored(spec, arrays, "keep").arrays
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    params = torch_modules.program(spec.name, **spec.sizes(), **spec.options).params
    return (
        {name: ours[name] for name in params},
        {name: array for name, array in ours.items() if name not in params},
    )


def _parts(spec: NetworkSpec, network: Trainable, head: str) -> tuple[str, ...]:
    if head == "keep":
        return ()
    how, _, named = head.partition(":")
    if how != FRESH:
        raise ValueError(
            f"init.head={head}: a new head of {spec.name} is as the module itself draws it; set "
            "init.head=fresh"
        )
    parts = tuple(part.strip() for part in named.split(",")) if named else network.head
    some = "; its parts with num_classes outputs are {}" if _ends(spec, network) else "{}"
    some = some.format(", ".join(_ends(spec, network)[:_SHOWN]))
    if not parts:
        raise ValueError(
            f"init.head={head}: which weights of {spec.name} are its head is not known; name the "
            f"part, as init.head=fresh:{(*_ends(spec, network), 'fc')[0]}{some}"
        )
    for part in parts:
        if not any(_Head((part,)).has(name) for name in network.params):
            raise ValueError(
                f"init.head={head}: {spec.name} has no weights under {part!r}; name a part as its "
                f"state dict does{some}"
            )
    return parts


def _ends(spec: NetworkSpec, network: Trainable) -> list[str]:
    """List the parts that give as many numbers as there are classes, the last one first."""
    of: dict[str, list[int]] = {}
    for name, array in network.params.items():
        of.setdefault(name.rpartition(".")[0], []).append(array.shape[0] if array.ndim else 0)
    found = [part for part, sizes in of.items() if part and {*sizes} == {spec.num_classes}]
    return found[::-1]


def _unwrapped(arrays: Mapping[str, np.ndarray], network: Trainable) -> Arrays:
    """Take off as many prefixes of wrappers as let the most names be the module's."""
    known = {*network.names, *network.params, *network.stats}
    names = dict(arrays)
    if convert.COUNT in names and convert.COUNT not in known:
        del names[convert.COUNT]
    tried = [names]
    while shared := [
        prefix
        for prefix in convert.PREFIXES
        if any(key.startswith(prefix) for key in names)
        and all(key.startswith((prefix, "normalize.")) for key in names)
    ]:
        names = {key.removeprefix(shared[0]): array for key, array in names.items()}
        tried.append(names)
    return max(tried, key=lambda names: len(names.keys() & known))


def _own(arrays: Arrays, network: Trainable, anew: _Head) -> Arrays:
    """Leave out the head, second names of tied weights, and whole numbers of the program."""
    kept = {name: array for name, array in arrays.items() if not anew.has(name)}
    for name, first in network.tied.items():
        if (second := kept.pop(name, None)) is None or anew.has(first):
            continue
        if not np.array_equal(kept.setdefault(first, second), second):
            raise ValueError(
                f"{name} and {first} are one tensor of the module and differ there; save the state "
                "dict of a module in which they are tied"
            )
    apart = network.integers.keys() - network.stats.keys()
    return {name: array for name, array in kept.items() if name not in apart}


def _check_integers(arrays: Arrays, network: Trainable) -> None:
    for name in (network.integers.keys() - network.stats.keys()) & arrays.keys():
        same = np.array_equal(arrays[name], network.integers[name])
        if not (same or name.endswith(_COUNTER)):
            raise ValueError(
                f"{name} holds other whole numbers than the module's, and they are part of what it "
                "computes; set model.options to those of the module that was saved"
            )


def _float32(arrays: Arrays, network: Trainable) -> Arrays:
    whole = {**network.params, **network.stats}

    def single(name: str, array: np.ndarray) -> np.ndarray:
        same = name in whole and array.dtype == whole[name].dtype
        return array.astype(np.float32) if same or name.endswith(_COUNTER) else array

    single_ones = {name: single(name, array) for name, array in arrays.items()}
    for name, array in single_ones.items():
        if array.dtype != np.float32:
            raise ValueError(
                f"{name} is {array.dtype} there, expected float32; where rounding is meant, save "
                "the state dict of module.float()"
            )
    return single_ones


def _completed(arrays: Arrays, network: Trainable) -> Arrays:
    """Add what no state dict holds: buffers that are not persistent, counters, our first layer."""
    added: Arrays = {}
    for name, array in network.stats.items():
        if name not in network.names or name.endswith(_COUNTER):
            added[name] = np.asarray(array, np.float32)
    if not normalises_itself(network):
        channels = network.image[2]
        moments = {MEAN: np.zeros(channels, np.float32), STD: np.ones(channels, np.float32)}
        for name, value in moments.items():
            stored = arrays.get(name, value)  # [1,C,1,1] where PyTorch has it
            added[name] = stored.reshape(-1) if stored.size == channels else stored
        arrays = {name: array for name, array in arrays.items() if name not in moments}
    return added | arrays


def _check(spec: NetworkSpec, network: Trainable, anew: _Head, arrays: Arrays) -> None:
    whole = {**network.params, **network.stats}
    here = {name: array.shape for name, array in whole.items() if not anew.has(name)}
    there = {name: array.shape for name, array in arrays.items()}
    missing = [name for name in here if name not in there]
    unexpected = [name for name in there if name not in here and name not in (MEAN, STD)]
    other = [name for name in here if name in there and there[name] != here[name]]
    if not (missing or unexpected or other):
        return
    shapes = [f"{name} {there[name]} there and {here[name]} here" for name in other]
    faults = [
        f"{len(names)} {verb if len(names) > 1 else single} ({_some(names)})"
        for names, verb, single in (
            (missing, "are missing", "is missing"),
            (unexpected, "are unexpected", "is unexpected"),
            (shapes, "have another shape", "has another shape"),
        )
        if names
    ]
    remedy = f"give weights of {spec.name} with these model.options, or set model.options to theirs"
    if not (missing or unexpected) and (parts := _head_of(spec, network, other)):
        known = {*parts} == {*network.head}
        own = FRESH if known else f"{FRESH}:{','.join(parts)}"
        remedy = f"for a head of other classes set init.head={own}"
    raise ValueError(f"of the module's weights {', '.join(faults)}; {remedy}")


def _head_of(spec: NetworkSpec, network: Trainable, names: Iterable[str]) -> list[str]:
    """List the parts of the names, where each is one of as many outputs as there are classes."""
    parts = list(dict.fromkeys(name.rpartition(".")[0] for name in names))
    ends: Any = (*network.head, *_ends(spec, network))
    return parts if all(part in ends for part in parts) else []


def _some(words: list[str]) -> str:
    return ", ".join(words[:_SHOWN]) + ", ..." * (len(words) > _SHOWN)
