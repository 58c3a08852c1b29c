"""AutoAttack's own implementation on an exported network, next to the verdicts of a record."""

import contextlib
import importlib.metadata
from pathlib import Path
from typing import Any

import numpy as np

from jaxrobust.data import EvaluationBatch
from jaxrobust.data.sources import registry
from jaxrobust.data.splits import spread
from jaxrobust.data.stream import pipeline
from jaxrobust.evaluation.records import records
from jaxrobust.evaluation.records.record import AccuracyRecord
from jaxrobust.publish.references import INSTALL
from jaxrobust.runtime.files import jsonl
from jaxrobust.runtime.text.progress import say
from jaxrobust.types import Threat

_NORMS = {"linf": "Linf", "l2": "L2"}
_BATCH = 250


def verdicts(
    net: Any, record: AccuracyRecord, ledger: Path, count: int, *, data_dir: str | None = None
) -> str:
    """Attack `count` images of a record with pyautoattack and count the equal verdicts."""
    try:
        import pyautoattack
    except ImportError as error:
        raise ValueError(f"--confirm needs pyautoattack: {INSTALL}") from error
    places, images, labels = _images(record, count, data_dir)
    recorded = _ours(ledger, record, places)
    ball = record.threats[0]
    say(f"pyautoattack on {len(images)} images in PyTorch, {ball}")
    confirmed = _theirs(pyautoattack, net, images, labels, ball)
    other = np.flatnonzero(recorded != confirmed)
    text = (
        f"pyautoattack {importlib.metadata.version('pyautoattack')} on the exported network in "
        f"PyTorch, {len(images):,} of the record's images: {len(images) - len(other):,} of "
        f"{len(images):,} verdicts agree"
    )
    if len(other):
        ids = [(places[i], "robust" if recorded[i] else "fooled") for i in other[:8]]
        shown = ", ".join(f"{place} ({verdict} here)" for place, verdict in ids)
        text += f", but not for image {shown}{', ...' * (len(other) > 8)}"
    return text


def _images(
    record: AccuracyRecord, count: int, data_dir: str | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Read some images of a record: their places in the split, the images, their labels."""
    model = record.model or {}
    source = registry.open_source(
        str(record.dataset), str(record.split), data_dir=data_dir, num_classes=model["num_classes"]
    ).for_channels(model.get("in_channels"))
    places = _places(record)
    # The images that a smaller record would spread over the split, if it has all; else the first.
    spread_places = spread.places(source, count)
    places = spread_places if np.isin(spread_places, places).all() else places[:count]
    parts = pipeline.evaluation_batches(
        source,
        batch_size=min(len(places), _BATCH),
        image_size=int(model["image_size"] or 0),
        preprocessing=record.preprocessing,
        places=places.tolist(),
    )
    with contextlib.closing(parts):
        fields = [np.concatenate(field)[: len(places)] for field in zip(*parts, strict=True)]
    batch = EvaluationBatch(*fields)
    images = batch.images.astype(np.float32) / np.float32(255)
    return places, images, batch.labels.astype(np.int64)


def _places(record: AccuracyRecord) -> np.ndarray:
    places = records.places(record.image_ids or "")
    return np.zeros(0, np.int64) if places is None else places


def _ours(ledger: Path, record: AccuracyRecord, places: np.ndarray) -> np.ndarray:
    """Read bool[N]: whether no attack fooled the image; an image not attacked was misclassified."""
    files = [ledger, *sorted(ledger.parent.glob(f"{ledger.stem}.process-*.jsonl"))]
    rows = [row for file in files for row in jsonl.read(file) if "image" in row]
    if not rows:
        raise ValueError(
            f"{ledger} is missing or empty: --confirm compares with the verdicts that an "
            "evaluation writes next to its records; give the results.jsonl in its folder"
        )
    last, every = record.attacks[-1]["name"], _places(record)
    standing = [r["image"] for r in rows if r["attack"] == last and not r["fooled"]]
    robust = np.isin(every, standing)
    if round((record.robust or 0) * len(every)) != robust.sum():
        raise ValueError(
            f"{ledger} has {robust.sum():,} robust images of {len(every):,}, but its record says "
            f"{record.robust:.2%}: it belongs to another evaluation; evaluate again with a new "
            "--out"
        )
    return np.isin(places, standing)


def _theirs(
    library: Any, net: Any, images: np.ndarray, labels: np.ndarray, ball: Threat
) -> np.ndarray:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    net = net.to(device).float().eval().requires_grad_(False)
    x = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).to(device)
    y = torch.from_numpy(labels).to(device)
    torch.manual_seed(0)
    attack = library.AutoAttack(
        net, norm=_NORMS[ball.norm], eps=ball.epsilon, version="standard", seed=0, device=device
    )
    _, predicted = attack.run_standard_evaluation(x, y, batch_size=_BATCH)
    return (predicted == y).cpu().numpy()
