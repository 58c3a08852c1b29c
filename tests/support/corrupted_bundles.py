"""A bundle of a linear network under two corruptions of made-up images, and how one is changed."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxrobust.evaluation.bundles import bundle, claims
from jaxrobust.evaluation.network import checks
from jaxrobust.evaluation.records.record import AccuracyRecord
from tests.support import bundles

NAMES, SPLIT = ("clean", "fog-1", "fog-4", "snow-2"), 100


class Corrupted(NamedTuple):
    """Images by corruption, their labels, and the bundle of them."""

    images: dict[str, np.ndarray]  # f32[N,H,W,C]
    labels: np.ndarray
    right: dict[str, np.ndarray]  # bool[N]
    folder: Path

    def shown(self, name, ids) -> np.ndarray:
        return self.images[name][np.asarray(ids)]


def corrupted(root: Path, *, clean: bool = True) -> Corrupted:
    """Write the bundle of the linear network on N images under corruptions."""
    names = NAMES if clean else NAMES[1:]
    images = {"clean": bundles.photographs(bundles.N)}
    for seed, name in enumerate(NAMES[1:], 1):
        light = bundles.photographs(bundles.N, seed) * np.float32(0.15 * seed)
        images[name] = np.rint((images["clean"] * 0.7 + light * 0.3) * 255) / np.float32(255)
    images = {name: images[name].astype(np.float32) for name in names}
    labels = bundles.logits(bundles.photographs(bundles.N)).argmax(1)
    labels[::7] = (labels[::7] + 1) % 10
    right = {name: bundles.logits(own).argmax(1) == labels for name, own in images.items()}
    values = AccuracyRecord().stamped().to_json() | {
        "evaluation": "c1",
        "dataset": "noise",
        "split": "test",
        "image_ids": f"0..{bundles.N - 1}",
        "preprocessing": "none",
        "method": "corruptions",
        "model": {"name": "linear", "num_classes": 10, "image_size": 8, "options": {}},
        "attacks": [],
        "seed": 0,
        "fingerprint": {"images": "0" * 64},
        "accuracy_after": {},
        "costs": [],
    }
    values |= numbers({name: own.tolist() for name, own in right.items()})
    folder = root / "corrupted"
    record = AccuracyRecord.from_json(values)
    how = {"ids": np.arange(bundles.N), "split_images": SPLIT, "batch": 7}
    bundle.of_corruptions(folder, record, images, labels, right, **how)
    return Corrupted(images, labels, right, folder)


def numbers(right: dict[str, list[bool]]) -> dict[str, Any]:
    """What a record says of these answers; a careful forger computes it anew."""
    shares = {name: float(np.mean(own)) for name, own in right.items()}
    clean = shares.pop("clean", None)
    table: dict[str, dict[str, float]] = {}
    for name, share in shares.items():
        kind, _, severity = name.partition("-")
        table.setdefault(kind, {})[severity] = share
    ends = None
    if clean is not None:
        n = len(right["clean"])
        ends = list(checks.binomial_interval(round(clean * n), n))
    return {
        "clean": clean,
        "robust": None,
        "interval": {"clean": ends, "robust": None},
        "corruptions": {
            "images": "computed",
            "accuracy": table,
            "mean": float(np.mean(list(shares.values()))),
            "frost_sha256": None,
            "seconds": 1.5,
        },
    }


def rows_changed(folder: Path, rows: list[dict[str, Any]], **record: Any) -> None:
    """Write lines of images, and a record whose numbers are those of the lines."""
    (folder / claims.ROWS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = json.loads((folder / claims.ABOUT).read_text())["corruptions"]
    marks = {name: [row["right"][i] == "1" for row in rows] for i, name in enumerate(names)}
    bundles.changed(folder, record=numbers(marks) | record)


def stored(folder: Path, images: dict[str, np.ndarray], labels: np.ndarray) -> Path:
    """Write images in the layout of CIFAR-10-C, each severity that is not there as zeros."""
    folder.mkdir()
    count = len(labels)
    kinds: dict[str, np.ndarray] = {}
    for name, own in images.items():
        kind, _, severity = name.partition("-")
        levels = 5 if severity else 1
        pixels = kinds.setdefault(kind, np.zeros((levels * count, *own.shape[1:]), np.uint8))
        pixels[(int(severity or 1) - 1) * count :][:count] = np.rint(own * 255)
    for kind, pixels in kinds.items():
        np.save(folder / f"{kind}.npy", pixels)
    np.save(folder / "labels.npy", np.tile(labels, 5))
    return folder
