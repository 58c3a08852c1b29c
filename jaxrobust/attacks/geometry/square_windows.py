"""The windows of Square: their schedule, and their template for L2 and L1.

Uses NumPy and Python doubles, rounded half to even like the reference.
Source and parity: see `square`.
"""

from typing import NamedTuple

import numpy as np

from jaxrobust.types import is_count


class Windows(NamedTuple):
    """The windows of a schedule, which have few different sides, the levels."""

    levels: np.ndarray  # i32[queries], the level of each query
    sides: np.ndarray  # i32[levels]
    profiles: np.ndarray  # f64[levels, 2, 2, largest side], see `template_profiles`; Linf: zeros


def window_levels(queries: int, rescale: bool) -> np.ndarray:
    """Count the halvings of each query's window area, i32[queries]."""
    at = np.arange(queries)
    if rescale:
        at = (at / queries * 10000).astype(int)
    bounds = [10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000]  # the last query before a halving
    return np.searchsorted(bounds, at).astype(np.int32)


def window_table(norm: str, levels: np.ndarray, p_init: float, shape: tuple[int, int]) -> Windows:
    """Make the windows for images of `shape` (H, W) from `window_levels`."""
    height, width = shape

    def side(level: int) -> int:
        wished: int = round((p_init / 2**level * height * width) ** 0.5)
        if norm != "linf":
            wished = max(wished, 3)
            wished += wished % 2 == 0
        return min(max(wished, 1), height, width)

    sides = np.array([side(level) for level in range(levels.max() + 1)], np.int32)
    profiles = np.zeros((len(sides), 2, 2, sides.max()))
    if norm != "linf":
        for level, s in enumerate(sides):
            profiles[level, :, :, :s] = template_profiles(norm, s)
    return Windows(levels, sides, profiles)


def template_profiles(norm: str, side: int) -> np.ndarray:
    """Compute the template for L2 and L1, a pyramid above a negative one, by axes: f64[2, 2, side].

    A pyramid stacks centered squares of sides 1, 3, 5, .. and heights 1, 1/4, 1/9, .. (L2) or 1,
    1/16, 1/81, .. (L1). Its value falls with the larger of the row's and the column's distance from
    the peak, so it is the smaller of what the row and the column allow. The first profile is for
    the axis along which the template keeps its sign: what it allows, and ones. The second is for
    the axis along which the sign changes: what it allows, and factors, which are the sign over the
    length of pyramid and template. Multiply by both axes' factors, as `template_of` does.
    """
    power = {"l2": 2, "l1": 4}[norm]
    heights = 1 / np.arange(1.0, side // 2 + 2) ** power
    allowed = np.cumsum(heights[::-1])[::-1]  # by distance from the peak
    other = allowed[np.abs(np.arange(side) - side // 2)]
    along, scale = np.ones(side), np.ones(side)
    for sign, half in ((1, np.arange(side // 2)), (-1, np.arange(side // 2, side))):
        along[half] = allowed[np.abs(np.arange(len(half)) - len(half) // 2)]
        pyramid = np.minimum(along[half, None], other)
        scale[half] = sign / max(_length(norm, pyramid), 1e-12)
    template = scale[:, None] * np.minimum(along[:, None], other)
    return np.array([[other, np.ones(side)], [along, scale / _length(norm, template)]])


def template_of(norm: str, side: int) -> np.ndarray:
    """Compute the template itself, f64[side, side], positive in the upper half."""
    (other, _), (along, scale) = template_profiles(norm, side)
    return np.asarray(scale[:, None] * np.minimum(along[:, None], other))


def _length(norm: str, values: np.ndarray) -> float:
    return float(np.abs(values).sum() if norm == "l1" else np.sqrt((values**2).sum()))


def check_schedule(queries: int, p_init: float) -> None:
    """Reject an invalid schedule with `ValueError`."""
    if not is_count(queries):
        raise ValueError(f"queries={queries!r} must be an int >= 1")
    if not 0 < p_init <= 1:
        raise ValueError(f"p_init={p_init} must be a fraction of the pixels, above 0 and at most 1")
