"""A bundle of a linear network on made-up images, and how somebody changes one."""

import json
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxrobust.evaluation.bundles import bundle, claims
from jaxrobust.evaluation.network import checks
from jaxrobust.evaluation.records import verdicts
from jaxrobust.evaluation.records.record import AccuracyRecord
from jaxrobust.evaluation.records.verdicts import Verdicts

N, NORM, EPSILON, SPLIT = 40, "linf", 8 / 255, 100
SHAPE = (8, 8, 3)
# A PyTorch network that multiplies by the array next to its file.
LINEAR_MODULE = """
from pathlib import Path
import numpy as np
import torch
def load():
    class Linear(torch.nn.Module):
        def forward(self, images):
            own = torch.from_numpy(np.load(Path(__file__).with_suffix(".npy")))
            return images.permute(0, 2, 3, 1).flatten(1) @ own
    return Linear()
"""
_WEIGHTS = np.random.default_rng(5).standard_normal((192, 10)).astype(np.float32)


def logits(images, ids=None):
    return images.reshape(len(images), -1) @ _WEIGHTS


def photographs(n, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (n, *SHAPE), np.uint8)
    return pixels / np.float32(255)


def attacked(images, labels, norm, epsilon, slack=1.0):
    """The steepest way out of a linear network's class, `slack` of the radius far."""
    scores = logits(images)
    scores[np.arange(len(images)), labels] = -np.inf
    way = (_WEIGHTS[:, scores.argmax(1)] - _WEIGHTS[:, labels]).T.reshape(images.shape)
    way = way * np.random.default_rng(1).uniform(0.5, 1, way.shape)
    if norm == "l0":  # the pixels that matter most
        size = np.abs(way).sum(axis=3).reshape(len(images), -1)
        chosen = size.argsort(axis=1).argsort(axis=1) >= size.shape[1] - int(slack * epsilon)
        way = np.where(chosen.reshape(*way.shape[:3], 1), way, 0)
        return np.clip(images + way, 0, 1).astype(np.float32)
    if norm == "linf":
        way = np.clip(way, -0.5, 0.5)
    order = {"linf": np.inf, "l2": 2, "l1": 1}[norm]
    length = np.linalg.norm(way.reshape(len(images), -1), order, axis=1)[:, None, None, None]
    points = images + way * (slack * epsilon / length)
    return np.clip(points, 0, 1).astype(np.float32)


class Honest(NamedTuple):
    """An evaluation, and the bundle of it."""

    images: np.ndarray
    found: Verdicts
    record: dict[str, Any]
    out: Path  # with verdicts and ledger
    folder: Path

    @property
    def labels(self) -> np.ndarray:
        return self.found.labels


def honest(root: Path, norm: str = NORM, epsilon: float = EPSILON) -> Honest:
    """Evaluate N images of a split of SPLIT with two attacks, and write the bundle."""
    images = photographs(N)
    right = logits(images).argmax(1)
    labels = np.where(np.arange(N) % 5 == 0, (right + 1) % 10, right).astype(np.int32)
    points = attacked(images, labels, norm, epsilon, 0.6)
    clean = right == labels
    robust = clean & (logits(points).argmax(1) == labels)
    by = np.where(np.arange(N) % 3 == 1, "square", "apgd-ce")
    fooled_by = np.where(clean, np.where(robust, "", by), "clean")
    norms = np.where(clean & ~robust, epsilon, 0.0)
    reached = np.where(clean & ~robust, logits(points).argmax(1), -1)
    found = Verdicts(np.arange(N, dtype=np.uint32), labels, clean, fooled_by, norms, reached)
    out = root / "out"
    out.mkdir()
    verdicts.write(out / "verdicts-a1.json", "a1", found)
    with (out / "ledger-a1.jsonl").open("w") as lines, (out / "ledger-a1.images").open("wb") as to:
        lines.write('{"identity": {}}\n')
        for count, i in enumerate(np.flatnonzero(clean & ~robust).tolist()):
            row = {"image": i, "attack": str(fooled_by[i]), "fooled": True, "flat": False}
            lines.write(json.dumps(row | {"stored": count}) + "\n")
            to.write(points[i].tobytes())
    values = AccuracyRecord().stamped().to_json() | {
        "evaluation": "a1",
        "dataset": "noise",
        "split": "test",
        "image_ids": f"0..{N - 1}",
        "preprocessing": "none",
        "method": "apgd-ce + square",
        "model": {"name": "linear", "num_classes": 10, "image_size": 8, "options": {}},
        "attacks": [
            {"name": name, "norm": norm, "epsilon": epsilon} for name in ("apgd-ce", "square")
        ],
        "fingerprint": {"images": "0" * 64},
        "verdicts": "verdicts-a1.json",
    }
    values |= numbers(fooled_by.tolist())
    record = AccuracyRecord.from_json(values)
    folder = root / "bundle"
    bundle.of_record(folder, record, out, images, logits, batch=7, split_images=SPLIT)
    return Honest(images, found, record, out, folder)


def numbers(fooled_by: list[str], names=("apgd-ce", "square")) -> dict[str, Any]:
    """What a record says of these verdicts; a careful forger computes it anew."""
    n = len(fooled_by)
    counts = {name: fooled_by.count(name) for name in ("", "clean", *names)}
    shares = {"clean": (n - counts["clean"]) / n, "robust": counts[""] / n}
    ends = {key: list(checks.binomial_interval(round(v * n), n)) for key, v in shares.items()}
    left, standing = {}, n - counts["clean"]
    for name in names:
        standing -= counts[name]
        left[name] = standing / n
    costs = [{"attack": name, "fooled": counts[name]} for name in names]
    return shares | {"interval": ends, "accuracy_after": left, "costs": costs}


def resigned(folder: Path) -> None:
    """Write the hashes of a folder anew, as a forger would."""
    names = [line.split("  ")[1] for line in (folder / claims.SUMS).read_text().splitlines()]
    sums = [f"{claims.file_sha256(folder / name)}  {name}\n" for name in names]
    (folder / claims.SUMS).write_text("".join(sums))


def changed(folder: Path, **changes: Any) -> None:
    """Change what bundle.json says."""
    about = json.loads((folder / claims.ABOUT).read_text())
    record = about["record"] | changes.pop("record", {})
    (folder / claims.ABOUT).write_text(json.dumps(about | {"record": record} | changes))
    resigned(folder)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """The lines of the images."""
    return [json.loads(line) for line in (folder / claims.ROWS).read_text().splitlines()]


def rows_changed(folder: Path, rows: list[dict[str, Any]], **record: Any) -> None:
    """Write lines of images, and a record whose numbers are those of the lines."""
    (folder / claims.ROWS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    told = json.loads((folder / claims.ABOUT).read_text())["record"] | record
    names = [attack["name"] for attack in told["attacks"]]
    names = ["replay"] * bool(told.get("replayed")) + names
    changed(folder, record=numbers([row["verdict"] for row in rows], names) | record)


def row_changed(folder: Path, place: int, **changes: Any) -> None:
    """Change what the line of an image says, and nothing else."""
    rows = rows_of(folder)
    rows[place] |= changes
    (folder / claims.ROWS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    resigned(folder)


def repainted(folder: Path, place: int, images: np.ndarray, count: int) -> None:
    """Change other pixels of a stored point by a little, until `count` pixels are changed."""
    row, path, image = rows_of(folder)[place], folder / "differences-0.bin", images[place]
    stored = path.read_bytes()
    code = stored[row["offset"] : row["offset"] + row["bytes"]]
    steps = np.frombuffer(zlib.decompress(code), np.int8).reshape(image.shape).copy()
    unchanged = np.argwhere((steps == 0).all(-1))
    for y, x in unchanged[: len(unchanged) - image[..., 0].size + count]:
        steps[y, x, 0] = 1 if image[y, x, 0] < 0.5 else -1
    code = zlib.compress(steps.tobytes())
    path.write_bytes(stored + code)
    row_changed(folder, place, offset=len(stored), bytes=len(code))
