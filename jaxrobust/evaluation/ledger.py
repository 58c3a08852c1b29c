"""Verdicts on disk, one by one, so that an evaluation continues where it was killed."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxrobust import metrics


class Ledger:
    """An append-only file of JSON lines beside a file of the adversarial images.

    The first line says which evaluation it belongs to, each other one is the verdict of an attack
    on an image. A process of a pod appends to a file of its own and reads those of all others.
    Without a path, everything stays in memory.
    """

    def __init__(self, path: str | Path | None, identity: dict[str, Any]):
        """Opens or begins a ledger.

        Raises:
          ValueError: it belongs to another evaluation; says in what they differ. A damaged line.
        """
        self._records: dict[tuple[int, str], dict[str, Any]] = {}
        self._images: dict[tuple[int, str], tuple[Path | None, Any]] = {}
        self._path: Path | None = None
        if path is None:
            return
        self._path = Path(path)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if process := jax.process_index():
            self._path = self._path.with_name(f"{self._path.stem}.{process}{self._path.suffix}")
        first = Path(path)
        for file in [first, *first.parent.glob(f"{first.stem}.[0-9]*{first.suffix}")]:
            lines = metrics.read(file)
            if lines:
                _refuse_another(file, lines[0].get("identity"), identity)
            for record in lines[1:]:
                key = (record["image"], record["attack"])
                self._records[key] = record
                self._images[key] = (file.with_suffix(".images"), record.get("stored"))
        _drop_unfinished_line(self._path)
        if not self._path.exists() or not self._path.stat().st_size:
            self._append({"identity": identity})

    def find(self, image: int, attack: str) -> dict[str, Any] | None:
        """The record of an attack on an image, by the image's id."""
        return self._records.get((image, attack))

    def adversarial(self, image: int, attack: str, shape: tuple[int, ...]) -> np.ndarray:
        """The adversarial image f32[H,W,C] of a record of a fooled image."""
        file, stored = self._images[image, attack]
        if file is None:
            return stored
        count = int(np.prod(shape))
        return np.fromfile(file, np.float32, count, offset=4 * count * stored).reshape(shape)

    def add(self, record: dict[str, Any], adversarial: np.ndarray | None) -> None:
        """Appends a record; what was added is on disk when this returns, image first."""
        key = (record["image"], record["attack"])
        file: Path | None = None
        stored: Any = adversarial
        if self._path is not None and adversarial is not None:
            file = self._path.with_suffix(".images")
            with file.open("ab") as images:
                stored = images.tell() // adversarial.nbytes
                images.truncate(stored * adversarial.nbytes)  # one that a kill cut off
                images.write(np.ascontiguousarray(adversarial, np.float32).tobytes())
            record = record | {"stored": stored}
        self._records[key], self._images[key] = record, (file, stored)
        self._append(record)

    def _append(self, record: dict[str, Any]) -> None:
        if self._path is not None:
            with self._path.open("a") as lines:
                lines.write(json.dumps(record) + "\n")


def _refuse_another(path, theirs, ours):
    theirs = theirs if isinstance(theirs, dict) else {}
    ours = json.loads(json.dumps(ours))
    differing = [k for k in {**theirs, **ours} if theirs.get(k) != ours.get(k)]
    if differing:
        parts = [
            f"{k} is {_short(theirs.get(k))} there, {_short(ours.get(k))} here" for k in differing
        ]
        raise ValueError(
            f"ledger {path} belongs to another evaluation: {'; '.join(parts)}. "
            "Pass another ledger, or the settings of that one"
        )


def _short(value):
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _drop_unfinished_line(path):
    """Removes what a killed process left of its last line."""
    if path.exists():
        text = path.read_bytes()
        if not text.endswith(b"\n"):
            with path.open("r+b") as lines:
                lines.truncate(text.rfind(b"\n") + 1)
