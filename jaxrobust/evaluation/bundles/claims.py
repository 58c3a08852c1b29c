"""What a bundle claims of a network, read and judged with NumPy alone.

A bundle says of N images which ones a network misclassifies as they are, and has adversarial images
of others. Forward passes of all of these, and of the images that it says stand, confirm its clean
accuracy, and that the robust accuracy on the N images is at most what its record says. The text of
this module is a part of the program in every bundle.
"""

import hashlib
import json
import re
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxrobust.evaluation.bundles.contradictions import (
    ORDER,
    BundleFacts,
    ImageRow,
    RecordJson,
    Rows,
    fault,
    interval,
    kind,
    lacking,
)
from jaxrobust.evaluation.bundles.contradictions_corrupted import corrupted_fault
from jaxrobust.runtime.text.spelling import counted

SCHEMA = 2
CORRUPTED_SCHEMA = 3  # of a bundle of common corruptions, which older programs do not know
ABOUT, ROWS, SUMS = "bundle.json", "images.jsonl", "SHA256SUMS"
BOUNDARY = 1e-4  # of the spread of the logits: what float32 sums in another order can move
MARGIN = 10 * BOUNDARY  # with which whoever writes a bundle wants its images to be misclassified
_FILES = re.compile(r"bundle\.json|images\.jsonl|verify\.py|differences-\d+\.bin")
SHOWN = 8  # images that a line names
# Why an image is not confirmed, for people; the keys are those of `Findings.unconfirmed`.
WHY = {
    "missing": "not among the images that were given",
    "other image": "not the image that was evaluated",
    "other label": "another label than the data set's",
    "outside the range": "an adversarial image that leaves [0, 1]",
    "outside the ball": "an adversarial image further away than the radius",
    "no numbers": "logits that are not finite",
    "at the boundary": "classified correctly here, by a margin within float32 rounding",
    "right": "classified correctly here",
    "wrong": "said to be classified correctly as it is, and misclassified here",
}
_KINDS_OF_ROWS = {
    "misclassified": "misclassified as they are",
    "fooled": "fooled",
    "standing": "that stand, classified correctly as they are",
}
_REACH = 0.9  # of the radius, which half of the points of an attack come to at least

Images = Callable[[Sequence[int]], np.ndarray]  # ids, all below `count`, -> f32[n,H,W,C] in [0, 1]
Logits = Callable[[np.ndarray], np.ndarray]  # f32[n,H,W,C] -> f[n,K]


class Bundle(NamedTuple):
    """What a bundle claims, after its hashes were checked."""

    folder: Path
    about: BundleFacts  # bundle.json
    rows: Rows  # of images.jsonl, one an image
    number: str  # sha256 of SHA256SUMS

    @property
    def record(self) -> RecordJson:
        """Take the record of the evaluation, as JSON has it."""
        return self.about["record"]

    @property
    def corrupted(self) -> bool:
        """True of a bundle of common corruptions, which has no adversarial images."""
        return self.about["schema"] == CORRUPTED_SCHEMA

    @property
    def threat(self) -> dict[str, Any]:
        """Take norm and radius (`epsilon`)."""
        return {key: self.record["attacks"][0][key] for key in ("norm", "epsilon")}


class ClaimFindings(NamedTuple):
    """What the forward passes said of the images of a bundle."""

    images: int  # of the claim
    claimed: dict[str, int]  # "misclassified" as they are, "fooled", "standing"
    confirmed: dict[str, int]  # those that stand are right as they are: no attack was tried
    unconfirmed: dict[str, list[int]]  # why -> ids
    fallen: int  # images that the network misclassifies, as they are or in the ball
    reach: list[float]  # distances of the points, as shares of the radius
    split_images: int  # of the split, as far as whoever checks knows
    labels: str  # "compared" with the data set's; "trusted", as was asked; "unchecked"

    @property
    def standing(self) -> int:
        """Count the images that may still be robust."""
        return self.images - self.fallen

    @property
    def short(self) -> str | None:
        """Say that the points do not use the radius; None: they do, or there are none."""
        near = [share for share in self.reach if share < _REACH]
        if 2 * len(near) <= len(self.reach):
            return None
        return (
            f"the points do not use the radius of the claim: {len(near):,} of "
            f"{len(self.reach):,} stay below {_REACH:.0%} of it, and the farthest reaches "
            f"{max(self.reach):.0%}"
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
        """List it all for JSON, with the bound that was confirmed and its exact interval."""
        return {
            **self._asdict(),
            "reach": max(self.reach, default=None),
            "whole": self.whole,
            "robust_at_most": self.standing / self.images,
            "interval": interval(self.standing, self.images),
        }


def read(folder: Path) -> Bundle:
    """Read a bundle; refuse one whose files are not what they were when it was written."""
    if not (folder / SUMS).is_file():
        raise ValueError(
            f"{folder} is no bundle, it has no {SUMS}; give a folder that "
            "`jaxrobust evaluate --bundle` wrote"
        )
    listed = (folder / SUMS).read_bytes()
    sums = _sums(folder / SUMS)
    for name, sha256 in sums.items():
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name} is missing; get the bundle again")
        if file_sha256(folder / name) != sha256:
            raise ValueError(
                f"{folder / name} is not the file that the bundle was written with; get the "
                "bundle again"
            )
    about = _parsed(folder / ABOUT, (folder / ABOUT).read_text())
    schema = about.get("schema") if isinstance(about, dict) else None
    if type(schema) is not int or schema < 1:
        raise ValueError(f"{folder / ABOUT} has no schema; get the bundle again")
    if schema > CORRUPTED_SCHEMA:
        raise ValueError(
            f"{folder} has schema {schema}, and this program knows up to {CORRUPTED_SCHEMA}; use "
            "the verify.py in it, or a newer jaxrobust"
        )
    listed_rows = (folder / ROWS).read_text().splitlines()
    rows = [_parsed(folder / ROWS, line) for line in listed_rows]
    try:
        known = {name: (folder / name).stat().st_size for name in sums}
        own = corrupted_fault if schema == CORRUPTED_SCHEMA else fault
        problem = own(about, rows, known)
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        problem = f"lacks {error}"
    if problem:
        raise ValueError(f"{folder} is no bundle that this program can check: it {problem}")
    return Bundle(folder, about, rows, hashlib.sha256(listed).hexdigest())


def _sums(path: Path) -> dict[str, str]:
    listed = path.read_text(errors="replace").splitlines()
    matches = [re.fullmatch(r"([0-9a-f]{64})  ([\w.-]+)", line) for line in listed]
    sums = {match[2]: match[1] for match in matches if match}
    if len(sums) < len(listed) or not {ABOUT, ROWS} <= sums.keys():
        raise ValueError(f"{path} is damaged; get the bundle again")
    if others := [name for name in sums if not _FILES.fullmatch(name)]:
        raise ValueError(f"{path} lists {others[0]}, which no bundle has; get the bundle again")
    return sums


def _parsed(path: Path, text: str) -> Any:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        """Refuse what one reader takes for the first value and another for the last."""
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a name stands twice in one object")
        return dict(pairs)

    try:
        return json.loads(text, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON ({error}); get the bundle again") from error


def file_sha256(path: Path) -> str:
    """Hash the bytes of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(2**20):
            digest.update(part)
    return digest.hexdigest()


def image_sha256(image: np.ndarray) -> str:
    """Hash the bytes of an image f32[H,W,C] in [0, 1], little-endian, in this order of axes."""
    return hashlib.sha256(np.ascontiguousarray(image, "<f4").tobytes()).hexdigest()


def restored(code: bytes, image: np.ndarray, levels: int, step: float) -> np.ndarray:
    """Make the adversarial image f32[H,W,C] of a clean one.

    Args:
      code: its difference, compressed (zlib). With levels: the steps, i8[H,W,C]. Without: what the
        bit patterns of the floats differ by, modulo 2^32, first the lowest bytes of all.
      levels: the largest number of steps; 0: there are none.
      step: length of a step in [0, 1] pixels.
    """
    return _moved(code, image, levels, step)[0]


def _moved(code: bytes, image: np.ndarray, levels: int, step: float) -> tuple[np.ndarray, Any]:
    """Make the adversarial image of a clean one, and its difference before it is clipped."""
    count, stream = image.size * (1 if levels else 4), zlib.decompressobj()
    try:
        raw = stream.decompress(code, count + 1)  # no more, however much it would become
    except zlib.error as error:
        raise ValueError(f"a difference cannot be decompressed ({error})") from error
    if len(raw) != count or not stream.eof or stream.unused_data:
        of = f"more than {count}" if len(raw) > count else len(raw)
        raise ValueError(f"a difference of {of} bytes is none of a {image.shape} image")
    if levels:
        delta = np.frombuffer(raw, np.int8).reshape(image.shape).astype(np.float32)
        delta *= np.float32(step)
        return np.clip(image + delta, 0, 1), delta
    planes = np.frombuffer(raw, np.uint8).reshape(4, -1)
    bits = np.ascontiguousarray(planes.T).view("<u4").reshape(image.shape)
    point = (np.ascontiguousarray(image, "<f4").view("<u4") + bits).view("<f4")
    return point, point.astype(np.float64) - image


def judge(
    bundle: Bundle,
    images: Images,
    logits: Logits,
    *,
    count: int,
    split_images: int | None = None,
    labels: np.ndarray | None = None,
    trust_labels: bool = False,
    batch: int = 50,
    tell: Callable[[str], None] = lambda line: None,
) -> ClaimFindings:
    """Compute the logits of all images, as they are and as an attack leaves them, and compare."""
    kinds = {row["image"]: kind(row) for row in bundle.rows}
    reasons = known_before(bundle.rows, count, labels)
    todo = [row for row in bundle.rows if row["image"] not in reasons]
    fallen, reach = 0, []
    announced = time.monotonic()
    for start in range(0, len(todo), batch):
        part = todo[start : start + batch]
        clean = np.asarray(images([row["image"] for row in part]), np.float32)
        judged, fell, lengths = _judged(bundle, part, clean, logits)
        reasons |= judged
        fallen += int(fell.sum())
        reach += lengths
        if time.monotonic() - announced > 10:
            announced = time.monotonic()
            tell(f"{start + len(part)} of {len(todo)} images")
    claimed, confirmed = dict.fromkeys(("misclassified", "fooled", "standing"), 0), {}
    for what in claimed:
        of = {image for image, own in kinds.items() if own == what}
        claimed[what], confirmed[what] = len(of), len(of - reasons.keys())
    split = count if split_images is None else split_images
    counts = len(bundle.rows), claimed, confirmed, by_reason(reasons, WHY), fallen, reach
    return ClaimFindings(*counts, split, labels_are(labels, trust_labels))


def known_before(rows: Rows, count: int, labels: np.ndarray | None) -> dict[int, str]:
    """Say why images are unconfirmed before a forward pass: by their numbers and labels."""
    reasons = {row["image"]: "missing" for row in rows if not 0 <= row["image"] < count}
    if labels is not None:
        here = [row for row in rows if row["image"] not in reasons]
        other = [row["image"] for row in here if int(labels[row["image"]]) != row["label"]]
        reasons |= dict.fromkeys(other, "other label")
    return reasons


def by_reason(reasons: dict[int, str], order: Iterable[str]) -> dict[str, list[int]]:
    """List the images of each reason that there is."""
    listed = {why: sorted(i for i in reasons if reasons[i] == why) for why in order}
    return {why: ids for why, ids in listed.items() if ids}


def labels_are(labels: np.ndarray | None, trust_labels: bool) -> str:
    """Say what was done with the labels of a bundle."""
    return "compared" if labels is not None else "trusted" if trust_labels else "unchecked"


def answers_of(logits: Logits, points: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Compute logits f[n,K]; `ValueError` where the network gives another array."""
    answers = np.asarray(logits(points))
    if answers.ndim != 2 or len(answers) != len(labels) or answers.shape[1] <= labels.max():
        raise ValueError(
            f"the network gives an array {answers.shape} for {len(labels)} images with labels up "
            f"to {labels.max()}; pass one that gives the logits of the evaluation's classes"
        )
    return answers


def _judged(
    bundle: Bundle, rows: Rows, clean: np.ndarray, logits: Logits
) -> tuple[dict[int, str], np.ndarray, list[float]]:
    """Say why images are not confirmed, mark those that fell, bool[n], and measure points."""
    labels = np.array([row["label"] for row in rows])
    pairs = zip(rows, clean, strict=True)
    other = [row["image"] for row, image in pairs if image_sha256(image) != row["sha256"]]
    reasons = dict.fromkeys(other, "other image")
    claimed = np.array([kind(row) != "misclassified" for row in rows])
    fallen = _answered(reasons, rows, labels, claimed, clean, logits)
    hit = [place for place, row in enumerate(rows) if kind(row) == "fooled"]
    points, reach = np.array(clean[hit]), []
    for at, place in enumerate(hit):
        row = rows[place]
        if row["image"] not in other:
            points[at], share = _point(bundle, row, clean[place])
            if why := _outside(points[at], clean[place], **bundle.threat):
                reasons[row["image"]] = why
            else:
                reach.append(share)
    if hit:
        own = [rows[place] for place in hit]
        fallen[hit] |= _answered(reasons, own, labels[hit], ~claimed[hit], points, logits)
    return reasons, fallen, reach


def _answered(
    reasons: dict[int, str],
    rows: Rows,
    labels: np.ndarray,
    claimed: np.ndarray,
    points: np.ndarray,
    logits: Logits,
) -> np.ndarray:
    """Add to `reasons` where answers are not right or wrong as claimed; mark wrong ones, bool[n].

    Images that have a reason already are not marked.
    """
    answers = answers_of(logits, points, labels)
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


def adversarial(bundle: Bundle, row: ImageRow, image: np.ndarray) -> np.ndarray:
    """Make the adversarial image f32[H,W,C] of a row, given the clean one."""
    return _point(bundle, row, image)[0]


def _point(bundle: Bundle, row: ImageRow, image: np.ndarray) -> tuple[np.ndarray, float]:
    """Make the adversarial image of a row, and measure its share of the radius.

    What pixels would leave [0, 1] by counts, as no point can go further there.
    """
    with (bundle.folder / row["file"]).open("rb") as file:
        file.seek(row["offset"])
        code = file.read(row["bytes"])
    try:
        point, delta = _moved(code, image, row["levels"], row["step"])
    except ValueError as error:
        raise ValueError(f"image {row['image']}: {error}; get the bundle again") from error
    edge = not row["levels"] and (np.isin(point, (0, 1)) & (point != image)).any()
    length = float(np.linalg.norm(delta.ravel(), ORDER[bundle.threat["norm"]]))
    return point, 1.0 if edge else length / bundle.threat["epsilon"]


def _outside(point: np.ndarray, image: np.ndarray, *, norm: str, epsilon: float) -> str | None:
    """Say in what an adversarial image breaks its bounds; None: in nothing.

    Its norm may exceed the radius by rounding: 1e-5 of it, and 1e-6.
    """
    if not ((point >= 0) & (point <= 1)).all():  # NaN neither
        return "outside the range"
    delta = point.astype(np.float64) - image.astype(np.float64)
    length = np.linalg.norm(delta.ravel(), ORDER[norm])
    return None if length <= epsilon * (1 + 1e-5) + 1e-6 else "outside the ball"


def is_right(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Mark images whose label has the largest of logits f[n,K], all finite, bool[n]."""
    return (logits.argmax(axis=1) == labels) & np.isfinite(logits).all(axis=1)


def margin(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Compute the label's margin to all other logits, as a share of their spread; f64[n] or NaN."""
    logits = np.asarray(logits, np.float64)
    own = np.arange(logits.shape[1]) == np.asarray(labels)[:, None]
    with np.errstate(invalid="ignore", divide="ignore"):
        by = logits[own] - np.where(own, -np.inf, logits).max(axis=1)
        return by / np.ptp(logits[:, _unmasked(logits)], axis=1)


def _unmasked(logits: np.ndarray) -> np.ndarray:
    """Find the classes that no large negative constant masks, bool[K], as `types.unmasked`."""
    logits = np.asarray(logits, np.float64)[np.isfinite(logits).all(axis=1)]
    if not len(logits):
        return np.ones(logits.shape[1], bool)
    order = np.argsort(-logits.max(axis=0), kind="stable")
    size = np.maximum.accumulate(np.abs(logits[:, order]).max(axis=0))
    below = logits.max(axis=0)[order][2:] < np.minimum(-500.0, -200 * size[1:-1])
    count = int(below.argmax()) + 2 if below.any() else len(order)
    return np.isin(np.arange(len(order)), order[:count])


def lines(bundle: Bundle, findings: ClaimFindings) -> list[str]:
    """Write the claim of a bundle and the findings, for people."""
    record, threat = bundle.record, bundle.threat
    noted = bundle.about.get("split_images")
    rows = [
        f"bundle {bundle.number[:12]}: {record['model']['name']}, {record['method']}, "
        f"{threat['norm']} {threat['epsilon']:.4g}, on {record['dataset']} {record['split']}, "
        f"preprocessing {record['preprocessing']}",
        f"claim: at most {record['robust']:.2%} of {findings.images:,} of the split's "
        f"{noted or findings.split_images:,} images are robust",
    ]
    if noted not in (None, findings.split_images):
        rows.append(
            f"  the split has {noted:,} images by the bundle, and there are "
            f"{findings.split_images:,} here: pass all of them to count"
        )
    for what, words in _KINDS_OF_ROWS.items():
        confirmed, claimed = findings.confirmed[what], findings.claimed[what]
        rows.append(f"  {confirmed:,} of {claimed:,} {words}: confirmed")
    for why, ids in findings.unconfirmed.items():
        shown = ", ".join(map(str, ids[:SHOWN])) + ", ..." * (len(ids) > SHOWN)
        rows.append(f"  {len(ids):,} not confirmed: {WHY[why]} (image {shown})")
    if findings.short:
        rows.append(f"  {findings.short}")
    if missing := lacking(bundle.about):
        rows.append(f"  it does not say {', nor '.join(missing)}, as bundles of an older version")
    if findings.labels != "compared":
        asked = findings.labels == "trusted"
        trusted = "taken on trust, as was asked" if asked else "not confirmed"
        rows.append(f"  the labels are the bundle's own, and {trusted}")
    low, high = interval(findings.standing, findings.images)
    but = "Confirmed but for the labels" if findings.every else "Not all is confirmed"
    rows.append(
        f"{'Confirmed' if findings.whole else but}: robust accuracy on these "
        f"images is at most {findings.standing / findings.images:.2%} ({findings.standing:,} of "
        f"{findings.images:,}; 95 % interval of this share {low:.2%} to {high:.2%})"
    )
    return rows


def why_not(findings: ClaimFindings) -> list[str]:
    """List why a claim is not confirmed, a reason each."""
    unconfirmed = [
        f"{counted(len(ids), 'image')} not confirmed: {WHY[why]}"
        for why, ids in findings.unconfirmed.items()
    ]
    return [*unconfirmed, *([findings.short] if findings.short else [])]
