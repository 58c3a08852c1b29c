"""Tests of two groups of networks: over their common images, and over their seeds."""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float64


class Over(NamedTuple):
    """A difference of means, second minus first, with its interval and p-value."""

    difference: float
    low: float  # ends of the interval
    high: float
    p: float


def over_images(
    first: Bool[np.ndarray, "S N"], second: Bool[np.ndarray, "T N"], level: float = 0.95
) -> Over:
    """Compare two groups of fixed networks: would other images give the same answer?

    For each image, each group has a share of networks that are right. If the groups were alike,
    each difference of shares would be as likely to have the other sign; p is the exact probability,
    over all 2^N choices of signs, that the sum lies at least as far from 0. With one network in
    each group it is McNemar's exact test. The interval is Student's, over images.

    Args:
      first, second: verdicts of the S and T networks on the same N > 1 images; right is True.
      level: confidence level of the interval.
    Source: Fisher 1935, The Design of Experiments, section 21; parity:
      tests/results/test_groups.py against all choices of signs, SciPy's permutation test and
      McNemar's.
    """
    from scipy.special import stdtrit

    many, others = len(first), len(second)
    scale = math.lcm(many, others)
    steps = second.sum(0) * (scale // others) - first.sum(0) * (scale // many)
    total, n = int(steps.sum()), steps.size
    difference = steps / scale
    error = float(difference.std(ddof=1)) / n**0.5
    reach = float(stdtrit(n - 1, (1 + level) / 2)) * error
    middle = total / (n * scale)
    return Over(middle, middle - reach, middle + reach, _sign_flips(np.abs(steps), total))


def _sign_flips(sizes: np.ndarray, total: int) -> float:
    """Compute the probability that a sum of +-`sizes`, i64[N], is at least |`total`| from 0.

    The sum has the law of 2 S - sum(sizes), where S includes each size with probability 1/2. The
    law of S is computed exactly, size by size.
    """
    law = np.ones(1)
    for size in sizes[sizes > 0].tolist():
        longer = np.zeros(len(law) + size)
        longer[: len(law)] += 0.5 * law
        longer[size:] += 0.5 * law
        law = longer
    sums = 2 * np.arange(len(law)) - int(sizes.sum())
    return float(min(law[np.abs(sums) >= abs(total)].sum(), 1.0))


def over_seeds(
    first: Float64[np.ndarray, " S"], second: Float64[np.ndarray, " T"], level: float = 0.95
) -> Over | None:
    """Compare two groups by their accuracies: would other seeds give the same answer?

    Args:
      first, second: the accuracies of the networks of each group, on the same images.
      level: confidence level of the interval.
    Returns:
      The difference with Welch's t interval and test. None if a group has only one network, or if
      the networks of each group are equal: then nothing shows how far seeds scatter.
    Source: Welch 1947, doi:10.1093/biomet/34.1-2.28; parity: tests/results/test_groups.py against
      SciPy's ttest_ind.
    """
    from scipy.special import stdtr, stdtrit

    if min(len(first), len(second)) < 2:
        return None
    parts = [float(values.var(ddof=1)) / len(values) for values in (first, second)]
    variance = sum(parts)
    if not variance:
        return None
    counts = (len(first), len(second))
    squares = sum(part**2 / (count - 1) for part, count in zip(parts, counts, strict=True))
    freedom = variance**2 / squares
    difference, error = float(second.mean() - first.mean()), variance**0.5
    reach = float(stdtrit(freedom, (1 + level) / 2)) * error
    p = 2 * float(stdtr(freedom, -abs(difference) / error))
    return Over(difference, difference - reach, difference + reach, p)
