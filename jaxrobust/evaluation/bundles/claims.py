"""What a bundle claims about a network, read and judged with NumPy alone.

A bundle of attacks lists which of N clean images a network misclassifies, and holds adversarial
images of others. Forward passes on all of these, and on the images that it lists as surviving,
confirm its clean accuracy. They also confirm that the robust accuracy on the N images is at most
what its record says. A bundle of common corruptions lists the corruptions under which the network
classifies each image correctly. Anyone with the corrupted images can confirm this exactly by
running the network on them. The text of this module is part of the program in every bundle.
"""

import hashlib
import json
import re
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxrobust.evaluation.bundles.contradictions import (
    CLEAN,
    CORRUPTED_SCHEMA,
    ORDER,
    TASK_SCHEMA,
    BundleFacts,
    ImageRow,
    RecordJson,
    Rows,
    fault,
    rights,
)

SCHEMA = 2  # of a bundle of attacks
ABOUT, ROWS, SUMS = "bundle.json", "images.jsonl", "SHA256SUMS"
BOUNDARY = 1e-4  # of the spread of the logits: how far another order of float32 sums moves them
MARGIN = 10 * BOUNDARY  # by which the images of a bundle should be misclassified
_FILES = re.compile(r"bundle\.json|images\.jsonl|verify\.py|differences-\d+\.bin")
Logits = Callable[[np.ndarray, Sequence[int]], np.ndarray]  # f32[n,H,W,C], ids -> f[n,K]


class Bundle(NamedTuple):
    """The claims of a bundle whose hashes have been checked."""

    folder: Path
    about: BundleFacts  # bundle.json
    rows: Rows  # of images.jsonl, one an image
    number: str  # sha256 of SHA256SUMS

    @property
    def record(self) -> RecordJson:
        """The record of the evaluation, as parsed JSON."""
        return self.about["record"]

    @property
    def corrupted(self) -> bool:
        """Whether this is a bundle of common corruptions, without adversarial images."""
        return self.about["schema"] == CORRUPTED_SCHEMA

    @property
    def threat(self) -> dict[str, Any]:
        """Norm and radius (`epsilon`)."""
        return {key: self.record["attacks"][0][key] for key in ("norm", "epsilon")}


def read(folder: Path, *, of_task: bool = False) -> Bundle:
    """Read a bundle, of classes or of a task; raise if its files have changed since then."""
    if not (folder / SUMS).is_file():
        raise ValueError(
            f"{folder} is not a bundle: it has no {SUMS}; give a folder that "
            "`jaxrobust evaluate --bundle` wrote"
        )
    listed = (folder / SUMS).read_bytes()
    sums = _sums(folder / SUMS)
    for name, sha256 in sums.items():
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name} is missing; download the bundle again")
        if file_sha256(folder / name) != sha256:
            raise ValueError(
                f"{folder / name} differs from the file in the original bundle; "
                "download the bundle again"
            )
    about = _parsed(folder / ABOUT, (folder / ABOUT).read_text())
    schema = about.get("schema") if isinstance(about, dict) else None
    if type(schema) is not int or schema < 1:
        raise ValueError(f"{folder / ABOUT} has no schema; download the bundle again")
    if schema > TASK_SCHEMA:
        raise ValueError(
            f"{folder} has schema {schema}, but this program only reads up to {TASK_SCHEMA}; use "
            "the verify.py in this folder, or a newer jaxrobust"
        )
    if (schema == TASK_SCHEMA) != of_task:
        remedy = "jaxrobust verify" if of_task else "evaluation.bundles.of_task.check"
        raise ValueError(f"{folder} is {'not ' * of_task}a bundle for a task; use {remedy}")
    listed_rows = (folder / ROWS).read_text().splitlines()
    rows = [_parsed(folder / ROWS, line) for line in listed_rows]
    try:
        sizes = {name: (folder / name).stat().st_size for name in sums}
        problem = fault(about, rows, sizes)
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        problem = f"lacks {error}"
    if problem:
        raise ValueError(f"{folder} is not a bundle that this program can check: it {problem}")
    return Bundle(folder, about, rows, hashlib.sha256(listed).hexdigest())


def _sums(path: Path) -> dict[str, str]:
    listed = path.read_text(errors="replace").splitlines()
    matches = [re.fullmatch(r"([0-9a-f]{64})  ([\w.-]+)", line) for line in listed]
    sums = {match[2]: match[1] for match in matches if match}
    if len(sums) < len(listed) or not {ABOUT, ROWS} <= sums.keys():
        raise ValueError(f"{path} is damaged; download the bundle again")
    if others := [name for name in sums if not _FILES.fullmatch(name)]:
        raise ValueError(
            f"{path} lists {others[0]}, which is not part of a bundle; download the bundle again"
        )
    return sums


def _parsed(path: Path, text: str) -> Any:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        """Reject duplicate names: some readers take the first value, others the last."""
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a name appears twice in one object")
        return dict(pairs)

    try:
        return json.loads(text, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}); download the bundle again") from error


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
    """Restore the adversarial image f32[H,W,C] from a clean one.

    Args:
      code: its difference, compressed with zlib. With levels: the steps, i8[H,W,C]. Without: the
        difference of the floats' bit patterns modulo 2^32, the lowest bytes of all values first.
      levels: the largest number of steps; 0 if the difference is exact.
      step: length of a step in [0, 1] pixels.
    """
    return _moved(code, image, levels, step)[0]


def _moved(code: bytes, image: np.ndarray, levels: int, step: float) -> tuple[np.ndarray, Any]:
    """Restore the adversarial image from a clean one; also return the unclipped difference."""
    count, stream = image.size * (1 if levels else 4), zlib.decompressobj()
    try:
        raw = stream.decompress(code, count + 1)  # bounds the memory of a malicious file
    except zlib.error as error:
        raise ValueError(f"a difference cannot be decompressed ({error})") from error
    if len(raw) != count or not stream.eof or stream.unused_data:
        of = f"more than {count}" if len(raw) > count else len(raw)
        raise ValueError(f"a difference of {of} bytes does not fit an image of shape {image.shape}")
    if levels:
        delta = np.frombuffer(raw, np.int8).reshape(image.shape).astype(np.float32)
        delta *= np.float32(step)
        return np.clip(image + delta, 0, 1), delta
    planes = np.frombuffer(raw, np.uint8).reshape(4, -1)
    bits = np.ascontiguousarray(planes.T).view("<u4").reshape(image.shape)
    point = (np.ascontiguousarray(image, "<f4").view("<u4") + bits).view("<f4")
    return point, point.astype(np.float64) - image


def point_of(bundle: Bundle, row: ImageRow, image: np.ndarray) -> tuple[np.ndarray, float]:
    """Restore the adversarial image f32[H,W,C] of a row, and measure its share of the radius.

    The length is taken before clipping to [0, 1], because no point can go further there. In l0 the
    share is 1: an attack may choose pixels that already have their best value.
    """
    with (bundle.folder / row["file"]).open("rb") as file:
        file.seek(row["offset"])
        code = file.read(row["bytes"])
    try:
        point, delta = _moved(code, image, row["levels"], row["step"])
    except ValueError as error:
        raise ValueError(f"image {row['image']}: {error}; download the bundle again") from error
    norm, epsilon = bundle.threat.values()
    edge = not row["levels"] and (np.isin(point, (0, 1)) & (point != image)).any()
    return point, 1.0 if edge or norm == "l0" else length(delta, norm) / epsilon


def length(delta: np.ndarray, norm: str) -> float:
    """Compute the norm of a difference f[H,W,C]; l0 counts pixels, not entries."""
    values = np.abs(delta).max(axis=-1) if norm == "l0" else delta
    return float(np.linalg.norm(values.ravel(), ORDER[norm]))


def outside(point: np.ndarray, image: np.ndarray, *, norm: str, epsilon: float) -> str | None:
    """Describe how an adversarial image breaks its bounds, or return None.

    For rounding, its norm may exceed the radius by 1e-5 of it plus 1e-6.
    """
    if not ((point >= 0) & (point <= 1)).all():  # also True for NaN
        return "outside the range"
    delta = point.astype(np.float64) - image.astype(np.float64)
    return None if length(delta, norm) <= epsilon * (1 + 1e-5) + 1e-6 else "outside the ball"


def is_right(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Mark images whose label has the largest logit of f[n,K] and whose logits are finite."""
    return (logits.argmax(axis=1) == labels) & np.isfinite(logits).all(axis=1)


def margin(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Compute the label's margin over all other logits as a share of their spread, f64[n]."""
    logits = np.asarray(logits, np.float64)
    is_label = np.arange(logits.shape[1]) == np.asarray(labels)[:, None]
    with np.errstate(invalid="ignore", divide="ignore"):
        by = logits[is_label] - np.where(is_label, -np.inf, logits).max(axis=1)
        return by / np.ptp(logits[:, _unmasked(logits)], axis=1)


def _unmasked(logits: np.ndarray) -> np.ndarray:
    """Find the classes not masked by a large negative constant, bool[K], as `types.unmasked`."""
    logits = np.asarray(logits, np.float64)[np.isfinite(logits).all(axis=1)]
    if not len(logits):
        return np.ones(logits.shape[1], bool)
    order = np.argsort(-logits.max(axis=0), kind="stable")
    size = np.maximum.accumulate(np.abs(logits[:, order]).max(axis=0))
    below = logits.max(axis=0)[order][2:] < np.minimum(-500.0, -200 * size[1:-1])
    count = int(below.argmax()) + 2 if below.any() else len(order)
    return np.isin(np.arange(len(order)), order[:count])


def pixels(image: np.ndarray) -> bytes:
    """Return the uint8 bytes of an image f32[H,W,C] of uint8 / 255, one per value."""
    return np.rint(np.asarray(image, np.float32) * np.float32(255)).astype(np.uint8).tobytes()


def withstood(bundle: Bundle) -> np.ndarray:
    """Return the share of corruptions, without `clean`, under which each image is right, f64[N]."""
    corrupted = [name != CLEAN for name in bundle.about["corruptions"]]
    return rights(bundle.rows)[:, corrupted].mean(axis=1)
