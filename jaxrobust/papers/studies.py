"""The networks of Huang et al. 2022's studies, each with the config that trains it.

Source: arXiv 2212.11005, its Table 1 and the figures around it. The text names four capacities for
the studies of blocks: depths 4, 5, 7 and 11 with widths 10, 12, 14 and 16. Which cardinalities,
scales and kernel sizes it tries is only in its figures, so those values are ours. Its two published
blocks cost as much as a bottleneck (inner widths of 1.5 and 2 times the planes); other
cardinalities and scales get the width of equal cost.
"""

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from jaxrobust.papers.scaling import OPTIONS, robust_scaling

CAPACITIES = ("wrn_28_10", "wrn_34_12", "wrn_46_14", "wrn_70_16")


class Studied(NamedTuple):
    """A network of a study: our name for it, and its options."""

    name: str
    options: dict[str, Any]
    share: float | None = None  # its multiply-adds relative to the request; None: no request
    settings: Mapping[str, Any] = {}  # further arguments of configs/cifar_bat.py


# The paper varies depths at one width and widths at one depth, but does not print these. Ours are
# from its smallest baseline, WRN-28-10.
# study -> the varying option, its values in each stage, the fixed options
_GRIDS: dict[str, tuple[str, tuple[int, ...], dict[str, Any]]] = {
    "depth": ("depths", (2, 3, 4, 5, 7, 9, 11), {"widths": (10, 10, 10)}),
    "width": ("widths", (4, 6, 8, 10, 12, 14, 16, 20), {"depths": (4, 4, 4)}),
}
_RATIOS = tuple(percent / 100 for percent in range(30, 100, 5))
_RAW: dict[str, Any] = {"first_conv": "raw"}  # as in the released code, the source of the paper's
_SQUEEZES = ("standard", "conv3x3", "identity", "residual")
_BOTTLENECK = {"block": "bottleneck"} | _RAW
_HIERARCHICAL = {"block": "hierarchical"} | _RAW
_BLOCKS: tuple[dict[str, Any], ...] = (
    {},
    {"preact": False},
    {"residual": False},
    {"block": "inverted"} | _RAW,
    {"block": "inverted", "preact": False},
    _BOTTLENECK,
    {"block": "bottleneck", "preact": False},
    {"block": "aggregated"} | _RAW,
    _HIERARCHICAL,
    *(_BOTTLENECK | {"se": se, "se_reduction": 16} for se in _SQUEEZES),
    _BOTTLENECK | {"se": "residual"},
    OPTIONS["robust"],
)


def base_width(groups: int, scales: int = 1) -> int:
    """Return the channels per group, at 160 planes, of a block that costs as much as a bottleneck.

    >>> base_width(4), base_width(4, 8)  # of Table 1
    (60, 10)
    """
    # For P planes and inner width wP, 8 w + 9 k w^2 = 17, the bottleneck's multiply-adds over P^2.
    k = max(scales - 1, 1) / (scales**2 * groups)
    width = (math.sqrt(16 + 153 * k) - 4) / (9 * k)
    return round(160 * width / (groups * scales))


# study -> its networks: options, and further arguments of configs/cifar_bat.py
_OF_BLOCKS: dict[str, list[tuple[dict[str, Any], dict[str, Any]]]] = {
    "blocks": [(options, {}) for options in _BLOCKS],
    "cardinality": [
        ({"block": "aggregated", "groups": groups, "base_width": base_width(groups)} | _RAW, {})
        for groups in (1, 2, 4, 8, 16)
    ],
    "scales": [
        ({"block": "aggregated"} | _RAW, {}),  # one part
        *(
            (_HIERARCHICAL | {"scales": scales, "base_width": base_width(4, scales)}, {})
            for scales in (2, 4, 6, 8)
        ),
    ],
    "kernel": [
        (options | {"kernel_size": size}, {})
        for options in OPTIONS.values()
        for size in (3, 5, 7, 9)
    ],
    "activation": [  # the paper decays no batch norms of smooth ones
        (
            {"activation": name},
            {"data": data, "weight_decay": decay, "decay": "not-bn-named" if smooth else "all"},
        )
        for data in ("cifar10", "cifar100", "tiny")
        for name, smooth in (("relu", 0), ("silu", 1), ("softplus", 1), ("gelu", 1))
        for decay in (1e-4, 2e-4, 5e-4)
    ],
}
STUDIES = (*_GRIDS, "ratio", *_OF_BLOCKS)


def _ratios(multiply_adds: float, block: str, image_size: int) -> Iterator[Studied]:
    for ratio in _RATIOS:
        scaling = robust_scaling(multiply_adds, block, image_size, ratio=ratio)
        sizes = {"depths": scaling.rounded_depths, "widths": scaling.rounded_widths}
        yield Studied("wrn_28_10", sizes | OPTIONS[block], scaling.share)


def study(
    name: str,
    *,
    capacity: str | None = None,
    multiply_adds: float = 5e9,
    block: str = "basic",
    image_size: int = 32,
) -> list[Studied]:
    """Return the networks of one of the paper's studies.

    Args:
      name: depth (343 networks), width (512), ratio (depths against widths at one cost; each
        network states its share of it), or at each capacity blocks (15 networks), cardinality (5),
        scales (5), kernel (8) or activation (36, with weight decays and data sets).
      capacity: only one of `CAPACITIES`.
      multiply_adds, block, image_size: for the study of ratios.
    Raises:
      ValueError: an unknown study or capacity, or a cost that is too small.
    """
    if name not in STUDIES:
        raise ValueError(f"study={name!r} is unknown; {', '.join(STUDIES)}")
    if capacity and name not in _OF_BLOCKS:
        raise ValueError(
            f"study={name!r} has one capacity; leave capacity={capacity!r} out, or use one of "
            f"{', '.join(_OF_BLOCKS)}"
        )
    if capacity not in (None, *CAPACITIES):
        raise ValueError(f"capacity={capacity!r} is unknown; choose one of {', '.join(CAPACITIES)}")
    if name in _GRIDS:
        varied, values, fixed = _GRIDS[name]
        grid = itertools.product(values, repeat=3)
        return [Studied("wrn_28_10", fixed | {varied: sizes}) for sizes in grid]
    if name == "ratio":
        return list(_ratios(multiply_adds, block, image_size))
    bases = [capacity] if capacity else CAPACITIES
    return [
        Studied(base, options, settings=settings)
        for base in bases
        for options, settings in _OF_BLOCKS[name]
    ]
