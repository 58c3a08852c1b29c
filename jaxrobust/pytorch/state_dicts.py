"""A PyTorch state dict as the weights of a module in training (`torch:...`).

Names are those of the module's own state dict; prefixes of wrappers are removed.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

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


def stored(spec: NetworkSpec, arrays: Mapping[str, np.ndarray], head: str) -> StoredNames:
    """Match stored arrays with all parameters and statistics of a module.

    Args:
      spec: names the module.
      arrays: from its state dict, or from one of our runs.
      head: "keep"; "fresh": the head that the module declares (as timm's do); or
        "fresh:PART,..." with names of the module's parts. Weights of a fresh head are dropped.
    Raises:
      ValueError: one sentence with what is missing, unexpected or of another shape.
    """
    network = torch_modules.program(spec.name, **spec.sizes(), **spec.options)
    head_pattern = _pattern(_parts(spec, network, head))
    unwrapped = _unwrapped(arrays, network)
    unique = _untied(unwrapped, network, head_pattern)
    completed = _completed(_float32(unique, network), network)
    _check(spec, network, head_pattern, completed)
    for name in (network.integers.keys() - network.stats.keys()) & unwrapped.keys():
        same = np.array_equal(unwrapped[name], network.integers[name])
        if not (same or name.endswith(_COUNTER)):
            raise ValueError(
                f"{name} has different integers from the module, which affect its output; set "
                "model.options to those of the saved module"
            )
    identity = row(r"(?P<name>.+)", r"\g<name>")
    matched = tuple((key, identity, [key]) for key in completed)
    return StoredNames(
        spec.name, [identity], completed, (0.0, 1.0), r"(?!)", head_pattern, matched, our_names=True
    )


def load(spec: NetworkSpec, path: Path) -> tuple[Arrays, Arrays]:
    """Read a module's params and stats from a PyTorch or safetensors file.

    Raises:
      ValueError: the file cannot be read, or does not fit; see `stored`.
    """
    try:
        arrays = stored(spec, files.read(path), "keep").arrays
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    params = torch_modules.program(spec.name, **spec.sizes(), **spec.options).params
    return (
        {name: arrays[name] for name in params},
        {name: array for name, array in arrays.items() if name not in params},
    )


def _pattern(parts: Iterable[str]) -> str:
    """Return a pattern for the names under some parts of a module; no parts match nothing."""
    return "|".join(rf"{re.escape(part)}(?:\..+)?" for part in parts) or r"(?!)"


def _parts(spec: NetworkSpec, network: Trainable, head: str) -> tuple[str, ...]:
    """Return the parts of a module that are newly initialized."""
    if head == "keep":
        return ()
    kind, _, listed = head.partition(":")
    if kind != FRESH:
        raise ValueError(
            f"init.head={head}: the module {spec.name} initializes its new head itself; set "
            "init.head=fresh"
        )
    parts = tuple(part.strip() for part in listed.split(",")) if listed else network.head
    ends = _ends(spec, network)
    some = f"; its parts with num_classes outputs are {', '.join(ends[:_SHOWN])}" if ends else ""
    if not parts:
        raise ValueError(
            f"init.head={head}: the head of {spec.name} is unknown; name it, as in "
            f"init.head=fresh:{(*ends, 'fc')[0]}{some}"
        )
    for part in parts:
        if not any(re.fullmatch(_pattern([part]), name) for name in network.params):
            raise ValueError(
                f"init.head={head}: {spec.name} has no weights under {part!r}; name a part as its "
                f"state dict does{some}"
            )
    return parts


def _ends(spec: NetworkSpec, network: Trainable) -> list[str]:
    """List the parts with as many outputs as there are classes, the last one first."""
    outputs: dict[str, set[int]] = {}
    for name, array in network.params.items():
        sizes = outputs.setdefault(name.rpartition(".")[0], set())
        sizes.add(array.shape[0] if array.ndim else 0)
    return [part for part, sizes in outputs.items() if part and sizes == {spec.num_classes}][::-1]


def _unwrapped(arrays: Mapping[str, np.ndarray], network: Trainable) -> Arrays:
    """Remove as many wrapper prefixes as make the most names match the module's."""
    module_names = {*network.names, *network.params, *network.stats}
    names = dict(arrays)
    if convert.COUNT in names and convert.COUNT not in module_names:
        del names[convert.COUNT]
    tried = [names]
    while prefixes := [
        prefix
        for prefix in convert.PREFIXES
        if any(key.startswith(prefix) for key in names)
        and all(key.startswith((prefix, "normalize.")) for key in names)
    ]:
        names = {key.removeprefix(prefixes[0]): array for key, array in names.items()}
        tried.append(names)
    return max(tried, key=lambda names: len(names.keys() & module_names))


def _untied(arrays: Arrays, network: Trainable, head: str) -> Arrays:
    """Drop the head, second names of tied weights, and the program's integers."""
    unique = {name: array for name, array in arrays.items() if not re.fullmatch(head, name)}
    for name, first in network.tied.items():
        if (second := unique.pop(name, None)) is None or re.fullmatch(head, first):
            continue
        if not np.array_equal(unique.setdefault(first, second), second):
            raise ValueError(
                f"{name} and {first} are the same tensor in the module but differ in the file; "
                "save the state dict of a module in which they are tied"
            )
    fixed = network.integers.keys() - network.stats.keys()
    return {name: array for name, array in unique.items() if name not in fixed}


def _float32(arrays: Arrays, network: Trainable) -> Arrays:
    expected, singles = {**network.params, **network.stats}, {}
    for name, array in arrays.items():
        same = name in expected and array.dtype == expected[name].dtype
        singles[name] = array.astype(np.float32) if same or name.endswith(_COUNTER) else array
        if singles[name].dtype != np.float32:
            raise ValueError(
                f"{name} is {array.dtype} in the file, but must be float32; to round it, save the "
                "state dict of module.float()"
            )
    return singles


def _completed(arrays: Arrays, network: Trainable) -> Arrays:
    """Add what state dicts lack: non-persistent buffers, counters, our first layer."""
    added: Arrays = {}
    for name, array in network.stats.items():
        if name not in network.names or name.endswith(_COUNTER):
            added[name] = np.asarray(array, np.float32)
    if not normalises_itself(network):
        channels = network.image[2]
        moments = {MEAN: np.zeros(channels, np.float32), STD: np.ones(channels, np.float32)}
        for name, value in moments.items():
            array = arrays.get(name, value)  # [1,C,1,1] in PyTorch
            added[name] = array.reshape(-1) if array.size == channels else array
        arrays = {name: array for name, array in arrays.items() if name not in moments}
    return added | arrays


def _check(spec: NetworkSpec, network: Trainable, head: str, arrays: Arrays) -> None:
    shapes = {
        name: array.shape
        for name, array in {**network.params, **network.stats}.items()
        if not re.fullmatch(head, name)
    }
    missing = [name for name in shapes if name not in arrays]
    unexpected = [name for name in arrays if name not in shapes and name not in (MEAN, STD)]
    common = shapes.keys() & arrays.keys()
    other = [name for name in shapes if name in common and arrays[name].shape != shapes[name]]
    if not (missing or unexpected or other):
        return
    differing = [f"{name} {arrays[name].shape} there and {shapes[name]} here" for name in other]
    faults = [
        f"{len(names)} {verb if len(names) > 1 else single} "
        f"({', '.join(names[:_SHOWN])}{', ...' * (len(names) > _SHOWN)})"
        for names, verb, single in (
            (missing, "are missing", "is missing"),
            (unexpected, "are unexpected", "is unexpected"),
            (differing, "have a different shape", "has a different shape"),
        )
        if names
    ]
    remedy = f"give weights of {spec.name} with these model.options, or set model.options to match"
    parts = [*dict.fromkeys(name.rpartition(".")[0] for name in other)]
    ends = {*network.head, *_ends(spec, network)}
    if parts and ends.issuperset(parts) and not (missing or unexpected):
        fresh = FRESH if {*parts} == {*network.head} else f"{FRESH}:{','.join(parts)}"
        remedy = f"for a head with other classes, set init.head={fresh}"
    raise ValueError(f"the module's weights do not match: {', '.join(faults)}; {remedy}")
