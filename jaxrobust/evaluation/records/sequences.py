"""Verdicts in random order: bounds for all images that hold at any look.

A test for a fixed number of images errs far more often than its level if it is repeated until it
succeeds. The evidence below holds at all looks together, however they are chosen. The images of an
evaluation are a finite set, sampled in random order without replacement. The bounds are for the
accuracies on all of them.

Source: Lindon & Malek 2022 (arXiv 2011.03567) for paired counts; Waudby-Smith & Ramdas 2020
  (arXiv 2006.04347, Section 3) and 2023 (arXiv 2010.09686, Sections 4 and 5) for sampling without
  replacement and betting; Howard et al. 2021 (arXiv 1810.08240, Section 3) for boundaries that are
  tuned for one number of images.
"""

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Shaped

_Looks = Shaped[np.ndarray, "..."]  # whole numbers, of many looks at once
_LookValues = Any  # float64, of as many looks

PRIOR = 2.0  # both shapes of the Beta prior of a discordant image's side: see `evidence`
_TUNED = 1000  # images at which a sequence is narrowest, unless it has a target width
# Scales of the alternatives, as multiples of the number of images they are best for, with their
# weights. A sequence of the middle scale alone is 3% narrower there, and far wider elsewhere.
_SCALES = ((0.25, 0.1), (1.0, 0.8), (4.0, 0.1))
_LARGEST_BET = 0.45  # below 1/2 one image cannot lose all winnings: values lie at most 2 apart
_STEP = 60  # images of the first lots: just below a power of two, to fill the slots
_SHARE = 16  # a later lot is at most this fraction of the images before it


def order(seed: int, ids: Sequence[int]) -> Shaped[np.ndarray, " N"]:
    """Order N images by hashes of the seed and their ids; return their places, i[N].

    It depends on nothing else, such as NumPy's version. A subset of the images keeps its order in
    the full set.
    """
    keys = [hashlib.sha256(f"order {seed} {number}".encode()).digest() for number in ids]
    return np.array(sorted(range(len(keys)), key=keys.__getitem__), np.int64)


def lots(of: int) -> list[int]:
    """List the numbers of images at each look: every 60, later after every sixteenth more."""
    ends = [0]
    while ends[-1] < of:
        ends.append(ends[-1] + max(_STEP, ends[-1] // _SHARE // _STEP * _STEP))
    return [min(end, of) for end in ends[1:]]


def evidence(gained: _Looks, lost: _Looks) -> _LookValues:
    """Compute the logarithm of the e-value that discordant images favour one of two networks.

    It is the likelihood ratio of their sides under a Beta(2, 2) mixture to a fair coin, two-sided
    because the prior is symmetric. If the networks are equally accurate on the images or on the
    population they were drawn from, exp(evidence) ever reaches 1 / alpha with a probability of at
    most alpha (Ville's inequality). Beta(2, 2) was chosen by simulation with 10% of 5,000 images
    discordant. There shapes from 1 to 4 decide a difference of 3 points about equally early, and
    larger shapes decide a difference of 5 points later.

    Args:
      gained, lost: images so far that only the second, or only the first, has right.
    Parity: tests/evaluation/records/test_sequential.py, by numerical integration.
    """
    from scipy.special import betaln  # JAX depends on SciPy; its import takes 0.1 s

    mixed = betaln(np.add(PRIOR, gained), np.add(PRIOR, lost)) - betaln(PRIOR, PRIOR)
    return mixed + np.add(gained, lost) * math.log(2)


def accuracy_evidence(
    right: _Looks, n: _Looks, total: Any, of: int, alpha: float, width: float | None = None
) -> _LookValues:
    """Compute the logarithm of the e-value against `total` right images among all `of`.

    It is a mixture of likelihood ratios of the hypergeometric distribution, each for an alternative
    total above or below; arrays are broadcast. Impossible totals have infinite evidence.

    Args:
      right, n: right images among the first `n` of the random order.
      alpha: level that the alternatives are tuned for.
      width: target width of the interval, a share; None: narrowest at 1,000 images.
    Parity: tests/evaluation/records/test_sequential.py: coverage, and its mean for short sequences.
    """
    total, right, n = (np.asarray(values, np.float64) for values in (total, right, n))
    of_total = _log_likelihood(total, right, n, of)
    mixed: Any = -np.inf
    with np.errstate(invalid="ignore"):
        for scale, weight in _SCALES:
            for other in _alternatives(total, of, alpha, width, scale):
                ratio = _log_likelihood(other, right, n, of) - of_total
                mixed = np.logaddexp(mixed, ratio + math.log(weight / 2))
    return np.where(np.isneginf(of_total), np.inf, mixed)


def _alternatives(
    total: _LookValues, of: int, alpha: float, width: float | None, scale: float
) -> tuple[_LookValues, _LookValues]:
    """Choose the totals below and above that a boundary tuned for a number of images compares."""
    # For a target width they are half of it away. Otherwise the distance is on the arcsine square-
    # root scale, on which proportions have equal variance.
    if width is not None:
        away = of * width / 2 / math.sqrt(scale)
        low, high = total - away, total + away
    else:
        angle = np.arcsin(np.sqrt(total / max(of, 1)))
        turn = _boundary(alpha) / (2 * math.sqrt(scale * _effective(of)))
        low = of * np.sin(np.maximum(angle - turn, 0)) ** 2
        high = of * np.sin(np.minimum(angle + turn, math.pi / 2)) ** 2
    low, high = np.minimum(np.round(low), total - 1), np.maximum(np.round(high), total + 1)
    return np.clip(low, 0, of), np.clip(high, 0, of)


def _log_likelihood(total: _LookValues, right: _LookValues, n: _LookValues, of: int) -> _LookValues:
    """Compute the log-probability of one order of right and wrong images, up to a constant."""
    from scipy.special import gammaln

    wrong = n - right
    with np.errstate(invalid="ignore", divide="ignore"):
        ways = gammaln(total + 1) - gammaln(total - right + 1)
        ways = ways + gammaln(of - total + 1) - gammaln(of - total - wrong + 1)
    return np.where((total >= right) & (of - total >= wrong), ways, -np.inf)


def accuracy_bounds(
    right: int, n: int, of: int, alpha: float, width: float | None = None
) -> tuple[float, float]:
    """Bound the share of right images among all `of` after `n`; see `accuracy_evidence`.

    It holds at all looks together with probability at least 1 - alpha; after all images both ends
    equal the observed share.
    """
    if not of:
        return 0.0, 1.0
    totals = np.arange(of + 1)
    against = accuracy_evidence(np.array(right), np.array(n), totals, of, alpha, width)
    stands = np.flatnonzero(against < -math.log(alpha))
    return float(stands[0]) / of, float(stands[-1]) / of


def difference_evidence(
    differences: Shaped[np.ndarray, "... n"],
    total: float,
    of: int,
    alpha: float,
    tie: float | None = None,
) -> tuple[_LookValues, _LookValues]:
    """Compute evidence that differences over all images sum to more than `total`, and to less.

    Both are the log-capital, after each of n images, of a gambler who bets on every next image;
    the stakes depend only on earlier images.

    Args:
      differences: of verdicts, second minus first, -1, 0 or 1, in the random order.
      tie: the share within which the true difference should be shown to lie; stakes are tuned for
        it, or if None for 1,000 images.
    """
    values = np.asarray(differences, np.float64)
    count = np.arange(values.shape[-1])  # images before each
    to_come = of - count  # images left, including this one
    sums = np.cumsum(values, axis=-1) - values  # over the images before
    squares = np.cumsum(values**2, axis=-1) - values**2
    variances = np.maximum((0.25 + squares - sums**2 / np.maximum(count, 1)) / (1 + count), 1e-3)
    stakes = _boundary(alpha) / np.sqrt(variances * _effective(of))
    if tie is not None:
        stakes = tie / variances
    expected = (total - sums) / to_come
    more, less = np.full((2, *values.shape), -np.inf)
    with np.errstate(invalid="ignore", divide="ignore"):
        for scale, weight in _SCALES:
            stake = np.minimum(stakes / math.sqrt(scale) * of / to_come, _LARGEST_BET)
            won = stake * (values - np.clip(expected, -1, 1))
            more = np.logaddexp(more, np.cumsum(np.log1p(won), axis=-1) + math.log(weight))
            less = np.logaddexp(less, np.cumsum(np.log1p(-won), axis=-1) + math.log(weight))
    needed = (total - sums - values) / np.maximum(to_come - 1, 1)  # mean over the later images
    needed = np.where(to_come > 1, needed, np.sign(total - sums - values) * 2)  # no later images
    more = np.where(np.maximum.accumulate(needed < -1, axis=-1), np.inf, more)
    less = np.where(np.maximum.accumulate(needed > 1, axis=-1), np.inf, less)
    return more, less


def difference_bounds(
    differences: Shaped[np.ndarray, " n"], of: int, alpha: float, tie: float | None = None
) -> tuple[float, float]:
    """Bound the difference of two accuracies on all `of` images; see `difference_evidence`.

    It holds at all looks together with probability at least 1 - alpha: alpha / 2 for each end.
    Values excluded after any image stay excluded.
    """
    if not len(differences):
        return -1.0, 1.0
    enough = math.log(2 / alpha)

    def stands(total: int, side: int) -> bool:
        return bool(difference_evidence(differences, total, of, alpha, tie)[side].max() < enough)

    middle = round(float(np.mean(differences)) * of)
    low = _edge(lambda total: stands(total, 0), inside=middle, outside=-of - 1)
    high = _edge(lambda total: stands(total, 1), inside=middle, outside=of + 1)
    return low / of, high / of


def _edge(stands: Any, *, inside: int, outside: int) -> int:
    """Find the last total that stands, between `inside`, which does, and `outside`."""
    while abs(outside - inside) > 1:
        middle = (inside + outside) // 2
        inside, outside = (middle, outside) if stands(middle) else (inside, middle)
    return inside


def _boundary(alpha: float) -> float:
    """Compute the half width of a linear boundary at its narrowest point, in standard errors."""
    return math.sqrt(2 * math.log(2 / alpha))


def _effective(of: int) -> float:
    """Compute how many independent images are worth as much as those a sequence is tuned for."""
    tuned = min(_TUNED, of / 2)  # half, if there are fewer than twice as many
    return tuned / (1 - tuned / of)
