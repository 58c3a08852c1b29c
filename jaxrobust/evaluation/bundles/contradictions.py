"""In what a bundle contradicts itself: all that no image and no network is needed for.

Every number of its record that its rows give is computed again from them, so that whoever changes
one number has to change the adversarial images. The text of this module is a part of the program in
every bundle.
"""

import bisect
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, TypedDict

import numpy as np

RecordJson = dict[str, Any]  # as JSON has it: this program stands alone


class ImageRow(TypedDict, total=False):
    """A line of images.jsonl; the keys after `sha256` are those of an image that was fooled."""

    image: int  # its place in the split
    label: int
    verdict: str  # "": it stands; "clean": misclassified as it is; else the attack
    sha256: str  # of the clean image
    levels: int  # of the difference; 0: it is exact
    step: float
    file: str
    offset: int
    bytes: int
    right: str  # of common corruptions alone, which have no verdict: a 0 or 1 for each


class BundleFacts(TypedDict, total=False):
    """The content of bundle.json."""

    schema: int
    image: list[int]  # H, W, C
    encoding: str
    levels: dict[str, int]  # levels -> images
    near_the_boundary: int  # images
    record: RecordJson
    split_images: int
    corruptions: list[str]  # of a bundle of common corruptions alone: "clean", "fog-1", ...


Rows = list[ImageRow]
ORDER = {"linf": np.inf, "l2": 2, "l1": 1}
LEVELS = 127  # of a difference, at most
_REPLAY, _FULL = "replay", "full"  # what was tried before the attacks, and once more after them
OFF = 1e-6  # of shares and their intervals, whatever computed them
_KINDS = {"image": int, "label": int, "verdict": str, "sha256": str}
_STORED = {"file": str, "offset": int, "bytes": int, "levels": int, "step": float}
# What older bundles lack, for people; where a record has nothing there is nothing to compare.
_LACKING = {
    "split_images": "how many images its split has",
    "interval": "the interval of its accuracies",
    "accuracy_after": "what each attack left",
    "costs": "how many images each attack fooled",
    "fingerprint": "what its network computes",
}


def fault(about: BundleFacts, rows: Rows, sizes: dict[str, int]) -> str | None:
    """Say in what a bundle contradicts itself, as "has ..." or "says ..."; None: in nothing."""
    checks = (_types, ids, _threat, _verdicts, _differences, _shares, _intervals, _after, _costs)
    return next((problem for check in checks if (problem := check(about, rows, sizes))), None)


def lacking(about: BundleFacts) -> list[str]:
    """List for people what a bundle does not say, as those of an older version do not."""
    known: dict[str, Any] = {**about, **about["record"]}
    return [words for key, words in _LACKING.items() if known.get(key) is None]


def kind(row: ImageRow) -> str:
    """Tell whether a row's image is standing, misclassified or fooled."""
    return {"": "standing", "clean": "misclassified"}.get(row["verdict"], "fooled")


def is_a(value: Any, wanted: type) -> bool:
    """Tell whether a value of JSON has a type; true and false are no numbers, NaN is none."""
    if wanted is float:
        return type(value) in (int, float) and math.isfinite(value)
    return type(value) is wanted


def _types(about: BundleFacts, rows: Rows, sizes: dict[str, int]) -> str | None:
    def fields(row: ImageRow) -> dict[str, type]:
        return _KINDS | ({} if row.get("verdict") in ("", "clean") else _STORED)

    return wrong_types(rows, fields)


def wrong_types(rows: Rows, fields: Callable[[ImageRow], dict[str, type]]) -> str | None:
    """Say which value of a row has another type than `fields` of the row wants."""
    if not rows:
        return "has no images"
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            return f"has {row!r:.40} for the image of line {number}, which is none"
        for key, wanted in fields(row).items():
            if not is_a(row.get(key), wanted):
                return f"has {row.get(key)!r:.40} for the {key} of line {number}, which is none"
    return None


def ids(about: BundleFacts, rows: Rows, sizes: dict[str, int]) -> str | None:
    """Say how the rows are not of the images of the record, each once."""
    own = [row["image"] for row in rows]
    if min(own) < 0:
        return f"has the image {min(own)}, and images are numbered from 0"
    if repeated := sorted(image for image, count in Counter(own).items() if count > 1):
        return f"has an image twice: {repeated[0]}"
    listed, spread = about["record"]["image_ids"], about["record"].get("image_choice") == "hash"
    runs = _runs(listed) if isinstance(listed, str) else []
    if not runs or (not spread and (len(runs) > 1 or runs[0].start)):
        return f"is of the images {listed!r:.40}, which are not the first ones of a split"
    count, there = sum(map(len, runs)), set(own)
    starts = [run.start for run in runs]
    foreign = [i for i in own if i not in runs[bisect.bisect_right(starts, i) - 1]]
    if foreign:
        return f"has the image {max(foreign)}, and its record is of {count:,}, {listed:.40}"
    if count > len(own):
        missing = next(image for run in runs for image in run if image not in there)
        left_out = count - len(own)
        return f"leaves out {left_out:,} of the {count:,} images of its record, as {missing}"
    split = about.get("split_images")
    if split is None and about["schema"] < 2:
        return None
    if type(split) is not int or split <= runs[-1][-1]:
        return f"is of {count:,} images of a split that has {split!r:.20}"
    return None


def _runs(listed: str) -> list[range]:
    """Read places such as `0..99` or `3, 7..9`, which rise; empty: they are none."""
    runs: list[range] = []
    for run in listed.split(", "):
        found = re.fullmatch(r"(\d{1,12})(?:\.\.(\d{1,12}))?", run)
        if not found or int(found[1]) < (runs[-1].stop if runs else 0):
            return []
        runs.append(range(int(found[1]), int(found[2] or found[1]) + 1))
    return runs if all(runs) else []


def _threat(about: BundleFacts, rows: Rows, sizes: dict[str, int]) -> str | None:
    record = about["record"]
    balls = [(attack["norm"], attack["epsilon"]) for attack in record["attacks"]]
    if not balls:
        return "lacks attacks"
    norm, epsilon = balls[0]
    if not isinstance(norm, str) or norm not in ORDER:
        return f"has another norm than {', '.join(ORDER)}: {norm!r:.20}"
    if not is_a(epsilon, float) or epsilon <= 0:
        return f"has the radius {epsilon!r:.20}, which is none"
    if any(ball != balls[0] for ball in balls):
        return "has attacks of several norms or radii, of which one ball shows nothing"
    return wrong_shape(about)


def wrong_shape(about: BundleFacts) -> str | None:
    """Say how the images of a bundle have no shape, or another one than the record's."""
    shape, side = about["image"], about["record"]["model"].get("image_size")
    if len(shape) != 3 or not all(is_a(length, int) and length > 0 for length in shape):
        return f"has images of the shape {shape!r:.40}, which is none"
    if side is not None and list(shape[:2]) != [side, side]:
        return f"has images of the shape {shape}, and its record is of {side} pixels"
    return None


def _verdicts(about: BundleFacts, rows: Rows, sizes: dict[str, int]) -> str | None:
    record, known = about["record"], {"", "clean"}
    for stage in _stages(record):
        names = [attack["name"] for attack in record["attacks"]]
        known |= {f"{name} (full)" for name in names} if stage == _FULL else {stage}
    classes = record["model"]["num_classes"]
    for row in rows:
        if row["verdict"] not in known:
            return (
                f"has the verdict {row['verdict']!r:.40} on image {row['image']}, which is no "
                "attack of its record"
            )
        if problem := wrong_label_or_hash(row, classes):
            return problem
    return None


def wrong_label_or_hash(row: ImageRow, classes: int | None) -> str | None:
    """Say how the label of a row is no class, or its hash none."""
    if row["label"] < 0 or (classes is not None and row["label"] >= classes):
        return f"has the label {row['label']} for image {row['image']}, which is no class"
    if not re.fullmatch("[0-9a-f]{64}", row["sha256"]):
        return f"has {row['sha256']!r:.40} for the sha256 of image {row['image']}"
    return None


def _differences(about: BundleFacts, rows: Rows, sizes: dict[str, int]) -> str | None:
    for row in rows:
        if kind(row) != "fooled":
            continue
        if not re.fullmatch(r"differences-\d+\.bin", row["file"]) or row["file"] not in sizes:
            return f"has a difference in {row['file']!r:.40}, a file that SHA256SUMS does not list"
        ends = row["offset"], row["offset"] + row["bytes"]
        if not 0 <= ends[0] < ends[1] <= sizes[row["file"]]:
            return (
                f"has a difference of image {row['image']} at bytes {ends[0]} to {ends[1]} of "
                f"{row['file']}, which has {sizes[row['file']]}"
            )
        if not 0 <= row["levels"] <= LEVELS or row["step"] < 0:
            return f"has {row['levels']} levels of {row['step']} for image {row['image']}"
    return None


def _shares(about: BundleFacts, rows: Rows, sizes: dict[str, int]) -> str | None:
    names = {"robust": ("", "robust"), "clean": ("clean", "rightly classified")}
    for key, (verdict, words) in names.items():
        number = sum(row["verdict"] == verdict for row in rows)
        number = number if key == "robust" else len(rows) - number
        value = about["record"][key]
        if not is_a(value, float) or abs(value - number / len(rows)) > OFF:
            written = f"{value:.2%}" if is_a(value, float) else repr(value)
            return f"has {number} {words} images of {len(rows)}, and its record says {written}"
    return None


def _intervals(about: BundleFacts, rows: Rows, sizes: dict[str, int]) -> str | None:
    if not (stated := about["record"].get("interval")):
        return None
    shares = {key: about["record"][key] for key in ("clean", "robust")}
    found = (wrong_interval(stated[key], key, share, len(rows)) for key, share in shares.items())
    return next((problem for problem in found if problem), None)


def wrong_interval(stated: Any, key: str, share: float, n: int) -> str | None:
    """Say how a stated 95 % interval is not that of a share of n images."""
    ends = interval(round(share * n), n)
    pair = isinstance(stated, Sequence) and len(stated) == 2
    sound = pair and all(is_a(end, float) for end in stated)
    if not sound or max(abs(a - b) for a, b in zip(stated, ends, strict=True)) > OFF:
        ours = ", ".join(f"{end:.2%}" for end in ends)
        return f"says {stated!r:.60} for the 95 % interval of {key}, and its rows give {ours}"
    return None


def _stages(record: RecordJson) -> list[str]:
    names = [attack["name"] for attack in record["attacks"]]
    before = [_REPLAY] if record.get("replayed") else []
    return [*before, *names, *([_FULL] if _FULL in (record.get("accuracy_after") or {}) else [])]


def _fooled(record: RecordJson, rows: Rows) -> dict[str, int]:
    counts = dict.fromkeys(_stages(record), 0)
    for row in rows:
        if kind(row) == "fooled":
            counts[_FULL if row["verdict"].endswith(f" ({_FULL})") else row["verdict"]] += 1
    return counts


def _after(about: BundleFacts, rows: Rows, sizes: dict[str, int]) -> str | None:
    record = about["record"]
    if not (stated := record.get("accuracy_after")):
        return None
    if list(stated) != (stages := _stages(record)):
        return f"says what {', '.join(stated)} left, and has the attacks {', '.join(stages)}"
    left = sum(row["verdict"] != "clean" for row in rows)
    for name, fooled in _fooled(record, rows).items():
        left -= fooled
        if not is_a(stated[name], float) or abs(stated[name] - left / len(rows)) > OFF:
            return (
                f"says {stated[name]!r:.20} after {name}, and its rows give {left / len(rows):.6g}"
            )
    return None


def _costs(about: BundleFacts, rows: Rows, sizes: dict[str, int]) -> str | None:
    record = about["record"]
    if not (costs := record.get("costs")):
        return None
    fooled, stated = _fooled(record, rows), dict.fromkeys((cost["attack"] for cost in costs), 0)
    for cost in costs:
        stated[cost["attack"]] += cost["fooled"]
    for name in (*fooled, *stated):
        if stated.get(name) != fooled.get(name, 0):
            return (
                f"says that {name} fooled {stated.get(name)} images, and has {fooled.get(name, 0)}"
            )
    return None


def interval(successes: int, n: int) -> tuple[float, float]:
    """Compute the exact (Clopper-Pearson) 95 % interval of a share, by bisection."""
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
