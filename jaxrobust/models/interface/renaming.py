"""Rows that map one naming of weights to another, and the array moves they need.

A converter is an ordered list of rows beside each architecture; `convert.py` runs them.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

Transform = Callable[[np.ndarray], Any]  # an array, or as many as the row has targets
Resize = Callable[[np.ndarray, tuple[int, ...]], np.ndarray]
# (our arrays, the match of a name of theirs) -> what stands under it
Make = Callable[[Mapping[str, Any], re.Match[str]], np.ndarray]


class Row(NamedTuple):
    """One renaming: source names that match `pattern` become `target`, through `transform`.

    Several targets take the several arrays of `transform`. `target` is None for a name that is
    deliberately left out; `reason` then says why, and `make` what is written under it on the way
    back. `resize` turns an array made for another image size into the wanted shape.
    """

    pattern: re.Pattern[str]
    target: str | tuple[str, ...] | None
    transform: Transform
    reason: str = ""
    resize: Resize | None = None
    make: Make | None = None  # None: torch's counter of batches, at 0


def same(array: np.ndarray) -> np.ndarray:
    """Return the array itself."""
    return array


def conv_oihw(array: np.ndarray) -> np.ndarray:
    """Transpose torch's [out, in, kh, kw] to [kh, kw, in, out]; depthwise: to [k, k, 1, C]."""
    return np.transpose(array, (2, 3, 1, 0))


def linear_oi(array: np.ndarray) -> np.ndarray:
    """Transpose torch's [out, in] to [in, out]."""
    return np.transpose(array)


def pointwise_oi(array: np.ndarray) -> np.ndarray:
    """Turn torch's 1x1 convolution [out, in, 1, 1] into a linear map, [in, out]."""
    return array[:, :, 0, 0].T


def pointwise1_oi(array: np.ndarray) -> np.ndarray:
    """Turn torch's convolution of one tap along one axis, [out, in, 1], into [in, out]."""
    return array[:, :, 0].T


def channels(array: np.ndarray) -> np.ndarray:
    """Reshape torch's [1, C, 1, 1] to [C]."""
    return np.ravel(array)


# The way back, for the transforms that have one.
INVERSE: dict[Transform, Callable[[np.ndarray], np.ndarray]] = {
    same: same,
    conv_oihw: lambda array: np.transpose(array, (3, 2, 0, 1)),
    linear_oi: np.transpose,
    pointwise_oi: lambda array: array.T[:, :, None, None],
    pointwise1_oi: lambda array: array.T[:, :, None],
    channels: lambda array: array.reshape(1, -1, 1, 1),
}


def row(
    pattern: str,
    target: str | tuple[str, ...],
    transform: Transform = same,
    resize: Resize | None = None,
) -> Row:
    r"""Return a row whose `target` may use the groups of `pattern` as `\1`; the whole name must
    match.
    """
    return Row(re.compile(pattern), target, transform, resize=resize)


def drop(pattern: str, reason: str, make: Make | None = None) -> Row:
    """Return a row that leaves matching names out, with the reason, and makes them on the way
    back.
    """
    return Row(re.compile(pattern), None, same, reason, make=make)


def linear_rows(theirs: str, ours: str) -> list[Row]:
    """Return the rows of linear maps, with a bias or without."""
    return [
        row(theirs + r"\.weight", ours + ".kernel", linear_oi),
        row(theirs + r"\.bias", ours + ".bias"),
    ]


def conv_rows(theirs: str, ours: str) -> list[Row]:
    """Return the rows of convolutions, with a bias or without."""
    return [
        row(theirs + r"\.weight", ours + ".kernel", conv_oihw),
        row(theirs + r"\.bias", ours + ".bias"),
    ]


def norm_rows(theirs: str, ours: str) -> list[Row]:
    """Return the rows of norms, with running statistics or without."""
    return [
        row(theirs + r"\.weight", ours + ".scale"),
        row(theirs + r"\.bias", ours + ".bias"),
        row(theirs + r"\.running_(?P<part>mean|var)", ours + r".\g<part>"),
    ]


def _any_variant(variant: Any) -> bool:
    del variant
    return True


class Naming(NamedTuple):
    """Another naming of the same network: its rows count if any source name matches `marker`.

    `normalize` is the (mean, std) of all channels that such files assume without holding them.
    `fits` says for a variant whether such files hold weights of it, `of` which networks those are.
    """

    origin: str  # whose files, for people
    marker: re.Pattern[str]
    rows: list[Row]
    normalize: tuple[float, float] = (0.0, 1.0)
    fits: Callable[[Any], bool] = _any_variant
    of: str = ""  # for the message where a variant does not fit


def naming(
    origin: str,
    marker: str,
    rows: list[Row],
    normalize: tuple[float, float] = (0.0, 1.0),
    *,
    fits: Callable[[Any], bool] = _any_variant,
    of: str = "",
) -> Naming:
    """Return a `Naming` whose marker must match a whole name."""
    return Naming(origin, re.compile(marker), rows, normalize, fits, of)


def affine(*modules: str) -> list[str]:
    """Return the names of the weight and bias of each module, in torch's order."""
    return [f"{module}.{part}" for module in modules for part in ("weight", "bias")]


def batch_norm(module: str) -> list[str]:
    """Return the names that a batch norm of torch has, in its order."""
    parts = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    return [f"{module}.{part}" for part in parts]


BATCH_NORM_COUNT = drop(
    r".*\.num_batches_tracked", "counts the reference's training steps; evaluation never reads it"
)
