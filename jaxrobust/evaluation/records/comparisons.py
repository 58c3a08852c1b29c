"""Paired verdicts: how far two networks differ, and what that implies for all images."""

import math
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Shaped

from jaxrobust.evaluation.records import sequences

_Counts = Shaped[np.ndarray, "*shape"]  # whole numbers, of many comparisons at once
_Values = Float64[np.ndarray, "*shape"]

_MANY = 10**7  # images, of which a sample is a negligible part
_HALVINGS = 60  # bisections of an interval of length at most 2: to the last digit of float64


class Paired(NamedTuple):
    """The comparison of two verdicts on each of n images: numbers, or arrays over groups."""

    n: Any  # images
    first: Any  # number right in the first
    second: Any
    gained: Any  # right only in the second
    lost: Any  # right only in the first
    difference: Any  # of the accuracies, second minus first
    low: Any  # ends of the difference's interval
    high: Any
    p: Any  # of McNemar's exact test


def mcnemar(gained: _Counts, lost: _Counts) -> _Values:
    """Compute two-sided p-values of McNemar's exact test: are both counts equally likely?

    `gained`, `lost`: images that only one network, or only the other, has right; p is 1 if none.
    Source: McNemar 1947, doi:10.1007/BF02295996; parity:
      tests/evaluation/records/test_pairs.py against SciPy's binomtest.
    """
    from scipy.special import bdtr  # JAX depends on SciPy; its import takes 0.1 s

    smaller, both = np.minimum(gained, lost), np.add(gained, lost)
    values: np.ndarray = np.minimum(2 * bdtr(smaller.astype(float), both, 0.5), 1.0)
    return values


def paired_t(differences: Float64[np.ndarray, " N"]) -> float:
    """Compute the two-sided p-value of the paired t test: is the mean of differences 0?

    `differences`: between two networks' shares on each image; p is 1.0 if all are 0.
    Source: Student 1908, doi:10.2307/2331554; parity:
      tests/evaluation/records/test_pairs.py against SciPy's ttest_rel.
    """
    from scipy.special import stdtr

    n = len(differences)
    if n < 2 or not differences.any():
        return 1.0
    error = float(differences.std(ddof=1)) / n**0.5
    return 0.0 if error == 0 else float(2 * stdtr(n - 1, -abs(float(differences.mean())) / error))


def difference_interval(
    gained: _Counts, lost: _Counts, n: _Counts, level: float = 0.95
) -> tuple[_Values, _Values]:
    """Compute Tango's score interval of the difference (gained - lost) / n of paired proportions.

    Args:
      gained, lost: images that only the second, or only the first, has right.
      n: all images, including those on which both agree.
    Returns:
      (low, high), inside [-1, 1]: the differences that a score test at 1 - `level` accepts.
    Source: Tango 1998, doi:10.1002/(SICI)1097-0258(19980430)17:8<891::AID-SIM780>3.0.CO;2-B;
      parity: tests/evaluation/records/test_pairs.py against values of R's contingencytables and
      PropCIs.
    """
    if not 0 < level < 1:
        raise ValueError(f"level={level} is not a probability; 95% is 0.95")
    if not ((gained >= 0) & (lost >= 0) & (gained + lost <= n) & (n > 0)).all():
        raise ValueError("pass counts with 0 <= gained, 0 <= lost, gained + lost <= n and n > 0")
    from scipy.special import ndtri

    share = (gained - lost) / n
    ends = []
    for edge, limit in ((-1.0, ndtri((1 + level) / 2)), (1.0, ndtri((1 - level) / 2))):
        inside, outside = share, np.full(share.shape, edge)
        for _ in range(_HALVINGS):
            middle = (inside + outside) / 2
            score = _score(middle, gained, lost, n)
            stands = score < limit if edge < 0 else score > limit
            inside = np.where(stands, middle, inside)
            outside = np.where(stands, outside, middle)
        ends.append((inside + outside) / 2)
    return ends[0], ends[1]


def _score(difference: Any, gained: Any, lost: Any, n: Any) -> Any:
    """Compute Tango's statistic: standard errors between a hypothetical difference and the data."""
    # The standard error uses the likeliest probabilities of `gained` and `lost` with that
    # difference; the probability of `lost` is the larger root of a quadratic equation.
    half = (gained + lost - (2 * n - gained + lost) * difference) / (4 * n)
    product = lost * difference * (1 - difference) / (2 * n)
    least = half + np.sqrt(np.maximum(half**2 + product, 0))
    variance = n * (2 * least + difference * (1 - difference))
    with np.errstate(divide="ignore", invalid="ignore"):  # if the data lie at an edge
        return (gained - lost - n * difference) / np.sqrt(np.maximum(variance, 0))


def images_needed(paired: Paired, level: float = 0.95, power: float = 0.8) -> int | None:
    """Estimate the number of images needed to tell two networks apart; None if they are equal.

    Args:
      paired: plain numbers; the shares of `gained` and `lost` are assumed to be true.
      level: 1 minus the probability of telling equal networks apart.
      power: the probability of telling different networks apart.
    Source: Connor 1987, doi:10.2307/2531961; parity:
      tests/evaluation/records/test_pairs.py by simulation.
    """
    if paired.gained == paired.lost:
        return None
    from scipy.special import ndtri

    apart, difference = (paired.gained + paired.lost) / paired.n, abs(paired.difference)
    errors = ndtri((1 + level) / 2) * apart**0.5 + ndtri(power) * (apart - difference**2) ** 0.5
    return math.ceil(float((errors / difference) ** 2))


def holm(p: _Values) -> _Values:
    """Correct p-values for multiple comparisons by Holm's method.

    With probability at least 95%, none of those below 0.05 is a false alarm, however the
    comparisons depend on each other.

    Source: Holm 1979, Scandinavian Journal of Statistics 6, 65-70; parity:
      tests/evaluation/records/test_pairs.py against values of statsmodels 0.15.
    """
    order = np.argsort(p)
    scaled = p[order] * np.arange(len(p), 0, -1)
    corrected = np.empty(len(p))
    corrected[order] = np.minimum(np.maximum.accumulate(scaled), 1.0)
    return corrected


def compare(first: Bool[np.ndarray, " n"], second: Bool[np.ndarray, " n"]) -> Paired:
    """Compare two lists of verdicts on the same images, n > 0; right is True."""
    one = compare_groups(first, second, np.zeros(len(first), int))[1]
    return Paired(*(column[0].item() for column in one))


def compare_groups(
    first: Bool[np.ndarray, " n"], second: Bool[np.ndarray, " n"], groups: Shaped[np.ndarray, " n"]
) -> tuple[Shaped[np.ndarray, " G"], Paired]:
    """Compare two lists of verdicts by group; return the G groups in order, and arrays [G]."""
    names, of = np.unique(groups, return_inverse=True)

    def count(marks: np.ndarray) -> np.ndarray:
        return np.bincount(of, marks, len(names)).astype(int)

    n, gained, lost = count(np.ones(len(of))), count(second & ~first), count(first & ~second)
    low, high = difference_interval(gained, lost, n)
    difference = (gained - lost) / n
    p = mcnemar(gained, lost)
    return names, Paired(n, count(first), count(second), gained, lost, difference, low, high, p)


def compare_sequences(
    first: Shaped[np.ndarray, " n"], second: Shaped[np.ndarray, " n"], alpha: float = 0.05
) -> Paired:
    """Compare two lists of verdicts bool[n], n > 0, in random order, valid at any stopping time.

    The interval is `sequences.difference_bounds` for an unlimited population of images; p is the
    inverse of the largest e-value. Under equality it is below alpha at any look with a probability
    of at most alpha.
    """
    differences = second.astype(np.int8) - first.astype(np.int8)
    grown = sequences.evidence(*(np.cumsum(differences == sign) for sign in (1, -1)))
    low, high = sequences.difference_bounds(differences, _MANY, alpha)
    p = min(1.0, math.exp(-float(grown.max())))
    return compare(first, second)._replace(low=low, high=high, p=p)
