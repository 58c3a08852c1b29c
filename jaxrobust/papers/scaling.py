"""RobustScaling: depths and widths of a residual network with a given cost.

Source: Huang et al. 2022 (arXiv 2212.11005), section 4.2 and its studies of depth and width: sum of
depths to sum of widths 7:3, depths 2:2:1, widths 2:2.5:1. This leaves one unknown, the width of the
last stage, which follows from the cost. The published networks are rounded by hand, within 0.81 of
the solution, and cost up to 8% more or less than the paper's target; ours come from a search
(`whole`). Parity: tests/papers/test_scaling.py against the counts of the authors' networks.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

RATIO = 0.7  # share of depths in the sum of depths and widths
_DEPTHS, _WIDTHS = (2, 2, 1), (2, 2.5, 1)  # relative to the last stage
_STEM = 16  # channels
_TOLERANCE = 0.02  # of the cost; the paper's own A1 is 1.6% above its 5e9

# Options of a network for each of the two scaled blocks.
OPTIONS: dict[str, dict[str, Any]] = {
    "basic": {},
    "robust": {"block": "hierarchical", "se": "residual", "first_conv": "raw"},
}


class NetworkCost(NamedTuple):
    """The cost of a network, interpolated for fractional depths and widths."""

    parameters: float
    multiply_adds: float  # of convolutions and linear maps, for one image

    def __add__(self, other: Any) -> "NetworkCost":
        return NetworkCost(*(a + b for a, b in zip(self, other, strict=True)))

    def times(self, count: float) -> "NetworkCost":
        """Multiply a cost by a count."""
        return NetworkCost(*(count * value for value in self))


class Scaling(NamedTuple):
    """A solution of the rule, and integers near it of about the same cost."""

    depths: tuple[float, ...]
    widths: tuple[float, ...]
    rounded_depths: tuple[int, ...]
    rounded_widths: tuple[int, ...]
    cost: NetworkCost  # of the integers
    share: float  # their multiply-adds relative to the request


def _conv(ins: float, outs: float, window: int, pixels: float, groups: int = 1) -> NetworkCost:
    weights = window * window * ins * outs / groups
    return NetworkCost(weights, weights * pixels)


def _norm(channels: float) -> NetworkCost:
    return NetworkCost(2 * channels, 0)


def _basic(ins: float, planes: float, input_pixels: float, after: float) -> NetworkCost:
    """Count a block's cost without its shortcut; `before`, `after`: pixels around its stride."""
    convs = [_conv(ins, planes, 3, after), _conv(planes, planes, 3, after)]
    return sum([*convs, _norm(ins), _norm(planes)], NetworkCost(0, 0))


def _robust(ins: float, planes: float, input_pixels: float, after: float) -> NetworkCost:
    inner, outs, part = 2 * planes, 4 * planes, planes / 4
    parts = (_conv(part, part, 3, after, groups=4) + _norm(part)).times(7)
    squeeze = 2 * outs * (outs / 64)
    convs = [_conv(ins, inner, 1, input_pixels), parts, _conv(inner, outs, 1, after)]
    norms = [_norm(ins), _norm(inner), _norm(outs)]
    return sum([*convs, *norms, NetworkCost(squeeze, squeeze)], NetworkCost(0, 0))


# block -> (cost of one, its output's channels in units of its planes)
_BLOCKS = {"basic": (_basic, 1), "robust": (_robust, 4)}


def cost(
    depths: Sequence[float],
    widths: Sequence[float],
    *,
    block: str = "basic",
    image_size: int = 32,
    num_classes: int = 10,
) -> NetworkCost:
    """Count the cost of a network with these depths and widths per stage.

    >>> cost((4, 4, 4), (10, 10, 10)).parameters  # WRN-28-10
    36479194.0
    """
    known(block)
    of_block, wider = _BLOCKS[block]
    pixels, ins = float(image_size * image_size), float(_STEM)
    total = _conv(3, _STEM, 3, pixels)
    for i, (depth, width) in enumerate(zip(depths, widths, strict=True)):
        planes, input_pixels, pixels = (_STEM << i) * width, pixels, pixels / (4 if i else 1)
        outs = wider * planes
        total += of_block(ins, planes, input_pixels, pixels)
        if i or ins != outs:
            total += _conv(ins, outs, 1, pixels)
        total += of_block(outs, planes, pixels, pixels).times(depth - 1)
        ins = outs
    head = ins * num_classes
    return total + _norm(ins) + NetworkCost(head + num_classes, head)


def known(block: str) -> str:
    """Return the block; `ValueError` if it has no scaling rule."""
    if block not in _BLOCKS:
        raise ValueError(f"block={block!r} cannot be scaled; choose one of {', '.join(_BLOCKS)}")
    return block


def _of_width(width: float, ratio: float) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return depths and widths for a width of the last stage."""
    depth = ratio / (1 - ratio) * sum(_WIDTHS) / sum(_DEPTHS) * width
    return tuple(depth * part for part in _DEPTHS), tuple(width * part for part in _WIDTHS)


def robust_scaling(
    multiply_adds: float, block: str = "basic", image_size: int = 32, *, ratio: float = RATIO
) -> Scaling:
    """Return the rule's depths and widths for `multiply_adds` per image.

    Args:
      multiply_adds: of convolutions and linear maps, 10 classes.
      block: "basic", or "robust" for RobustResBlocks.
      image_size: side of the images in pixels.
      ratio: share of depths in the sum of depths and widths.
    Returns:
      The solution in real numbers, integers near it (see `whole`), and their cost: for 1e9 to 60e9
      multiply-adds at 32 px, 98 to 102% of the request in tests.
    Raises:
      ValueError: the cost is below the smallest network's, or the block has no rule.
    Parity: Table 2 of the paper; tests/papers/test_scaling.py.

    >>> scaling = robust_scaling(5e9)
    >>> scaling.rounded_depths, scaling.rounded_widths, round(scaling.share, 3)
    ((14, 14, 7), (5, 7, 3), 1.015)
    """
    known(block)
    if not 0 < ratio < 1:
        raise ValueError(f"ratio={ratio} must be between 0 and 1; the paper's is 0.7")

    def needed(width: float) -> float:
        depths, widths = _of_width(width, ratio)
        return cost(depths, widths, block=block, image_size=image_size).multiply_adds

    # At least one block and one unit of width in every stage.
    low = max(1.0, 1 / _of_width(1, ratio)[0][-1])
    if not multiply_adds >= needed(low):
        raise ValueError(
            f"multiply_adds={multiply_adds:g} is below {needed(low):.3g}, the cost of the rule's "
            f"smallest network at {image_size} px with {block} blocks; give at least that"
        )
    high = 2 * low
    while needed(high) < multiply_adds:
        high *= 2
    for _ in range(100):  # until neighboring floats
        middle = (low + high) / 2
        low, high = (middle, high) if needed(middle) < multiply_adds else (low, middle)
    depths, widths = _of_width(low, ratio)
    rounded = whole(depths, widths, multiply_adds, block=block, image_size=image_size)
    rounded_cost = cost(*rounded, block=block, image_size=image_size)
    return Scaling(
        depths, widths, *rounded, rounded_cost, rounded_cost.multiply_adds / multiply_adds
    )


def whole(
    depths: Sequence[float],
    widths: Sequence[float],
    multiply_adds: float,
    *,
    block: str = "basic",
    image_size: int = 32,
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Choose integer depths and widths near real ones, at about `multiply_adds` per image.

    Rounding each number separately misses the cost by up to a fifth, because all may be rounded up.
    So each number is rounded down and up, in all combinations (at most 64 for three stages). Among
    those within 2% of the requested cost, the nearest is returned: the smallest sum of squared
    differences, then the nearest cost, then the smaller first number. Plain rounding is therefore
    kept if its cost is near enough, as for the published A1 (1.6% above). If none is within 2%,
    numbers one further down and up are tried too; if there is still none, the combination with the
    nearest cost is returned.
    """
    real, stages = (*depths, *widths), len(depths)

    def tried_out(numbers: tuple[int, ...]) -> _Tried:
        cost_of = cost(numbers[:stages], numbers[stages:], block=block, image_size=image_size)
        distance = sum((a - b) ** 2 for a, b in zip(numbers, real, strict=True))
        off = abs(cost_of.multiply_adds / multiply_adds - 1)
        # Rounded, because equal distances differ in the last bits by the order of summation.
        return _Tried(numbers, round(distance, 9), round(off, 9))

    for reach in (0, 1):
        ends = [(math.floor(number) - reach, math.ceil(number) + reach) for number in real]
        near = [range(max(1, low), max(1, high) + 1) for low, high in ends]
        tried = [tried_out(numbers) for numbers in itertools.product(*near)]
        if close := [one for one in tried if one.off <= _TOLERANCE]:
            best = min(close, key=lambda one: (one.distance, one.off, one.numbers))
            break
    else:
        best = min(tried, key=lambda one: (one.off, one.distance, one.numbers))
    return best.numbers[:stages], best.numbers[stages:]


class _Tried(NamedTuple):
    numbers: tuple[int, ...]  # depths, then widths
    distance: float  # from the solution, squared
    off: float  # relative deviation from the requested cost
