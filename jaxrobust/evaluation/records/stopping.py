"""When an evaluation can stop, and bounds from a sample for images that were not attacked."""

import hashlib
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Shaped

from jaxrobust.evaluation.records import sequences
from jaxrobust.evaluation.records.record import FastSample, Interval, StoppedSequence
from jaxrobust.evaluation.records.verdicts import HashedImages, Verdicts, other_images

AHEAD, TIE, WIDTH, ENDED = "ahead", "tie", "width", "images"  # the rule that stopped an evaluation
RULES = (AHEAD, TIE, WIDTH, ENDED)
_LARGEST = 300.0  # maximum decimal exponent of an e-value


class StopRule(NamedTuple):
    """Decides when an evaluation stops, by evidence that is valid at any time.

    Either `width` or `against` is given. Shares are fractions: two points are 0.02.
    """

    width: float | None = None  # stop when the robust accuracy's interval is narrower
    against: Verdicts | None = None  # stop when one of two networks is ahead on these images
    tie: float | None = None  # or when their accuracies differ by less than this
    alpha: float = 0.05  # error probability of each claim, over all looks

    def check(self, ids: np.ndarray, labels: np.ndarray, hashes: np.ndarray | None = None) -> None:
        """Raise `ValueError` if the rule is invalid for images with these ids and labels.

        `hashes` of the images are as in `Verdicts`; None means unknown.
        """
        if not 0 < self.alpha < 1:
            raise ValueError(
                f"alpha={self.alpha:g} must be a probability of a false alarm between 0 and 1, "
                "such as 0.05"
            )
        if (self.width is None) == (self.against is None):
            raise ValueError("a rule needs a width or verdicts to compare with; give one of them")
        if self.tie is not None and (self.against is None or not 0 < self.tie < 1):
            fault = "needs verdicts to compare with" if self.against is None else "is not a share"
            raise ValueError(f"tie={self.tie:g} {fault}; give a share such as 0.01, with `against`")
        if not len(ids):
            raise ValueError("there are no images to evaluate; pass at least one")
        if self.width is not None:
            check_width(self.width, len(ids))
        if self.against is None:
            return
        common, *at = np.intersect1d(self.against.image_ids, ids, return_indices=True)
        if not len(common):
            raise ValueError("the verdicts to compare with cover none of these images")
        if wrong := int((self.against.labels[at[0]] != labels[at[1]]).sum()):
            raise ValueError(
                f"the verdicts to compare with have different labels on {wrong} of {len(common)} "
                "images"
            )
        words = (
            "" if hashes is None else other_images(self.against.images, HashedImages(ids, hashes))
        )
        if words:
            raise ValueError(
                f"the verdicts to compare with are for different images: {words}; pass verdicts on "
                "these images"
            )

    def places(self, seed: int, ids: np.ndarray) -> np.ndarray:
        """Order the places of the available images, i[M]; with `against`, only images it has."""
        places = sequences.order(seed, ids.tolist())
        if self.against is None:
            return places
        return places[np.isin(ids[places], self.against.image_ids)]

    def settings(self) -> dict[str, Any]:
        """Return the settings that identify this rule, as plain values."""
        settings = {"alpha": self.alpha, "until_width": self.width, "tie": self.tie}
        if self.against is None:
            return settings
        columns = (self.against.image_ids, self.against.robust)
        digest = hashlib.sha256(b"".join(np.ascontiguousarray(c).tobytes() for c in columns))
        return settings | {"against_sha256": digest.hexdigest()}

    def bounds(self, right: int, n: int, of: int) -> Interval:
        """Bound an accuracy on all available images after n of them."""
        return list(sequences.accuracy_bounds(right, n, of, self.alpha, self.width))

    def look(
        self, ids: np.ndarray, clean: np.ndarray, robust: np.ndarray, of: int
    ) -> StoppedSequence:
        """Summarise the state after n images; `rule` is set if a rule stops or no images are left.

        Args:
          ids: u32[n], of the images so far, in the random order.
          clean, robust: bool[n], their verdicts.
          of: total number of available images.
        """
        n = len(ids)
        sequence: StoppedSequence = {"stopped_after": n, "of": of, "alpha": self.alpha}
        if self.against is not None:
            sequence["against_sha256"] = self.settings()["against_sha256"]
        sequence["clean"] = self.bounds(int(clean.sum()), n, of)
        sequence["robust"] = self.bounds(int(robust.sum()), n, of)
        if self.width is not None:
            low, high = sequence["robust"]
            sequence["until_width"] = self.width
            rule = WIDTH if high - low < self.width else None
        else:
            rule = self._compare(sequence, ids, robust, of)
        if rule is None and n == of:
            rule = ENDED
        if rule is not None:
            sequence["rule"] = rule
        return sequence

    def _compare(
        self, sequence: StoppedSequence, ids: np.ndarray, robust: np.ndarray, of: int
    ) -> str | None:
        """Add the comparison of paired verdicts; return the rule that decides, or None."""
        assert self.against is not None
        order = np.argsort(self.against.image_ids)
        at = order[np.searchsorted(self.against.image_ids, ids, sorter=order)]
        differences = robust.astype(np.int8) - self.against.robust[at]
        gained, lost = (np.cumsum(differences == sign) for sign in (1, -1))
        grown = sequences.evidence(gained, lost)
        sequence["gained"], sequence["lost"] = int(gained[-1]), int(lost[-1])
        sequence["e_value"] = 10 ** min(float(grown.max()) / math.log(10), _LARGEST)
        ends = sequences.difference_bounds(differences, of, self.alpha, self.tie)
        sequence["difference"] = list(ends)
        if self.tie is not None:
            sequence["tie"] = self.tie
        hits = np.flatnonzero(grown >= -math.log(self.alpha))
        if len(hits):
            sequence["leads"] = "this" if gained[hits[0]] > lost[hits[0]] else "other"
            return AHEAD
        if self.tie is None:
            return None
        total = math.ceil(self.tie * of - 1e-9)  # 1% of 5,000 is 50, whatever the rounding
        tuned = (of, self.alpha, self.tie)
        below = sequences.difference_evidence(differences, total, *tuned)[1].max()
        above = sequences.difference_evidence(differences, -total, *tuned)[0].max()
        return TIE if min(below, above) >= math.log(2 / self.alpha) else None


def check_width(width: float, images: int) -> None:
    """Raise `ValueError` if the accuracy on this many images cannot reach a width."""
    if not 0 < width < 1:
        raise ValueError(f"the width must be between 0 and 100 points, not {100 * width:g}")
    if width * images <= 1:
        raise ValueError(
            f"a width of {100 * width:g} points is too narrow for {images} images, each "
            f"worth {100 / images:.3g} points; evaluate more images, or give a larger width"
        )


def bounds_of(stopped: StoppedSequence, accuracy: float) -> Interval:
    """Bound another accuracy of a stopped evaluation, such as after one of its attacks."""
    n, of = stopped["stopped_after"], stopped["of"]
    aim = (stopped["alpha"], stopped.get("until_width"))
    return list(sequences.accuracy_bounds(round(accuracy * n), n, of, *aim))


def line(stopped: StoppedSequence) -> str:
    """Describe when and why an evaluation stopped, and the bounds of its sequence."""
    n, of, level = stopped["stopped_after"], stopped["of"], 100 * (1 - stopped["alpha"])
    head = "stopped after" if "rule" in stopped else "looked at"
    text = f"{head} {n:,} of {of:,} images: {why(stopped)}; robust accuracy on all {of:,} is "
    text += f"{between(stopped['robust'])} at any stopping time ({level:g}% confidence sequence)"
    if "difference" not in stopped:
        return text
    against = stopped.get("against") or {}
    other = f" from evaluation {against['evaluation']}" if against.get("evaluation") else ""
    return (
        f"{text}; the difference{other} is {between(stopped['difference'])}, "
        f"{stopped['gained']} gained, {stopped['lost']} lost, e-value {stopped['e_value']:.3g}"
    )


def why(stopped: StoppedSequence) -> str:
    """Describe the rule that stopped an evaluation, and its finding."""
    return {
        AHEAD: f"{'this' if stopped.get('leads') == 'this' else 'the other'} network is ahead",
        TIE: f"they differ by less than {100 * (stopped.get('tie') or 0):g} points",
        WIDTH: f"the interval is narrower than {100 * (stopped.get('until_width') or 0):g} points",
        ENDED: "all images were evaluated without a decision",
        None: "not decided yet",
    }[stopped.get("rule")]


def between(ends: Sequence[float]) -> str:
    """Format an interval in per cent."""
    return f"{100 * ends[0]:.1f} to {100 * ends[1]:.1f}%"


FAST_METHOD = "fast version"  # method of records, instead of AutoAttack's name
FAST_LEVEL = 0.95  # confidence of the one-sided bound


def draw_survivors(
    seed: int, ids: Shaped[np.ndarray, " N"], survivors: Bool[np.ndarray, " N"], count: int
) -> Bool[np.ndarray, " N"]:
    """Choose `count` survivors at random: the first in an order given by the seed and the ids."""
    order = sequences.order(seed, ids.tolist())
    chosen = np.zeros(len(ids), bool)
    chosen[order[survivors[order]][:count]] = True
    return chosen


def most_fooled(fooled: int, sampled: int, of: int, level: float = FAST_LEVEL) -> int:
    """Bound from above how many of `of` images would be fooled, after `fooled` of `sampled`.

    The sample is drawn without replacement, so the count in it is hypergeometric. The bound is the
    largest total for which `fooled` or fewer in the sample have a probability above 1 - `level`.
    It holds with probability at least `level` for every true total, and includes the `fooled`
    images.

    >>> most_fooled(0, 59, 10**6), most_fooled(0, 50, 100), most_fooled(3, 20, 20)
    (49501, 4, 3)
    """
    if not 0 <= fooled <= sampled <= of:
        raise ValueError(f"fooled={fooled}, sampled={sampled}, of={of}; pass ascending counts >= 0")
    if not 0 < level < 1:
        raise ValueError(f"level={level:g} is not a probability; 95% is 0.95")
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


def fast_sample(images: int, survivors: int, sampled: int, fallen: Sequence[int]) -> FastSample:
    """Build a record's facts about the sample, in which images with ids `fallen` fell.

    The bound is for the survivors that were not drawn.
    """
    fooled = len(fallen)
    most = most_fooled(fooled, sampled, survivors)
    return {
        "survivors": survivors,
        "sampled": sampled,
        "fooled": fooled,
        "fallen": list(fallen),
        "at_most": most - fooled,
        "level": FAST_LEVEL,
        "robust_at_least": (survivors - most) / max(images, 1),
    }


def fast_line(fast: FastSample) -> str:
    """Describe the result of the sample, and warn that this is not an AutoAttack result."""
    head = (
        "these verdicts come from the fast version, not from AutoAttack: "
        f"all remaining attacks of the standard version were run on {fast['sampled']:,} of "
        f"{fast['survivors']:,} survivors, chosen at random, and fooled {fast['fooled']:,}"
    )
    return (
        f"{head}; with {100 * fast['level']:g}% confidence, at most {fast['at_most']:,} of the "
        f"others would be fooled too, so robust accuracy is at least {fast_bound(fast)}; --finish "
        "computes the exact value"
    )


def fast_bound(fast: FastSample) -> str:
    """Format the bound on the accuracy, rounded down."""
    return f"{math.floor(1e4 * fast['robust_at_least'] + 1e-6) / 100:.2f}%"
