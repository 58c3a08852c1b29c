"""What forward passes say about the claims of a bundle, judged with NumPy alone.

For a bundle of attacks, passes on all misclassified, fooled and standing images confirm its clean
accuracy. They also confirm that the robust accuracy on these images is at most what its record
says. For common corruptions all answers are checked, which confirms the accuracies exactly. The
text of this module is part of the program in every bundle.
"""

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxrobust.evaluation.bundles.claims import (
    BOUNDARY,
    Bundle,
    Logits,
    image_sha256,
    is_right,
    margin,
    outside,
    pixels,
    point_of,
    withstood,
)
from jaxrobust.evaluation.bundles.contradictions import CLEAN, Rows, interval, kind, lacking, rights

SHOWN = 8  # images that a line names
# Why an image is not confirmed, worded for people; the keys are those of `unconfirmed`.
WHY = {
    "missing": "not among the given images",
    "other image": "not the image that was evaluated",
    "other label": "a label that differs from the data set's",
    "outside the range": "an adversarial image outside [0, 1]",
    "outside the ball": "an adversarial image outside the ball",
    "no numbers": "logits that are not finite",
    "at the boundary": "classified correctly here, by a margin within float32 rounding",
    "right": "classified correctly here",
    "wrong": "claimed correct without an attack, but misclassified here",
    "other answer": "a different answer here",
}
_KINDS_OF_ROWS = {
    "misclassified": "misclassified without an attack",
    "fooled": "fooled",
    "standing": "surviving, classified correctly without an attack",
}
_REACH = 0.9  # of the radius: at least half of an attack's points lie beyond
_TURNED = 1e-4  # share of answers that another order of float32 sums may change
_Z = 1.959963984540054  # of 95%, two-sided


# Corruption or "clean", ids, all below `count`, -> f32[n,H,W,C] in [0, 1].
Images = Callable[[str, Sequence[int]], np.ndarray]


class ClaimFindings(NamedTuple):
    """The result of forward passes on the images of a bundle of attacks."""

    images: int  # of the claim
    claimed: dict[str, int]  # counts of "misclassified", "fooled" and "standing"
    confirmed: dict[str, int]  # standing: classified correctly without an attack
    unconfirmed: dict[str, list[int]]  # why -> ids
    fallen: int  # images that the network misclassifies, clean or in the ball
    reach: list[float]  # distances of the points, as shares of the radius
    split_images: int  # images of the split that the verifier has
    labels: str  # "compared" with the data set's; "trusted" on request; "unchecked"

    @property
    def standing(self) -> int:
        """Count the images that may still be robust."""
        return self.images - self.fallen

    @property
    def short(self) -> str | None:
        """Report that the points do not use the radius; None if they do, or without points."""
        near = [share for share in self.reach if share < _REACH]
        if 2 * len(near) <= len(self.reach):
            return None
        return (
            f"the points do not use the claimed radius: {len(near):,} of {len(self.reach):,} "
            f"lie within {_REACH:.0%} of it, and the farthest reaches {max(self.reach):.0%}"
        )

    @property
    def every(self) -> bool:
        """Tell whether everything but the labels is confirmed."""
        return self.confirmed == self.claimed and not self.unconfirmed and not self.short

    @property
    def whole(self) -> bool:
        """Tell whether everything is confirmed, labels included, or these are trusted."""
        return self.every and self.labels != "unchecked"

    def plain(self) -> dict[str, Any]:
        """Return all facts for JSON, with the confirmed bound and its exact interval."""
        return {
            **self._asdict(),
            "reach": max(self.reach, default=None),
            "whole": self.whole,
            "robust_at_most": self.standing / self.images,
            "interval": interval(self.standing, self.images),
        }


class CorruptionFindings(NamedTuple):
    """The result of forward passes on the answers that a bundle of corruptions claims."""

    images: int  # of the claim
    answers: int  # of these images under all corruptions
    confirmed: int  # answers that are right, or wrong, here too
    undecided: int  # answers that differ here by no more than float32 rounding
    unconfirmed: dict[str, list[int]]  # why -> ids of images
    split_images: int  # images of the split that the verifier has
    labels: str  # as in `ClaimFindings`
    mean: float  # accuracy over all corruptions, according to the bundle
    interval: tuple[float, float]  # of `mean`, 95%, over images

    @property
    def every(self) -> bool:
        """Tell whether everything but the labels is confirmed."""
        return self.confirmed + self.undecided == self.answers and not self.unconfirmed

    @property
    def whole(self) -> bool:
        """Tell whether everything is confirmed, labels included, or these are trusted."""
        return self.every and self.labels != "unchecked"

    def plain(self) -> dict[str, Any]:
        """Return all facts for JSON."""
        return {**self._asdict(), "whole": self.whole}


Findings = ClaimFindings | CorruptionFindings


def judge(
    bundle: Bundle,
    images: Images,
    logits: Logits,
    *,
    count: int,
    labels: np.ndarray | None = None,
    trust_labels: bool = False,
    batch: int = 50,
    tell: Callable[[str], None] = lambda line: None,
) -> Findings:
    """Compute the logits of all images in a bundle, and compare them with its claims.

    Args:
      count: number of images in the split; their ids are 0 to `count` - 1.
      labels: of the data set, i[count]; None: they are not compared.
      tell: called with a line of progress about every ten seconds.
    """
    reasons = {row["image"]: "missing" for row in bundle.rows if not 0 <= row["image"] < count}
    if labels is not None:
        here = [row for row in bundle.rows if row["image"] not in reasons]
        other = [row["image"] for row in here if int(labels[row["image"]]) != row["label"]]
        reasons |= dict.fromkeys(other, "other label")
    todo = [row for row in bundle.rows if row["image"] not in reasons]
    under = f" under {len(bundle.about['corruptions'])} corruptions" if bundle.corrupted else ""

    def batches() -> Iterator[Rows]:
        announced = time.monotonic()
        for start in range(0, len(todo), batch):
            yield todo[start : start + batch]
            if time.monotonic() - announced > 10:
                announced = time.monotonic()
                tell(f"{min(start + batch, len(todo))} of {len(todo)} images{under}")

    compare = _compared_answers if bundle.corrupted else _compared_points
    counts = compare(bundle, images, logits, batches(), reasons)
    listed = {why: sorted(i for i in reasons if reasons[i] == why) for why in WHY}
    findings = CorruptionFindings if bundle.corrupted else ClaimFindings
    return findings(
        **counts,
        images=len(bundle.rows),
        unconfirmed={why: ids for why, ids in listed.items() if ids},
        split_images=count,
        labels="compared" if labels is not None else "trusted" if trust_labels else "unchecked",
    )


def _compared_points(
    bundle: Bundle, images: Images, logits: Logits, batches: Iterator[Rows], reasons: dict[int, str]
) -> dict[str, Any]:
    """Check clean and adversarial images; add to `reasons` why any are not confirmed."""
    fallen, reach = 0, []
    for rows in batches:
        clean = np.asarray(images(CLEAN, [row["image"] for row in rows]), np.float32)
        labels = np.array([row["label"] for row in rows])
        for row, image in zip(rows, clean, strict=True):
            if image_sha256(image) != row["sha256"]:
                reasons[row["image"]] = "other image"
        right = np.array([kind(row) != "misclassified" for row in rows])
        hit = [place for place, row in enumerate(rows) if kind(row) == "fooled"]
        usable = {place for place in hit if rows[place]["image"] not in reasons}
        fell = _answered(reasons, rows, labels, right, clean, logits)
        points = np.array(clean[hit])
        for at, place in enumerate(hit):
            if place in usable:
                row = rows[place]
                points[at], share = point_of(bundle, row, clean[place])
                if why := outside(points[at], clean[place], **bundle.threat):
                    reasons[row["image"]] = why
                else:
                    reach.append(share)
        if hit:
            fooled = [rows[place] for place in hit]
            fell[hit] |= _answered(reasons, fooled, labels[hit], ~right[hit], points, logits)
        fallen += int(fell.sum())
    ids: dict[str, set[int]] = {name: set() for name in ("misclassified", "fooled", "standing")}
    for row in bundle.rows:
        ids[kind(row)].add(row["image"])
    return {
        "claimed": {name: len(of) for name, of in ids.items()},
        "confirmed": {name: len(of - reasons.keys()) for name, of in ids.items()},
        "fallen": fallen,
        "reach": reach,
    }


def _compared_answers(
    bundle: Bundle, images: Images, logits: Logits, batches: Iterator[Rows], reasons: dict[int, str]
) -> dict[str, Any]:
    """Check images under all corruptions; add to `reasons` why any are not confirmed."""
    names, confirmed = bundle.about["corruptions"], 0
    turned: dict[int, int] = {}  # image -> answers that differ here, all near the boundary
    for rows in batches:
        ids, labels = [row["image"] for row in rows], np.array([row["label"] for row in rows])
        sums = [hashlib.sha256() for _ in rows]
        same, near = np.zeros((2, len(rows), len(names)), bool)
        for column, (name, claimed) in enumerate(zip(names, rights(rows).T, strict=True)):
            shown = np.asarray(images(name, ids), np.float32)
            for digest, image in zip(sums, shown, strict=True):
                digest.update(pixels(image))
            answers = _answers(logits, shown, ids, labels)
            same[:, column] = is_right(answers, labels) == claimed
            near[:, column] = np.abs(margin(answers, labels)) <= BOUNDARY
            near[:, column] &= np.isfinite(answers).all(axis=1)
        for at, row in enumerate(rows):
            if sums[at].hexdigest() != row["sha256"]:
                reasons[row["image"]] = "other image"
            elif not (same[at] | near[at]).all():
                reasons[row["image"]] = "other answer"
            else:
                confirmed += int(same[at].sum())
                if not same[at].all():
                    turned[row["image"]] = int((~same[at]).sum())
    answers_in_all, undecided = len(bundle.rows) * len(names), sum(turned.values())
    if undecided > max(1, answers_in_all * _TURNED):  # a network can make all its margins small
        reasons |= dict.fromkeys(turned, "other answer")
        confirmed -= len(turned) * len(names) - undecided
        undecided = 0
    shares = withstood(bundle)
    counts = {"answers": answers_in_all, "confirmed": confirmed, "undecided": undecided}
    return {**counts, "mean": float(shares.mean()), "interval": mean_interval(shares)}


def _answers(
    logits: Logits, points: np.ndarray, ids: Sequence[int], labels: np.ndarray
) -> np.ndarray:
    answers = np.asarray(logits(points, ids))
    if answers.ndim != 2 or len(answers) != len(labels) or answers.shape[1] <= labels.max():
        raise ValueError(
            f"the network returns an array {answers.shape} for {len(labels)} images with labels up "
            f"to {labels.max()}; pass a network that returns logits for the evaluation's classes"
        )
    return answers


def _answered(
    reasons: dict[int, str],
    rows: Rows,
    labels: np.ndarray,
    claimed: np.ndarray,
    points: np.ndarray,
    logits: Logits,
) -> np.ndarray:
    """Add to `reasons` images whose answers are not as claimed; mark wrong answers, bool[n]."""
    # Images that already have a reason are not marked.
    answers = _answers(logits, points, [row["image"] for row in rows], labels)
    right, finite = is_right(answers, labels), np.isfinite(answers).all(axis=1)
    near = np.abs(margin(answers, labels)) <= BOUNDARY
    wrong = finite & ~right & [row["image"] not in reasons for row in rows]
    for place, row in enumerate(rows):
        if not finite[place]:
            reasons.setdefault(row["image"], "no numbers")
        elif right[place] and not claimed[place]:
            reasons.setdefault(row["image"], "at the boundary" if near[place] else "right")
        elif claimed[place] and not right[place]:
            reasons.setdefault(row["image"], "wrong")
    return wrong


def mean_interval(shares: np.ndarray) -> tuple[float, float]:
    """Compute the 95% interval of a mean over images f64[N] from their standard error.

    The sampling unit is the image: corruptions of one image are not independent draws.
    """
    error = float(shares.std(ddof=1)) / len(shares) ** 0.5 if len(shares) > 1 else np.inf
    mean = float(shares.mean())
    return max(mean - _Z * error, 0.0), min(mean + _Z * error, 1.0)


def lines(bundle: Bundle, findings: Findings) -> list[str]:
    """Format the claim of a bundle and the findings for people."""
    record, noted = bundle.record, bundle.about.get("split_images")
    split = noted or findings.split_images
    if isinstance(findings, CorruptionFindings):
        head, counts, last = _lines_of_answers(bundle, findings, split)
    else:
        head, counts, last = _lines_of_points(bundle, findings, split)
    name = f"bundle {bundle.number[:12]}: {record['model']['name']}"
    rows = [f"{name}{head[0]}, preprocessing {record['preprocessing']}", f"claim: {head[1]}"]
    if noted not in (None, findings.split_images):
        rows.append(
            f"  the bundle's split has {noted:,} images, but there are "
            f"{findings.split_images:,} here; pass the whole split to confirm this number"
        )
    rows += counts
    for why, ids in findings.unconfirmed.items():
        shown = ", ".join(map(str, ids[:SHOWN])) + ", ..." * (len(ids) > SHOWN)
        rows.append(f"  {_not_confirmed(why, ids)} (image {shown})")
    if isinstance(findings, ClaimFindings) and findings.short:
        rows.append(f"  {findings.short}")
    if missing := lacking(bundle.about):
        rows.append(f"  it lacks {', '.join(missing)}, like bundles from older versions")
    if findings.labels != "compared":
        asked = findings.labels == "trusted"
        trusted = "taken on trust, as requested" if asked else "not confirmed"
        rows.append(f"  the labels come from the bundle and are {trusted}")
    but = "Confirmed except for the labels" if findings.every else "Not confirmed"
    return [*rows, f"{'Confirmed' if findings.whole else but}: {last}"]


def _lines_of_points(
    bundle: Bundle, findings: ClaimFindings, split: int
) -> tuple[tuple[str, str], list[str], str]:
    record, threat, n = bundle.record, bundle.threat, findings.images
    head = (
        f", {record['method']}, {threat['norm']} {threat['epsilon']:.4g}, on {record['dataset']} "
        f"{record['split']}",
        f"at most {record['robust']:.2%} of {n:,} images are robust, from a split of {split:,}",
    )
    counts = [
        f"  {findings.confirmed[key]:,} of {findings.claimed[key]:,} {words}: confirmed"
        for key, words in _KINDS_OF_ROWS.items()
    ]
    low, high = interval(findings.standing, n)
    share = f"{findings.standing / n:.2%} ({findings.standing:,} of {n:,}"
    return (
        head,
        counts,
        (
            f"robust accuracy on these images is at most {share}; 95% interval of this share "
            f"{low:.2%} to {high:.2%})"
        ),
    )


def _lines_of_answers(
    bundle: Bundle, findings: CorruptionFindings, split: int
) -> tuple[tuple[str, str], list[str], str]:
    record = bundle.record
    number = len([name for name in bundle.about["corruptions"] if name != CLEAN])
    clean = "" if record["clean"] is None else f", clean accuracy {record['clean']:.2%}"
    head = (
        f" under {number} common corruptions ({record['corruptions']['images']}), on "
        f"{record['dataset']}",
        f"1 - mean error {findings.mean:.2%}{clean}, on {findings.images:,} of {split:,} images",
    )
    counts = [f"  {findings.confirmed:,} of {findings.answers:,} answers: confirmed"]
    if findings.undecided:
        counts.append(f"  {findings.undecided:,} answers differ here only by float32 rounding")
    low, high = findings.interval
    return (
        head,
        counts,
        (
            f"the accuracy on these images under these corruptions is {findings.mean:.2%} (95% "
            f"interval over images {low:.2%} to {high:.2%})"
        ),
    )


def why_not(findings: Findings) -> list[str]:
    """List the reasons why a claim is not confirmed."""
    reasons = [_not_confirmed(why, ids) for why, ids in findings.unconfirmed.items()]
    short = findings.short if isinstance(findings, ClaimFindings) else None
    return [*reasons, short] if short else reasons


def _not_confirmed(why: str, ids: list[int]) -> str:
    return f"{len(ids):,} image{'s' * (len(ids) != 1)} not confirmed: {WHY[why]}"
