"""What a sample says of the images that the fast version left standing."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Shaped

from jaxrobust.evaluation.records import parts, sequential
from jaxrobust.evaluation.records.verdicts import Verdicts

METHOD = "fast version"  # of records, in place of AutoAttack's name
LEVEL = 0.95  # of the bound, which is one-sided


def sample(
    seed: int, ids: Shaped[np.ndarray, " N"], survivors: Bool[np.ndarray, " N"], count: int
) -> Bool[np.ndarray, " N"]:
    """Choose `count` survivors at random: the first ones in an order of the seed and the ids."""
    order = sequential.order(seed, ids.tolist())
    chosen = np.zeros(len(ids), bool)
    chosen[order[survivors[order]][:count]] = True
    return chosen


def most_fooled(fooled: int, sampled: int, of: int, level: float = LEVEL) -> int:
    """Bound from above how many of `of` images would be fooled, after `fooled` of `sampled`.

    The sample is drawn without replacement, so the count in it is hypergeometric. The bound is the
    largest number of all under which so few, or fewer, still have a probability above 1 - `level`:
    it holds with probability `level` at least, for every true number. The `fooled` ones are among
    it.

    >>> most_fooled(0, 59, 10**6), most_fooled(0, 50, 100), most_fooled(3, 20, 20)
    (49501, 4, 3)
    """
    if not 0 <= fooled <= sampled <= of:
        raise ValueError(
            f"fooled={fooled}, sampled={sampled}, of={of}; pass counts that rise from 0"
        )
    if not 0 < level < 1:
        raise ValueError(f"level={level:g} is no probability; 95 % is 0.95")
    low, high = fooled, of - (sampled - fooled)  # the true number lies between these
    while low < high:
        middle = (low + high + 1) // 2
        if _at_most(fooled, middle, sampled, of) > 1 - level:
            low = middle
        else:
            high = middle - 1
    return low


def _at_most(fooled: int, marked: int, sampled: int, of: int) -> float:
    """Compute the probability that at most `fooled` of `sampled` are among the `marked` of all."""

    def ways(n: int, k: int) -> float:  # to choose k of n, as a logarithm
        if not 0 <= k <= n:
            return -math.inf
        return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)

    total = ways(of, sampled)
    terms = (ways(marked, k) + ways(of - marked, sampled - k) - total for k in range(fooled + 1))
    return math.fsum(map(math.exp, terms))


def found(images: int, survivors: int, sampled: int, fallen: Sequence[int]) -> parts.FastSample:
    """Gather what a record says of its images, of which those with ids `fallen` fell in the sample.

    The bound is of the survivors that were not drawn.
    """
    fooled = len(fallen)
    most = most_fooled(fooled, sampled, survivors)
    return {
        "survivors": survivors,
        "sampled": sampled,
        "fooled": fooled,
        "fallen": list(fallen),
        "at_most": most - fooled,
        "level": LEVEL,
        "robust_at_least": (survivors - most) / max(images, 1),
    }


def met_by_all(fast: parts.FastSample, verdicts: Verdicts) -> Verdicts:
    """Give the verdicts of the attacks that all images met: the sample's fallen stand there."""
    stood = np.isin(verdicts.image_ids, fast["fallen"])
    return verdicts._replace(
        fooled_by=np.where(stood, "", verdicts.fooled_by),
        norms=np.where(stood, 0.0, verdicts.norms),
        reached=np.where(stood, -1, verdicts.reached),
    )


def line(fast: parts.FastSample) -> str:
    """Write for people what the sample says, and that this is no number of AutoAttack."""
    head = (
        "these are verdicts of the fast version, which are not AutoAttack's: "
        f"{fast['sampled']:,} of {fast['survivors']:,} survivors, at random, met all that the "
        f"standard version has left for them, and {fast['fooled']:,} fell"
    )
    return (
        f"{head}; with {100 * fast['level']:g} % confidence at most {fast['at_most']:,} of the "
        f"others would fall too, so that it leaves {least(fast)} at least; --finish computes it"
    )


def least(fast: parts.FastSample) -> str:
    """Write the bound of the accuracy, rounded down."""
    return f"{math.floor(1e4 * fast['robust_at_least'] + 1e-6) / 100:.2f} %"


def is_sound(fast: Mapping[str, Any]) -> bool:
    """Tell whether a record's part has the keys and types of `FastSample`, and can be meant."""
    counts: list[Any] = [fast.get(key) for key in ("survivors", "sampled", "fooled", "at_most")]
    shares: list[Any] = [fast.get(key) for key in ("level", "robust_at_least")]
    if not (
        all(type(count) is int and count >= 0 for count in counts)
        and all(type(share) in (int, float) and 0 <= share <= 1 for share in shares)
    ):
        return False
    survivors, sampled, fooled, at_most = counts
    fallen = fast.get("fallen")
    if not (isinstance(fallen, list) and all(type(number) is int for number in fallen)):
        return False
    return (
        fooled == len(fallen) and fooled <= sampled <= survivors and at_most <= survivors - sampled
    )
