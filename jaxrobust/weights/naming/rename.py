"""Renames arrays from a reference to ours: each name matches one row of its architecture."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxrobust import models
from jaxrobust.models.interface.renaming import Renaming

Arrays = dict[str, np.ndarray]
Shapes = Mapping[str, tuple[int, ...]]

_SHOWN = 5  # misfits to show; all of them would fill a screen
_UNITS = {"normalize.mean": 0.0, "normalize.std": 1e-6}  # smallest sensible values


def rename(
    rows: Sequence[Renaming],
    source: Mapping[str, np.ndarray],
    expected: Shapes,
    *,
    name: str | None = None,
) -> Arrays:
    """Rename arrays (all float32, or all float64) to our names."""
    filled: Arrays = {}
    shapes: dict[str, tuple[int, ...]] = {}
    tried, problems = set(), []
    dtype = float_type(source)
    for key, array in source.items():
        fitting = matches(rows, key)
        if len(fitting) != 1:
            problems.append(f"{key}: {len(fitting)} rows match, expected 1")
            continue
        ((renaming, match),) = fitting
        filling = [match.expand(template) for template in targets(renaming)]
        try:
            parts = _moved(renaming, filling, array, expected)
        except ValueError as error:
            problems.append(f"{key}: {error}")
            tried |= set(filling)
            continue
        for target, part in zip(filling, parts, strict=True):
            shapes[target] = part.shape
            filled[target] = np.array(part, order="C")  # arrays without axes stay so
            if fault := _fault(target, part, expected, tried, dtype):
                problems.append(f"{key}: {fault}")
            tried.add(target)
    missing = sorted(f"{key}: not filled by any source name" for key in expected.keys() - tried)
    if problems or missing:
        cause = compared(name, shapes, expected)
        cause = cause or "check the model name, num_classes and image_size"
        count = len(problems) + len(missing)
        lines = [f"{count} weights do not fit; {cause}{_alike(source, but=name)}:"]
        shown = sorted(problems)[: max(_SHOWN - len(missing), _SHOWN // 2 + 1)]  # of both kinds
        lines += sorted([*shown, *missing[: _SHOWN - len(shown)]])
        lines += [f"and {count - _SHOWN} more"] * (count > _SHOWN)
        raise ValueError("\n  ".join(lines))
    return filled


def compared(name: str | None, stored_shapes: Shapes, shapes: Shapes) -> str:
    """Name the options by which stored shapes (our name -> shape) differ from a network's."""
    tell = models.family(name).names.options if name else None
    if tell is None:
        return ""
    stored, expected = tell(stored_shapes), tell(shapes)
    if not (other := [key for key in stored if stored[key] != expected.get(key)]):
        return ""
    words, instead = (
        ", ".join(f"{key}={options[key]!r}" for key in other if key in options)
        for options in (stored, expected)
    )
    here = f"this {name} has {instead}" if instead else f"this {name} is different"
    return f"their shapes match {words}, but {here}; set {words} in the options of the network"


def matches(rows: Sequence[Renaming], name: str) -> list[tuple[Renaming, re.Match[str]]]:
    """Return the rows that match a name, each with its match."""
    return [(r, match) for r in rows if (match := r.pattern.fullmatch(name))]


def float_type(arrays: Mapping[str, Any]) -> np.dtype:
    """Return the type that all floats must have: float64 if all do, else float32."""
    kinds = {array.dtype for array in arrays.values() if array.dtype.kind == "f"}
    return np.dtype(np.float64 if kinds == {np.dtype(np.float64)} else np.float32)


def targets(renaming: Renaming) -> tuple[str, ...]:
    """List the templates of our names that a row fills; empty for a dropped name."""
    if renaming.target is None:
        return ()
    return renaming.target if isinstance(renaming.target, tuple) else (renaming.target,)


def _moved(
    renaming: Renaming, targets: list[str], array: np.ndarray, expected: Shapes
) -> list[np.ndarray]:
    if not targets:
        return []
    try:
        copy = np.array(array, order="C")  # the source may be in use
        moved = renaming.transform.to_ours(copy)
        parts = list(moved) if isinstance(renaming.target, tuple) else [moved]
    except (ValueError, IndexError, TypeError) as error:
        raise ValueError(f"shape {array.shape} does not fit {', '.join(targets)}") from error
    if renaming.resize and targets[0] in expected and parts[0].shape != tuple(expected[targets[0]]):
        parts = [renaming.resize(parts[0], tuple(expected[targets[0]]))]
    return parts


def _fault(
    target: str, array: np.ndarray, expected: Shapes, tried: set[str], dtype: np.dtype
) -> str:
    if target not in expected:
        return f"maps to {target}, which this network does not have"
    if target in tried:
        return f"fills {target} a second time"
    if array.shape != tuple(expected[target]):
        return f"shape {array.shape}, but {target} has shape {tuple(expected[target])}"
    if array.dtype != dtype:
        return (
            f"dtype {array.dtype}, expected {dtype}; rounding would change the weights; "
            "if you want that, cast them first"
        )
    if not np.isfinite(array).all():
        return "holds values that are not finite"
    if target in _UNITS and not (_UNITS[target] <= array.min() and array.max() <= 1):
        return (
            "does not fit [0, 1] pixels (mean 0 to 1, std above 0); divide values for 0..255 by 255"
        )
    return ""


def _alike(source: Mapping[str, np.ndarray], but: str | None) -> str:
    """Name the other networks with exactly these names; empty: this network has them."""
    names = set(source) - {"normalize.mean", "normalize.std"}
    alike = [model for model in models.available() if names == set(models.torch_keys(model))]
    return f" (all names match {', '.join(alike)})" if alike and but not in alike else ""
