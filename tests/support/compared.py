"""Evaluations of made-up networks with their verdicts, as `jaxrobust compare` reads them."""

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np

from jaxrobust.evaluation.records import verdicts
from jaxrobust.evaluation.records.record import AccuracyRecord
from jaxrobust.evaluation.records.verdicts import Verdicts

ATTACKS = ("apgd-ce", "apgd-t")
N = 600


def attacks(**changes) -> list[dict[str, Any]]:
    ball = {"norm": "linf", "epsilon": 8 / 255}
    own = [{"name": name, "steps": 100, "restarts": 1, "targets": 0} | ball for name in ATTACKS]
    return [attack | changes for attack in own]


def found(seed: int, *, n: int = N, first: int = 0, share: float = 0.5) -> Verdicts:
    """Verdicts of a made-up network: what is hard for one is mostly hard for all."""
    ids = np.arange(first, first + n)
    hard = np.random.default_rng(99).random(10_000)[ids]
    hard = hard + np.random.default_rng(seed).normal(0, 0.05, 10_000)[ids]
    clean, robust = hard < share + 0.3, hard < share
    by = np.where(np.random.default_rng(98).random(10_000)[ids] < 0.8, *ATTACKS)
    fooled_by = np.where(clean, np.where(robust, "", by), "clean")
    norms = np.where(clean & ~robust, 8 / 255, 0.0)
    labels, reached = (ids % 10).astype(np.int32), np.where(norms > 0, (ids + 1) % 10, -1)
    return Verdicts(ids.astype(np.uint32), labels, clean, fooled_by, norms, reached)


@functools.cache
def _empty() -> dict[str, Any]:
    return AccuracyRecord().stamped().to_json()


def write(folder: Path, seen: Verdicts, number: str = "a1", **changes) -> Path:
    """Add an evaluation to a folder: its record, and its verdicts next to it."""
    record = _empty() | {
        "evaluation": number,
        "config_sha256": "c" * 64,
        "weights": f"train, step {number}, ema",
        "weights_sha256": number * 32,
        "dataset": "cifar10",
        "split": "test",
        "preprocessing": "none",
        "attacks": attacks(),
        "clean": float(seen.clean.mean()),
        "robust": float(seen.robust.mean()),
        "seed": 0,
        "flags": {},
        "model": {"name": "resnet18", "image_size": 32, "num_classes": 10, "options": {}},
        "method": "autoattack standard",
        "search_dtype": "float32",
        "verdicts": verdicts.file_of(number),
    }
    record |= changes
    most = max((attack.get("epsilon", np.inf) for attack in record["attacks"]), default=np.inf)
    seen = seen._replace(norms=np.minimum(seen.norms, most))
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "results.jsonl").open("a") as lines:
        lines.write(json.dumps(record) + "\n")
    verdicts.write(folder / verdicts.file_of(number), number, seen)
    return folder
