"""Contradictions within a bundle: every check that needs neither images nor a network.

Every number of the record that follows from the rows is recomputed, so no number can change
without a change of the adversarial images. The text of this module is part of the program in every
bundle.
"""

import bisect
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, TypedDict

import numpy as np

RecordJson = dict[str, Any]  # parsed JSON, because this program is self-contained


class ImageRow(TypedDict, total=False):
    """A line of images.jsonl; only fooled images have the keys after `sha256`."""

    image: int  # its place in the split
    label: int
    verdict: str  # "": robust; "clean": misclassified without an attack; else the attack
    sha256: str  # of the clean image
    levels: int  # of the difference; 0: it is exact
    step: float
    file: str
    offset: int
    bytes: int
    right: str  # common corruptions only, which have no verdict: a 0 or 1 for each


class BundleFacts(TypedDict, total=False):
    """The content of bundle.json."""

    schema: int
    image: list[int]  # H, W, C
    encoding: str
    levels: dict[str, int]  # levels -> images
    near_the_boundary: int  # images
    record: RecordJson
    split_images: int
    corruptions: list[str]  # only in a bundle of common corruptions: "clean", "fog-1", ...


Rows = list[ImageRow]
CORRUPTED_SCHEMA = 3  # of a bundle of common corruptions, which older programs cannot read
TASK_SCHEMA = 4  # of a bundle of a task, which no program without JAX can check
CLEAN = "clean"  # in place of a corruption's name: the clean images
ORDER = {"linf": np.inf, "l2": 2, "l1": 1, "l0": 0}
LEVELS = 127  # of a difference, at most
_REPLAY, _FULL = "replay", "full"  # stages before the attacks and after them
_OFF = 1e-6  # tolerance of shares and their intervals
_TYPES = {"image": int, "label": int, "verdict": str, "sha256": str}
_STORED = {"file": str, "offset": int, "bytes": int, "levels": int, "step": float}
_CORRUPTED_TYPES = {"image": int, "label": int, "sha256": str, "right": str}
# Facts that older bundles lack, worded for people; a missing fact is not compared.
_LACKING = {
    "split_images": "the number of images in its split",
    "interval": "the confidence intervals of its accuracies",
    "accuracy_after": "the accuracy after each attack",
    "costs": "the number of images that each attack fooled",
    "fingerprint": "the fingerprint of its network",
}


def fault(about: BundleFacts, rows: Rows, sizes: dict[str, int]) -> str | None:
    """Describe the first contradiction as "has ..." or "gives ...", or return None."""
    return next(_faults(about, rows, sizes), None)


def lacking(about: BundleFacts) -> list[str]:
    """List the facts, worded for people, that a bundle of an older version lacks."""
    facts: dict[str, Any] = {**about, **about["record"]}
    return [words for key, words in _LACKING.items() if facts.get(key) is None]


def kind(row: ImageRow) -> str:
    """Tell whether a row's image is standing, misclassified or fooled."""
    return {"": "standing", "clean": "misclassified"}.get(row["verdict"], "fooled")


def is_a(value: Any, wanted: type) -> bool:
    """Tell whether a JSON value has a type; true, false and NaN are not numbers."""
    if wanted is float:
        return type(value) in (int, float) and math.isfinite(value)
    return type(value) is wanted


def rights(rows: Rows) -> np.ndarray:
    """Read whether each image is classified correctly under each corruption, bool[N,C]."""
    return np.array([[mark == "1" for mark in row["right"]] for row in rows])


def _faults(about: BundleFacts, rows: Rows, sizes: dict[str, int]) -> Iterator[str]:
    is_corrupted = about["schema"] == CORRUPTED_SCHEMA
    yield from _types(rows, is_corrupted)
    yield from _ids(about, [row["image"] for row in rows])
    yield from _corruptions(about) if is_corrupted else _threat(about["record"])
    shape, side = about["image"], about["record"]["model"].get("image_size")
    if len(shape) != 3 or not all(is_a(length, int) and length > 0 for length in shape):
        yield f"has the invalid image shape {shape!r:.40}"
    if side is not None and list(shape[:2]) != [side, side]:
        yield f"has images of shape {shape}, but its record says {side} pixels"
    yield from _rows(about, rows, is_corrupted)
    if is_corrupted:
        yield from _corrupted_accuracies(about, rows)
    else:
        yield from _differences(rows, sizes)
        yield from _accuracies(about["record"], rows)


def _types(rows: Rows, is_corrupted: bool) -> Iterator[str]:
    if not rows:
        yield "has no images"
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            yield f"has {row!r:.40} in line {number}, which is not an object"
        wanted = _CORRUPTED_TYPES if is_corrupted else _TYPES
        if not is_corrupted and row.get("verdict") not in ("", CLEAN):
            wanted = _TYPES | _STORED
        for key, type_of_key in wanted.items():
            if not is_a(row.get(key), type_of_key):
                yield f"has the invalid {key} {row.get(key)!r:.40} in line {number}"


def _ids(about: BundleFacts, ids: list[int]) -> Iterator[str]:
    """Report if the rows are not exactly the images of the record."""
    if min(ids) < 0:
        yield f"has image {min(ids)}, but images are numbered from 0"
    if repeated := sorted(image for image, count in Counter(ids).items() if count > 1):
        yield f"has image {repeated[0]} twice"
    listed, spread = about["record"]["image_ids"], about["record"].get("image_choice") == "hash"
    runs = _runs(listed) if isinstance(listed, str) else []
    if not runs or (not spread and (len(runs) > 1 or runs[0].start)):
        yield f"covers images {listed!r:.40}, which are not the first images of a split"
    count, starts = sum(map(len, runs)), [run.start for run in runs]
    foreign = [i for i in ids if i not in runs[bisect.bisect_right(starts, i) - 1]]
    if foreign:
        yield f"has image {max(foreign)}, but its record covers {count:,} images, {listed:.40}"
    if count > len(ids):
        present = set(ids)
        missing = next(image for run in runs for image in run if image not in present)
        yield f"lacks {count - len(ids):,} of the {count:,} images of its record, such as {missing}"
    split = about.get("split_images")
    may_lack = split is None and about["schema"] < 2
    if not may_lack and (type(split) is not int or split <= runs[-1][-1]):
        yield f"covers {count:,} images of a split with {split!r:.20}"


def _runs(listed: str) -> list[range]:
    """Parse ascending places such as `0..99` or `3, 7..9`; return [] if they are invalid."""
    runs: list[range] = []
    for run in listed.split(", "):
        match = re.fullmatch(r"(\d{1,12})(?:\.\.(\d{1,12}))?", run)
        if not match or int(match[1]) < (runs[-1].stop if runs else 0):
            return []
        runs.append(range(int(match[1]), int(match[2] or match[1]) + 1))
    return runs if all(runs) else []


def _threat(record: RecordJson) -> Iterator[str]:
    balls = [(attack["norm"], attack["epsilon"]) for attack in record["attacks"]]
    if not balls:
        yield "lacks attacks"
    norm, epsilon = balls[0]
    if not isinstance(norm, str) or norm not in ORDER:
        yield f"has the norm {norm!r:.20}, which is not one of {', '.join(ORDER)}"
    if not is_a(epsilon, float) or epsilon <= 0 or (norm == "l0" and epsilon % 1):
        yield f"has the invalid radius {epsilon!r:.20}"
    if any(ball != balls[0] for ball in balls):
        yield "has attacks with several norms or radii, but a bundle supports only one"


def _corruptions(about: BundleFacts) -> Iterator[str]:
    wanted = [name for name, _ in _stated(about["record"])]
    if not wanted or about["corruptions"] != wanted:
        yield f"covers {about['corruptions']!r:.60}, but its record covers {', '.join(wanted):.60}"
    for name in wanted:
        if name != CLEAN and not re.fullmatch("[a-z_]+-[1-5]", name):
            yield f"has the unknown corruption {name!r:.40}"


def _stated(record: RecordJson) -> list[tuple[str, Any]]:
    """List a record's (corruption, accuracy) pairs, in order."""
    table = record["corruptions"]["accuracy"]
    listed = [(f"{name}-{level}", row[level]) for name, row in table.items() for level in row]
    return [*([] if record["clean"] is None else [(CLEAN, record["clean"])]), *listed]


def _rows(about: BundleFacts, rows: Rows, is_corrupted: bool) -> Iterator[str]:
    record, verdicts, count = about["record"], {"", CLEAN}, len(about.get("corruptions", ()))
    for stage in [] if is_corrupted else _stages(record):
        names = [attack["name"] for attack in record["attacks"]]
        verdicts |= {f"{name} (full)" for name in names} if stage == _FULL else {stage}
    classes = record["model"]["num_classes"]
    for place, row in enumerate(rows):
        image = row["image"]
        if not is_corrupted and row["verdict"] not in verdicts:
            yield (
                f"has the verdict {row['verdict']!r:.40} on image {image}, but its record has no "
                "such attack"
            )
        if is_corrupted and place and image < rows[place - 1]["image"]:
            yield f"has image {image} out of order, in line {place + 1}"
        if is_corrupted and not re.fullmatch(f"[01]{{{count}}}", row["right"]):
            yield f"has {row['right']!r:.40} for image {image}, but needs {count} digits (0 or 1)"
        if row["label"] < 0 or (classes is not None and row["label"] >= classes):
            yield f"has the label {row['label']} for image {image}, which is not a class"
        if not re.fullmatch("[0-9a-f]{64}", row["sha256"]):
            yield f"has the invalid sha256 {row['sha256']!r:.40} for image {image}"


def _differences(rows: Rows, sizes: dict[str, int]) -> Iterator[str]:
    for row in (row for row in rows if kind(row) == "fooled"):
        if not re.fullmatch(r"differences-\d+\.bin", row["file"]) or row["file"] not in sizes:
            yield f"has a difference in {row['file']!r:.40}, a file that SHA256SUMS does not list"
        start, end = row["offset"], row["offset"] + row["bytes"]
        if not 0 <= start < end <= sizes[row["file"]]:
            yield (
                f"has the difference of image {row['image']} at bytes {start} to {end} of "
                f"{row['file']}, which has only {sizes[row['file']]}"
            )
        if not 0 <= row["levels"] <= LEVELS or row["step"] < 0:
            yield f"has invalid levels for image {row['image']}: {row['levels']} of {row['step']}"


def _accuracies(record: RecordJson, rows: Rows) -> Iterator[str]:
    n = len(rows)
    right = sum(row["verdict"] != CLEAN for row in rows)
    robust = sum(row["verdict"] == "" for row in rows)
    rows_of = {"robust": ("robust", robust), "clean": ("correctly classified", right)}
    for key, (words, number) in rows_of.items():
        value = record[key]
        if not is_a(value, float) or abs(value - number / n) > _OFF:
            written = f"{value:.2%}" if is_a(value, float) else repr(value)
            yield f"has {number} {words} images of {n}, but its record says {written}"
    if intervals := record.get("interval"):
        for key in ("clean", "robust"):
            yield from _interval(intervals[key], key, record[key], n)
    yield from _attacks(record, rows, right)


def _attacks(record: RecordJson, rows: Rows, standing: int) -> Iterator[str]:
    """Report attacks whose counts differ from the rows; `standing` images faced the first."""
    stages = _stages(record)
    fooled = dict.fromkeys(stages, 0)
    for row in (row for row in rows if kind(row) == "fooled"):
        fooled[_FULL if row["verdict"].endswith(f" ({_FULL})") else row["verdict"]] += 1
    if after := record.get("accuracy_after"):
        if list(after) != stages:
            yield f"gives accuracies after {', '.join(after)}, not {', '.join(stages)}"
        for name, number in fooled.items():
            standing -= number
            if not is_a(after[name], float) or abs(after[name] - standing / len(rows)) > _OFF:
                by_rows = f"but its rows give {standing / len(rows):.6g}"
                yield f"gives {after[name]!r:.20} after {name}, {by_rows}"
    if costs := record.get("costs"):
        stated = dict.fromkeys((cost["attack"] for cost in costs), 0)
        for cost in costs:
            stated[cost["attack"]] += cost["fooled"]
        for name in (*fooled, *stated):
            if stated.get(name) != fooled.get(name, 0):
                yield (
                    f"says that {name} fooled {stated.get(name)} images, but has "
                    f"{fooled.get(name, 0)}"
                )


def _corrupted_accuracies(about: BundleFacts, rows: Rows) -> Iterator[str]:
    record, shares = about["record"], rights(rows).mean(axis=0).tolist()
    computed = dict(zip(about["corruptions"], shares, strict=True))
    computed["mean"] = float(np.mean([v for name, v in computed.items() if name != CLEAN]))
    stated = dict(_stated(record)) | {"mean": record["corruptions"]["mean"]}
    for name, value in stated.items():
        if not is_a(value, float) or abs(value - computed[name]) > _OFF:
            by_rows = f"but its rows give {computed[name]:g}"
            yield f"gives the accuracy {value!r:.20} for {name}, {by_rows}"
    if record.get("robust") is not None:
        yield f"gives the robust accuracy {record['robust']!r:.20}, which it does not measure"
    ends = (record.get("interval") or {}).get(CLEAN)
    if CLEAN in computed and ends:
        yield from _interval(ends, CLEAN, computed[CLEAN], len(rows))


def _interval(stated: Any, key: str, share: float, n: int) -> Iterator[str]:
    """Report if a stated 95% interval is not the interval of this share of n images."""
    ends = interval(round(share * n), n)
    pair = isinstance(stated, Sequence) and len(stated) == 2
    sound = pair and all(is_a(end, float) for end in stated)
    if not sound or max(abs(a - b) for a, b in zip(stated, ends, strict=True)) > _OFF:
        written = ", ".join(f"{end:.2%}" for end in ends)
        yield f"gives {stated!r:.60} as the 95% interval of {key}, but its rows give {written}"


def _stages(record: RecordJson) -> list[str]:
    names = [attack["name"] for attack in record["attacks"]]
    replayed = [_REPLAY] if record.get("replayed") else []
    return [*replayed, *names, *([_FULL] if _FULL in (record.get("accuracy_after") or {}) else [])]


def interval(successes: int, n: int) -> tuple[float, float]:
    """Compute the exact (Clopper-Pearson) 95% interval of a share, by bisection."""
    logs = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])
    ways = logs[n] - logs - logs[::-1]  # of choosing k among n, as a logarithm

    def tail(p: float, numbers: slice) -> float:  # probability of these numbers of successes
        k = np.arange(n + 1)
        return float(np.exp(ways + k * math.log(p) + (n - k) * math.log1p(-p))[numbers].sum())

    def root(numbers: slice, rises: bool) -> float:
        low, high = 0.0, 1.0
        for _ in range(50):
            middle = (low + high) / 2
            below = tail(middle, numbers) < 0.025
            low, high = (middle, high) if below == rises else (low, middle)
        return (low + high) / 2

    low = root(slice(successes, None), True) if successes else 0.0
    high = root(slice(0, successes + 1), False) if successes < n else 1.0
    return low, high
