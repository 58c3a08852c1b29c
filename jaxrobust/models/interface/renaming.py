"""Rows that map weight names from one convention to another, and the array transforms they need.

A converter is an ordered list of rows, kept with each architecture; `convert.py` runs them.
"""

import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

Move = Callable[[np.ndarray], Any]  # returns an array, or one per target of the row
Resize = Callable[[np.ndarray, tuple[int, ...]], np.ndarray]
# (our arrays, the match of a reference name) -> that name's array
Make = Callable[[Mapping[str, Any], re.Match[str]], np.ndarray]


class Transform(NamedTuple):
    """Converts a PyTorch array to ours; exports need the inverse."""

    to_ours: Move
    to_torch: Callable[[np.ndarray], np.ndarray] | None = None


class Renaming(NamedTuple):
    """A renaming: source names that match `pattern` become `target`, through `transform`.

    Several targets take the several arrays that `transform` returns. `target` is None for a name
    that is dropped on purpose; `reason` says why, and `make` recreates its array on export.
    `resize` converts an array for another image size to the expected shape.
    """

    pattern: re.Pattern[str]
    target: str | tuple[str, ...] | None
    transform: Transform
    reason: str = ""
    resize: Resize | None = None
    make: Make | None = None  # None: a zero, for torch's batch counter


same = Transform(lambda array: array, lambda array: array)
# [out, in, kh, kw] to [kh, kw, in, out]; depthwise: to [k, k, 1, C]
conv_oihw = Transform(
    lambda array: np.transpose(array, (2, 3, 1, 0)), lambda array: np.transpose(array, (3, 2, 0, 1))
)
# [out, in] to [in, out]
linear_oi = Transform(np.transpose, np.transpose)
# a 1x1 convolution [out, in, 1, 1] to a linear map [in, out]
pointwise_oi = Transform(lambda array: array[:, :, 0, 0].T, lambda array: array.T[:, :, None, None])
# a convolution with one tap along one axis [out, in, 1] to [in, out]
pointwise1_oi = Transform(lambda array: array[:, :, 0].T, lambda array: array.T[:, :, None])
# [1, C, 1, 1] to [C]
channels = Transform(np.ravel, lambda array: array.reshape(1, -1, 1, 1))


def row(
    pattern: str,
    target: str | tuple[str, ...],
    transform: Transform | Move = same,
    resize: Resize | None = None,
) -> Renaming:
    r"""Make a row whose `target` may use groups of `pattern` as `\1`; full names must match.

    A plain function as `transform` has no inverse: such weights can be read but not exported.
    """
    pair = transform if isinstance(transform, Transform) else Transform(transform)
    return Renaming(re.compile(pattern), target, pair, resize=resize)


def drop(pattern: str, reason: str, make: Make | None = None) -> Renaming:
    """Make a row that drops names for a `reason`, and recreates them on export."""
    return Renaming(re.compile(pattern), None, same, reason, make=make)


# The parameters of each kind of module: the names there and here, and the transform.
_LINEAR = (("weight", "kernel", linear_oi), ("bias", "bias", same))
_CONV = (("weight", "kernel", conv_oihw), ("bias", "bias", same))
_NORM = (
    ("weight", "scale", same),
    ("bias", "bias", same),
    ("running_(?P<part>mean|var)", r"\g<part>", same),
)
_NONE: Mapping[str, str] = MappingProxyType({})


def table(
    *others: Renaming,
    convs: Mapping[str, str] = _NONE,
    linears: Mapping[str, str] = _NONE,
    norms: Mapping[str, str] = _NONE,
    prefix: str = "",
    our_prefix: str = "",
) -> list[Renaming]:
    """List the rows of three kinds of modules, each a pattern -> our name, then the others.

    `prefix` precedes each pattern, `our_prefix` each of our names.
    """
    rows = [
        row(rf"{prefix}{pattern}\.{there}", f"{our_prefix}{name}.{here}", transform)
        for kind, modules in ((_CONV, convs), (_LINEAR, linears), (_NORM, norms))
        for pattern, name in modules.items()
        for there, here, transform in kind
    ]
    return [*rows, *others]


class Naming(NamedTuple):
    """Another naming of the same network; its rows apply if a source name matches `marker`.

    `normalize` is the (mean, std) of all channels, which such files assume but do not store. `fits`
    tells whether such files may hold a variant's weights; `of` describes those networks.
    """

    origin: str  # whose files these are, for people
    marker: str  # a pattern for full names
    rows: list[Renaming]
    normalize: tuple[float, float] = (0.0, 1.0)
    fits: Callable[[Any], bool] = lambda variant: True
    of: str = ""  # for the message if a variant does not fit


def affine(*modules: str) -> list[str]:
    """List the weight and bias names of each module, in torch's order."""
    return [f"{module}.{part}" for module in modules for part in ("weight", "bias")]


# A module kind's parameters, in torch's order; "": a parameter without a module.
_PARTS = {
    "w": (".weight",),
    "bn": (".weight", ".bias", ".running_mean", ".running_var", ".num_batches_tracked"),
    "bn0": (".running_mean", ".running_var", ".num_batches_tracked"),  # without `affine`
    "": ("",),
}


def keys(prefix: str, modules: str, count: int | None = None) -> list[str]:
    """List torch's names of modules below a prefix, each with a weight and a bias.

    After a module's name, `:w` means a weight only, `:bn` a batch norm, and a colon alone a
    parameter. A `count` repeats all names below `prefix.0`, `prefix.1`, ...

    >>> keys("layer1.0", "conv:w fc gamma:")
    ['layer1.0.conv.weight', 'layer1.0.fc.weight', 'layer1.0.fc.bias', 'layer1.0.gamma']
    >>> keys("blocks", "norm:w", 2)
    ['blocks.0.norm.weight', 'blocks.1.norm.weight']
    """
    if count is not None:
        return [key for i in range(count) for key in keys(f"{prefix}.{i}", modules)]
    names = []
    for module in modules.split():
        name, colon, kind = module.partition(":")
        name = f"{prefix}.{name}" if prefix else name
        names += [name + part for part in _PARTS[kind]] if colon else affine(name)
    return names


BATCH_NORM_COUNT = drop(
    r".*\.num_batches_tracked", "counts the reference's training steps; evaluation never reads it"
)
