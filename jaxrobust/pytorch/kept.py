"""A `Trainable` as a folder of a run: programs as JSON, arrays as safetensors; no code, no pickle.

Resuming, evaluating or joining a run needs neither PyTorch nor the module's source.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from jaxrobust.pytorch.program import NumberType, Of, OperatorCall, Program
from jaxrobust.pytorch.trainable import Trainable
from jaxrobust.runtime import pytorch
from jaxrobust.runtime.files import jsonl

_VERSION = 1
_ARRAYS = "arrays.safetensors"
_GROUPS = ("params", "stats", "integers")
_MODES = ("evaluation", "training")


def write(folder: Path, network: Trainable, identity: Mapping[str, Any]) -> None:
    """Store a network; `identity` identifies it by plain values, for `read`."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {
        f"{group}/{name}": np.ascontiguousarray(array).reshape(np.shape(array))
        for group in _GROUPS
        for name, array in getattr(network, group).items()
    }
    head: dict[str, Any] = {"version": _VERSION, "identity": dict(identity)}
    head |= {"tied": dict(network.tied), "image": network.image, "names": network.names}
    head["head"] = network.head
    for mode in _MODES:
        program = getattr(network, mode)
        arrays |= {f"{mode}/{name}": np.array(a) for name, a in program.constants.items()}
        fields = program._asdict()
        for key in ("weights", "results", "moved", "image_axes", "blocks"):
            fields[key] = dict(fields[key])
        fields |= {"steps": [*map(_call, program.steps)], "constants": sorted(program.constants)}
        head[mode] = fields
    save_file(arrays, folder / _ARRAYS)
    # Last, because it marks the folder as complete.
    jsonl.replace(folder / pytorch.PROGRAMS, json.dumps(head) + "\n")


def identity(folder: Path) -> dict[str, Any]:
    """Read the identity of a folder's network; raises like `read`."""
    return _head(folder)["identity"]


def program_sha256(folder: Path) -> str:
    """Hash the computation of a stored network, without its initial weights."""
    head, network = _head(folder), read(folder)
    # The division into blocks changes no value, and older runs do not store it.
    computed = [{k: v for k, v in head[mode].items() if k != "blocks"} for mode in _MODES]
    digest = hashlib.sha256(json.dumps(computed).encode())
    for arrays in (network.integers, *(getattr(network, mode).constants for mode in _MODES)):
        for name in sorted(arrays):
            array = np.ascontiguousarray(arrays[name])
            digest.update(f"{name} {array.dtype} {array.shape}".encode() + array.tobytes())
    return digest.hexdigest()


def read(folder: Path) -> Trainable:
    """Read a network that `write` stored.

    Raises:
      ValueError: a file is missing or damaged, or from another version of this code.
    """
    head = _head(folder)
    try:
        groups: dict[str, Any] = {group: {} for group in (*_GROUPS, *_MODES)}
        for key, array in load_file(folder / _ARRAYS).items():
            group, _, name = key.partition("/")
            groups[group][name] = array
        programs: Any = {mode: _program(head[mode], groups.pop(mode)) for mode in _MODES}
    except (OSError, SafetensorError, KeyError, TypeError) as error:
        raise ValueError(
            f"{folder} is damaged ({error}); restore it, or begin a new run"
        ) from error
    names: Any = {key: tuple(head[key]) for key in ("names", "image")}
    names["head"] = tuple(head.get("head", ()))  # older folders lack it
    return Trainable(**programs, **groups, **names, tied=head["tied"])


def _head(folder: Path) -> dict[str, Any]:
    try:
        head = json.loads((folder / pytorch.PROGRAMS).read_text())
        version = head["version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{folder / pytorch.PROGRAMS} cannot be read ({error}); restore it, or begin a new run"
        ) from error
    if version != _VERSION:
        raise ValueError(
            f"{folder / pytorch.PROGRAMS} has version {version}, but this code reads {_VERSION}; "
            "use the version of jaxrobust that began the run"
        )
    return head


def _program(fields: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Program:
    constants = {name: jnp.asarray(arrays[name]) for name in fields["constants"]}
    steps, draws = tuple(map(_called, fields["steps"])), tuple(fields["draws"])
    return Program(**{**fields, "constants": constants, "steps": steps, "draws": draws})


def _call(step: OperatorCall) -> list[Any]:
    keywords = {name: _operand(value) for name, value in step.keywords.items()}
    operands = [*map(_operand, step.operands)]
    return [step.name, step.operator, operands, keywords, step.line, [*map(_call, step.backward)]]


def _called(fields: list[Any]) -> OperatorCall:
    name, operator, operands, keywords, line, backward = fields
    keywords = {key: _read(value) for key, value in keywords.items()}
    return OperatorCall(
        name, operator, _read(operands), keywords, line, tuple(map(_called, backward))
    )


def _operand(value: Any) -> Any:
    match value:
        case Of(name):
            return {"of": name}
        case NumberType(name):
            return {"type": name}
        case tuple() | list():
            return [*map(_operand, value)]
        case None | bool() | int() | float() | str():
            return value
        case complex():
            return {"complex": [value.real, value.imag]}
    raise ValueError(f"an operator has the argument {value!r}, which cannot be stored")


def _read(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(map(_read, value))
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    kinds: dict[str, Any] = {"of": Of, "type": NumberType, "complex": lambda c: complex(*c)}
    return kinds[kind](content)
