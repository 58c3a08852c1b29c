"""Runs and evaluations that are made up in a moment, and what a page shows of them."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np

from jaxrobust.data import Prepared
from jaxrobust.data.sources import registry
from jaxrobust.evaluation.network import checks
from jaxrobust.evaluation.records import verdicts
from jaxrobust.evaluation.records.verdicts import Verdicts

ATTACKS = ("apgd-ce", "apgd-t")


def run(folder: Path, *, lines: int = 40, **config: Any) -> Path:
    """A run of two phases, whose metrics are functions of the step."""
    folder.mkdir(parents=True)
    own = {"batch_size": 10, "epochs": 4}
    whole = {"phases": ["pretrain", "train"], "pretrain": own, "train": own, "version": 1}
    whole |= {"attack": {"norm": "linf", "epsilon": 0.1}, "model": {"name": "convnext_n"}}
    (folder / "config.json").write_text(json.dumps(whole | config))
    (folder / "data.json").write_text(json.dumps({"data.train_split.records": 10 * lines // 4}))
    with (folder / "metrics.jsonl").open("w") as file:
        for phase in ("pretrain", "train"):
            for step in range(1, lines + 1):
                file.write(json.dumps({"phase": phase} | metrics(step)) + "\n")
            scores = {"selection_clean": 0.9, "selection_robust": 0.5, "selection_images": 100}
            file.write(json.dumps({"phase": phase, "step": lines} | scores) + "\n")
    return folder


def metrics(step: int) -> dict[str, Any]:
    seen = {"step": step, "loss": 2 / step, "robust": 1 - 1 / step, "lr": 1e-3 / step}
    return seen | {"images_per_second": 100.0 + step, "data_wait": 0.01, "skipped": 0}


def found(n: int, seed: int = 0, classes: int = 4) -> Verdicts:
    """Verdicts on n images: what is hard for one network is mostly hard for all."""
    hard = np.random.default_rng(9).random(n) + np.random.default_rng(seed).normal(0, 0.1, n)
    clean, robust = hard < 0.9, hard < 0.5
    by = np.where(np.arange(n) % 3 > 0, *ATTACKS)
    fooled_by = np.where(clean, np.where(robust, "", by), "clean")
    norms = np.where(clean & ~robust, 0.1, 0.0)
    ids = np.arange(n)
    labels = (ids % classes).astype(np.int32)
    others = (labels + 1 + (ids % 5 == 0)) % classes  # most are taken for the next class
    reached = np.where(clean & ~robust, others, -1).astype(np.int32)
    return Verdicts(ids.astype(np.uint32), labels, clean, fooled_by, norms, reached)


def record(seen: Verdicts, number: str, epsilon: float = 0.1) -> dict[str, Any]:
    """A record of these verdicts."""
    n = len(seen.labels)
    left = seen.clean & (seen.fooled_by != "apgd-ce")
    ball = {"norm": "linf", "epsilon": epsilon}
    costs = {"forward": 30, "backward": 20, "idle": 1, "seconds": 1.5, "compile_seconds": 0.5}
    keys = ("commit", "config_sha256", "device", "size", "training", "time")
    return dict.fromkeys(keys) | {
        "schema": 2,
        "evaluation": number,
        "weights": f"train, step {number}, ema",
        "weights_sha256": number * 16,
        "dataset": "digits",
        "split": "test",
        "image_ids": f"0..{n - 1}",
        "preprocessing": "none",
        "dtype": "float32",
        "matmul_precision": "highest",
        "attacks": [{"name": name, "steps": 20} | ball for name in ATTACKS],
        "clean": float(seen.clean.mean()),
        "robust": float(seen.robust.mean()),
        "accuracy_after": {"apgd-ce": float(left.mean()), "apgd-t": float(seen.robust.mean())},
        "seed": 0,
        "flags": {},
        "versions": {},
        "method": "apgd-ce + apgd-t, steps 20",
        "search_dtype": "float32",
        "model": {"name": "convnext_n", "image_size": 8, "num_classes": 4, "options": {}},
        "verdicts": verdicts.file_of(number),
        "interval": {
            key: list(checks.binomial_interval(int(right.sum()), n))
            for key, right in (("clean", seen.clean), ("robust", seen.robust))
        },
        "costs": [
            {"attack": name, "fooled": int((seen.fooled_by == name).sum())} | costs
            for name in ATTACKS
        ],
    }


def evaluation(
    folder: Path, number: str = "a1", *, n: int = 60, seed: int = 0, epsilon: float = 0.1,
    classes: int = 4, **changes: Any,
) -> Verdicts:  # fmt: skip
    """Add an evaluation to a folder: its record, and its verdicts next to it."""
    folder.mkdir(parents=True, exist_ok=True)
    seen = found(n, seed, classes)
    seen = seen._replace(norms=np.minimum(seen.norms, epsilon))
    with (folder / "results.jsonl").open("a") as lines:
        lines.write(json.dumps(record(seen, number, epsilon) | changes) + "\n")
    verdicts.write(folder / verdicts.file_of(number), number, seen)
    return seen


def ledger(folder: Path, fooled: dict[int, tuple[str, int]], number: str = "a1") -> np.ndarray:
    """Write a ledger of digits, whose adversarial images are 0.25 brighter, which are returned."""
    source = registry.open_source("digits", "test")
    images = Prepared(source, image_size=8, preprocessing="none", places=range(60))[:]
    rows = [{"identity": {"image": [8, 8, 1], "norm": "linf", "epsilon": 0.25}}]
    with (folder / f"ledger-{number}.images").open("wb") as file:
        for stored, (image, (attack, iterations)) in enumerate(fooled.items()):
            file.write(np.minimum(images[image] + 0.25, 1).astype(np.float32).tobytes())
            verdict = {"image": image, "attack": attack, "fooled": True, "stored": stored}
            rows.append(verdict | {"iterations": iterations, "flat": False})
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / f"ledger-{number}.jsonl").write_text(lines)
    return images


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.data: dict[str, Any] = {}
        self._in: list[str] = []
        self._id: str | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        said = dict(attrs)
        self.tags.append((tag, said))
        self._in.append(tag)
        if tag == "script":
            self._id = said.get("id")

    def handle_endtag(self, tag: str) -> None:
        while self._in and self._in.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        inside = self._in[-1] if self._in else ""
        if inside == "script" and self._id:
            self.data[self._id.removeprefix("data-")] = json.loads(data)
        elif inside not in ("script", "style"):
            self.text.append(data)


def read(page: str) -> tuple[dict[str, Any], str, list[tuple[str, dict[str, str | None]]]]:
    """The data of a page's figures by their names, its text, and its elements."""
    seen = _Page()
    seen.feed(page)
    return seen.data, re.sub(r"\s+", " ", " ".join(seen.text)), seen.tags
