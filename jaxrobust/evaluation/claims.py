"""What a bundle claims of a network, read and judged with NumPy alone.

A bundle says of N images which ones a network misclassifies as they are, and has adversarial images
of others. One forward pass for each of those confirms that the robust accuracy on the N images is
at most what its record says. The text of this module is a part of the program in every bundle.
"""

import hashlib
import json
import math
import re
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

SCHEMA = 1
ABOUT, ROWS, SUMS = "bundle.json", "images.jsonl", "SHA256SUMS"
BOUNDARY = 1e-4  # of the spread of the logits: what float32 sums in another order can move
MARGIN = 10 * BOUNDARY  # with which whoever writes a bundle wants its images to be misclassified
_ORDER = {"linf": np.inf, "l2": 2, "l1": 1}
_SHOWN = 8  # images that a line names
# Why an image is not confirmed, in words; the keys are those of `Findings.unconfirmed`.
WHY = {
    "missing": "not among the images that were given",
    "other image": "not the image that was evaluated",
    "other label": "another label than the data set's",
    "outside the range": "an adversarial image that leaves [0, 1]",
    "outside the ball": "an adversarial image further away than the radius",
    "at the boundary": "classified correctly here, by a margin within float32 rounding",
    "right": "classified correctly here",
}

Images = Callable[[Sequence[int]], np.ndarray]  # ids, all below `count`, -> f32[n,H,W,C] in [0, 1]
Logits = Callable[[np.ndarray], np.ndarray]  # f32[n,H,W,C] -> f[n,K]


class Bundle(NamedTuple):
    """What a bundle claims, after its hashes were checked."""

    folder: Path
    about: dict[str, Any]  # bundle.json
    rows: list[dict[str, Any]]  # of images.jsonl, one an image
    number: str  # sha256 of SHA256SUMS

    @property
    def record(self) -> dict[str, Any]:
        """Return the record of the evaluation."""
        return self.about["record"]

    @property
    def threat(self) -> dict[str, Any]:
        """Return norm and radius (`epsilon`)."""
        return {key: self.record["attacks"][0][key] for key in ("norm", "epsilon")}


class Findings(NamedTuple):
    """What the forward passes said of the images that a bundle says are misclassified."""

    images: int  # of the claim
    claimed: dict[str, int]  # "misclassified" as they are, "fooled"
    confirmed: dict[str, int]
    unconfirmed: dict[str, list[int]]  # why -> ids

    @property
    def standing(self) -> int:
        """Return how many images may still be robust."""
        return self.images - sum(self.confirmed.values())

    @property
    def whole(self) -> bool:
        """Tell whether everything is confirmed."""
        return self.confirmed == self.claimed

    def plain(self) -> dict[str, Any]:
        """Return it all for JSON, with the bound that was confirmed and its exact interval."""
        return {
            **self._asdict(),
            "whole": self.whole,
            "robust_at_most": self.standing / self.images,
            "interval": interval(self.standing, self.images),
        }


def read(folder: Path) -> Bundle:
    """Return a bundle whose files are what they were when it was written.

    Raises:
      ValueError: none is there, a file has changed, or it is of a newer version; with what to do.
    """
    if not (folder / SUMS).is_file():
        raise ValueError(
            f"{folder} is no bundle, it has no {SUMS}; give a folder that "
            "`jaxrobust.evaluate --bundle` wrote"
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
    about = _parsed(folder / ABOUT)
    if about.get("schema", 0) > SCHEMA:
        raise ValueError(
            f"{folder} has schema {about['schema']}, and this program knows up to {SCHEMA}; use "
            "the verify.py in it, or a newer jaxrobust"
        )
    text = (folder / ROWS).read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    bundle = Bundle(folder, about, rows, hashlib.sha256(listed).hexdigest())
    try:
        fault = _contradiction(bundle, sums)
    except (KeyError, IndexError, TypeError) as error:
        fault = f"lacks {error}"
    if fault:
        raise ValueError(f"{folder} is no bundle that this program can check: it {fault}")
    return bundle


def _sums(path: Path) -> dict[str, str]:
    """Return the hashes by file."""
    listed = path.read_text(errors="replace").splitlines()
    found = [re.fullmatch(r"([0-9a-f]{64})  ([\w.-]+)", line) for line in listed]
    sums = {match[2]: match[1] for match in found if match}
    if len(sums) < len(listed) or not {ABOUT, ROWS} <= sums.keys():
        raise ValueError(f"{path} is damaged; get the bundle again")
    return sums


def _contradiction(bundle: Bundle, sums: dict[str, str]) -> str | None:
    """Return in what a bundle with the right hashes contradicts itself; None: nothing."""
    rows, robust = bundle.rows, bundle.record["robust"]
    standing = sum(row["verdict"] == "" for row in rows)
    if not rows or round(robust * len(rows)) != standing:
        return f"has {standing} robust images of {len(rows)}, and its record says {robust:.2%}"
    if len({row["image"] for row in rows}) < len(rows):
        return "has an image twice"
    if bundle.threat["norm"] not in _ORDER or len(bundle.about["image"]) != 3:
        return "has another norm or shape of images"
    stored = [row for row in rows if _kind(row) == "fooled"]
    if not {row["file"] for row in stored} <= sums.keys():
        return f"has a difference in a file that {SUMS} does not list"
    return None


def _parsed(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
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
    """Return the adversarial image f32[H,W,C] of an image f32[H,W,C].

    Args:
      code: its difference, compressed (zlib). With levels: the steps, i8[H,W,C]. Without: what the
        bit patterns of the floats differ by, modulo 2^32, first the lowest bytes of all.
      image: the clean one.
      levels: the largest number of steps; 0: there are none.
      step: length of a step in [0, 1] pixels.
    Raises:
      ValueError: not the difference of such an image.
    """
    try:
        raw = zlib.decompress(code)
    except zlib.error as error:
        raise ValueError(f"a difference cannot be decompressed ({error})") from error
    if len(raw) != image.size * (1 if levels else 4):
        raise ValueError(f"a difference of {len(raw)} bytes is none of a {image.shape} image")
    if levels:
        steps = np.frombuffer(raw, np.int8).reshape(image.shape)
        return np.clip(image + steps.astype(np.float32) * np.float32(step), 0, 1)
    planes = np.frombuffer(raw, np.uint8).reshape(4, -1)
    bits = np.ascontiguousarray(planes.T).view("<u4").reshape(image.shape)
    return (np.ascontiguousarray(image, "<f4").view("<u4") + bits).view("<f4")


def judge(
    bundle: Bundle,
    images: Images,
    logits: Logits,
    *,
    count: int,
    labels: np.ndarray | None = None,
    batch: int = 50,
    tell: Callable[[str], None] = lambda line: None,
) -> Findings:
    """Compute the logits of all images that are said to be misclassified, and compare.

    Args:
      bundle: as `read`.
      images: the clean ones, by id.
      logits: the network.
      count: how many images there are; those with larger ids are missing.
      labels: int[count], of the data set; None: those of the bundle are taken on trust.
      batch: images at a time.
      tell: is told how far it is.
    Raises:
      ValueError: the network gives no logits of these classes.
    """
    wrong = [row for row in bundle.rows if row["verdict"]]
    kinds = {row["image"]: _kind(row) for row in wrong}
    reasons: dict[int, str] = {row["image"]: "missing" for row in wrong if row["image"] >= count}
    if labels is not None:
        here = [row for row in wrong if row["image"] < count]
        other = [r["image"] for r in here if int(labels[r["image"]]) != r["label"]]
        reasons |= dict.fromkeys(other, "other label")
    todo = [row for row in wrong if row["image"] not in reasons]
    told = time.monotonic()
    for start in range(0, len(todo), batch):
        part = todo[start : start + batch]
        clean = np.asarray(images([row["image"] for row in part]), np.float32)
        reasons |= _judged(bundle, part, clean, logits)
        if time.monotonic() - told > 10:
            told = time.monotonic()
            tell(f"{start + len(part)} of {len(todo)} forward passes")
    claimed, confirmed = dict.fromkeys(("misclassified", "fooled"), 0), {}
    for kind in kinds.values():
        claimed[kind] += 1
    for kind in claimed:
        confirmed[kind] = claimed[kind] - sum(kinds[image] == kind for image in reasons)
    unconfirmed = {why: sorted(i for i in reasons if reasons[i] == why) for why in WHY}
    named = {why: ids for why, ids in unconfirmed.items() if ids}
    return Findings(len(bundle.rows), claimed, confirmed, named)


def _kind(row: dict[str, Any]) -> str:
    return {"": "standing", "clean": "misclassified"}.get(row["verdict"], "fooled")


def _judged(
    bundle: Bundle, rows: list[dict[str, Any]], clean: np.ndarray, logits: Logits
) -> dict[int, str]:
    """Return why images are not confirmed, by id, of those that are not."""
    reasons, points = {}, np.array(clean)
    for place, row in enumerate(rows):
        if image_sha256(clean[place]) != row["sha256"]:
            reasons[row["image"]] = "other image"
        elif _kind(row) == "fooled":
            points[place] = adversarial(bundle, row, clean[place])
            if why := _outside(points[place], clean[place], **bundle.threat):
                reasons[row["image"]] = why
    found = np.asarray(logits(points))
    largest = max(row["label"] for row in rows)
    if found.ndim != 2 or len(found) != len(rows) or found.shape[1] <= largest:
        raise ValueError(
            f"the network gives an array {found.shape} for {len(rows)} images with labels up to "
            f"{largest}; pass one that gives the logits of the evaluation's classes"
        )
    labels = np.array([row["label"] for row in rows])
    near = np.abs(margin(found, labels)) <= BOUNDARY
    for row, right, close in zip(rows, is_right(found, labels), near, strict=True):
        if right:
            reasons.setdefault(row["image"], "at the boundary" if close else "right")
    return reasons


def adversarial(bundle: Bundle, row: dict[str, Any], image: np.ndarray) -> np.ndarray:
    """Return the adversarial image f32[H,W,C] of a row, given the clean one."""
    with (bundle.folder / row["file"]).open("rb") as file:
        file.seek(row["offset"])
        code = file.read(row["bytes"])
    return restored(code, image, row["levels"], row["step"])


def _outside(point: np.ndarray, image: np.ndarray, *, norm: str, epsilon: float) -> str | None:
    """Return what is wrong with an adversarial image; None: nothing.

    Its norm may exceed the radius by rounding: 1e-5 of it, and 1e-6.
    """
    if not ((point >= 0) & (point <= 1)).all():  # NaN neither
        return "outside the range"
    delta = point.astype(np.float64) - image.astype(np.float64)
    length = np.linalg.norm(delta.ravel(), _ORDER[norm])
    return None if length <= epsilon * (1 + 1e-5) + 1e-6 else "outside the ball"


def is_right(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return whether the label has the largest of logits f[n,K], bool[n]; with a NaN it has not."""
    return (logits.argmax(axis=1) == labels) & ~np.isnan(logits).any(axis=1)


def margin(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return by how much the label's logit exceeds all others, as a share of their spread, f64[n].

    NaN where logits are not finite.
    """
    logits = np.asarray(logits, np.float64)
    own = np.arange(logits.shape[1]) == np.asarray(labels)[:, None]
    with np.errstate(invalid="ignore", divide="ignore"):
        by = logits[own] - np.where(own, -np.inf, logits).max(axis=1)
        return by / np.ptp(logits, axis=1)


def interval(successes: int, n: int) -> tuple[float, float]:
    """Return the exact (Clopper-Pearson) 95 % interval of a share, by bisection."""
    logs = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])
    ways = logs[n] - logs - logs[::-1]  # of choosing k among n, as a logarithm

    def tail(p: float, which: slice) -> float:  # probability of these numbers of successes
        k = np.arange(n + 1)
        return float(np.exp(ways + k * math.log(p) + (n - k) * math.log1p(-p))[which].sum())

    def root(which: slice, rises: bool) -> float:
        low, high = 0.0, 1.0
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (middle, high) if (tail(middle, which) < 0.025) == rises else (low, middle)
        return (low + high) / 2

    low = root(slice(successes, None), True) if successes else 0.0
    high = root(slice(0, successes + 1), False) if successes < n else 1.0
    return low, high


def lines(bundle: Bundle, found: Findings) -> list[str]:
    """Return what a bundle claims and what was found, for people."""
    record, threat = bundle.record, bundle.threat
    share = f"{record['robust']:.2%} of {found.images:,} images"
    said = [
        f"bundle {bundle.number[:12]}: {record['model']['name']}, {record['method']}, "
        f"{threat['norm']} {threat['epsilon']:.4g}, on {record['dataset']} {record['split']}",
        f"claim: at most {share} are robust",
    ]
    for kind, what in (("misclassified", "misclassified as they are"), ("fooled", "fooled")):
        said.append(f"  {found.confirmed[kind]:,} of {found.claimed[kind]:,} {what}: confirmed")
    for why, ids in found.unconfirmed.items():
        shown = ", ".join(map(str, ids[:_SHOWN])) + ", ..." * (len(ids) > _SHOWN)
        said.append(f"  {len(ids):,} not confirmed: {WHY[why]} (image {shown})")
    low, high = interval(found.standing, found.images)
    said.append(
        f"{'Confirmed' if found.whole else 'Not all is confirmed'}: robust accuracy on these "
        f"images is at most {found.standing / found.images:.2%} ({found.standing:,} of "
        f"{found.images:,}; 95 % interval of this share {low:.2%} to {high:.2%})"
    )
    return said
