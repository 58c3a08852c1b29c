"""What a bundle claims of a network under common corruptions, judged with NumPy alone.

A corrupted image is a fact of the data set, or of a seed: whoever has them all can try the network
on each. So both are confirmed, that it is right where the bundle says so and wrong where it does,
and the accuracies are what the record says, not only at most that. The text of this module is a
part of the program in every bundle.
"""

import hashlib
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxrobust.evaluation.bundles.claims import (
    BOUNDARY,
    SHOWN,
    WHY,
    Bundle,
    Logits,
    answers_of,
    by_reason,
    is_right,
    known_before,
    labels_are,
    margin,
)
from jaxrobust.evaluation.bundles.contradictions import Rows, lacking
from jaxrobust.evaluation.bundles.contradictions_corrupted import CLEAN, rights
from jaxrobust.runtime.text.spelling import counted

CorruptedImages = Callable[[str, Sequence[int]], np.ndarray]  # corruption, ids -> f32[n,H,W,C]
OTHER = "other answer"  # of an image, in `CorruptionFindings.unconfirmed`
_WHY_CORRUPTED = WHY | {
    "other image": "not the images that were evaluated",
    OTHER: "another answer here",
}
_TURNED = 1e-4  # share of answers that float32 sums in another order may turn; more are others
_Z = 1.959963984540054  # of 95 %, two-sided


class CorruptionFindings(NamedTuple):
    """What the forward passes said of the answers that a bundle of corruptions claims."""

    images: int  # of the claim
    answers: int  # of these images under all corruptions
    confirmed: int  # answers that are right, or wrong, here too
    undecided: int  # answers that are others here, by no more than float32 rounding
    unconfirmed: dict[str, list[int]]  # why -> ids of images
    split_images: int  # of the split, as far as whoever checks knows
    labels: str  # "compared" with the data set's; "trusted", as was asked; "unchecked"
    mean: float  # accuracy of all corruptions, as the bundle has it
    interval: tuple[float, float]  # of `mean`, 95 %, over images

    @property
    def whole(self) -> bool:
        """Full confirmation: of all answers, and of labels, or these are trusted."""
        every = self.confirmed + self.undecided == self.answers and not self.unconfirmed
        return every and self.labels != "unchecked"

    def plain(self) -> dict[str, Any]:
        """List it all for JSON."""
        return {**self._asdict(), "whole": self.whole}


def judge_corrupted(
    bundle: Bundle,
    images: CorruptedImages,
    logits: Logits,
    *,
    count: int,
    split_images: int | None = None,
    labels: np.ndarray | None = None,
    trust_labels: bool = False,
    batch: int = 50,
    tell: Callable[[str], None] = lambda line: None,
) -> CorruptionFindings:
    """Compute the logits of all images under all corruptions, and compare."""
    reasons = known_before(bundle.rows, count, labels)
    todo = [row for row in bundle.rows if row["image"] not in reasons]
    names, confirmed = bundle.about["corruptions"], 0
    turned: dict[int, int] = {}  # image -> answers that are others here, all of them near
    announced = time.monotonic()
    for start in range(0, len(todo), batch):
        part = todo[start : start + batch]
        sums = [hashlib.sha256() for _ in part]
        equal, near = np.zeros((2, len(part), len(names)), bool)
        for column, name in enumerate(names):
            shown = np.asarray(images(name, [row["image"] for row in part]), np.float32)
            for digest, image in zip(sums, shown, strict=True):
                digest.update(pixels(image))
            equal[:, column], near[:, column] = _compared(part, column, shown, logits)
        for row, digest, same, close in zip(part, sums, equal, near, strict=True):
            if digest.hexdigest() != row["sha256"]:
                reasons[row["image"]] = "other image"
            elif not (same | close).all():
                reasons[row["image"]] = OTHER
            else:
                confirmed += int(same.sum())
                turned |= {row["image"]: int((~same).sum())} if not same.all() else {}
        if time.monotonic() - announced > 10:
            announced = time.monotonic()
            tell(f"{start + len(part)} of {len(todo)} images under {len(names)} corruptions")
    answers, undecided = len(bundle.rows) * len(names), sum(turned.values())
    if undecided > max(1, answers * _TURNED):  # a network can make all its margins small
        reasons |= dict.fromkeys(turned, OTHER)
        confirmed -= len(turned) * len(names) - undecided
        undecided = 0
    named = by_reason(reasons, _WHY_CORRUPTED)
    split = count if split_images is None else split_images
    counts = (len(bundle.rows), answers, confirmed, undecided, named, split)
    seen, shares = labels_are(labels, trust_labels), withstood(bundle)
    return CorruptionFindings(*counts, seen, float(shares.mean()), mean_interval(shares))


def _compared(
    rows: Rows, column: int, images: np.ndarray, logits: Logits
) -> tuple[np.ndarray, np.ndarray]:
    """Mark the answers to one corruption that are as claimed, and those that rounding may turn."""
    labels = np.array([row["label"] for row in rows])
    answers = answers_of(logits, images, labels)
    claimed = np.array([row["right"][column] == "1" for row in rows])
    near = np.isfinite(answers).all(axis=1) & (np.abs(margin(answers, labels)) <= BOUNDARY)
    return is_right(answers, labels) == claimed, near


def pixels(image: np.ndarray) -> bytes:
    """Return the bytes of an image f32[H,W,C] of uint8 / 255, a byte for each number."""
    return np.rint(np.asarray(image, np.float32) * np.float32(255)).astype(np.uint8).tobytes()


def withstood(bundle: Bundle) -> np.ndarray:
    """Return the share of corruptions under which each image is right, f64[N], without `clean`."""
    corrupted = [name != CLEAN for name in bundle.about["corruptions"]]
    return rights(bundle.rows)[:, corrupted].mean(axis=1)


def mean_interval(shares: np.ndarray) -> tuple[float, float]:
    """Compute the 95 % interval of a mean over images f64[N], by their standard error.

    The corruptions of one image are no draws of their own, so images are what is counted.
    """
    error = float(shares.std(ddof=1)) / len(shares) ** 0.5 if len(shares) > 1 else np.inf
    mean = float(shares.mean())
    return max(mean - _Z * error, 0.0), min(mean + _Z * error, 1.0)


def corrupted_lines(bundle: Bundle, findings: CorruptionFindings) -> list[str]:
    """Write the claim of a bundle of corruptions and the findings, for people."""
    record, names = bundle.record, bundle.about["corruptions"]
    number = len([name for name in names if name != CLEAN])
    how, noted = record["corruptions"]["images"], bundle.about.get("split_images")
    clean = "" if record["clean"] is None else f", clean accuracy {record['clean']:.2%}"
    rows = [
        f"bundle {bundle.number[:12]}: {record['model']['name']} under {number} common "
        f"corruptions ({how}), on {record['dataset']}, preprocessing {record['preprocessing']}",
        f"claim: 1 - mean error {findings.mean:.2%}{clean}, on {findings.images:,} of "
        f"{noted or findings.split_images:,} images",
    ]
    if noted not in (None, findings.split_images):
        rows.append(
            f"  there are {noted:,} images by the bundle, and {findings.split_images:,} here: pass "
            "all of them to count"
        )
    rows.append(f"  {findings.confirmed:,} of {findings.answers:,} answers: confirmed")
    if findings.undecided:
        rows.append(f"  {findings.undecided:,} answers are others here by float32 rounding alone")
    for why, ids in findings.unconfirmed.items():
        shown = ", ".join(map(str, ids[:SHOWN])) + ", ..." * (len(ids) > SHOWN)
        found = counted(len(ids), "image")
        rows.append(f"  {found} not confirmed: {_WHY_CORRUPTED[why]} (image {shown})")
    if missing := lacking(bundle.about):
        rows.append(f"  it does not say {', nor '.join(missing)}, as bundles of an older version")
    if findings.labels != "compared":
        asked = findings.labels == "trusted"
        trusted = "taken on trust, as was asked" if asked else "not confirmed"
        rows.append(f"  the labels are the bundle's own, and {trusted}")
    low, high = findings.interval
    every = findings.confirmed + findings.undecided == findings.answers
    but = "Confirmed but for the labels" if every else "Not confirmed"
    rows.append(
        f"{'Confirmed' if findings.whole else but}: the accuracy on these images under these "
        f"corruptions is {findings.mean:.2%} (95 % interval over images {low:.2%} to {high:.2%})"
    )
    return rows


def why_not_corrupted(findings: CorruptionFindings) -> list[str]:
    """List why a claim is not confirmed, a reason each."""
    return [
        f"{counted(len(ids), 'image')} not confirmed: {_WHY_CORRUPTED[why]}"
        for why, ids in findings.unconfirmed.items()
    ]
