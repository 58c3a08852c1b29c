"""Verdicts on disk, one by one, so that an evaluation continues where it was killed."""

import contextlib
import glob
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxrobust.runtime import hosts, jsonl, locks

_SHARE = "put the ledger into a folder that all hosts share"


class Ledger:
    """An append-only file of JSON lines beside a file of the adversarial images.

    The first line says which evaluation it belongs to, each other one is the verdict of an attack
    on an image. A process of a pod appends to a file of its own; at the start, each reads all,
    whatever number of processes wrote them. Without a path, everything stays in memory.
    No other process can open the file to append to it until `close`.
    """

    def __init__(self, path: str | Path | None, identity: dict[str, Any]) -> None:
        """Open or begin a ledger.

        Raises:
          ValueError: it belongs to another evaluation; says in what they differ. A damaged line.
            Another process appends to it.
        """
        self._records: dict[tuple[int, str], dict[str, Any]] = {}
        self._images: dict[tuple[int, str], tuple[Path | None, Any]] = {}
        self._path: Path | None = None
        self._lock = contextlib.ExitStack()
        if path is None:
            return
        first = Path(path)
        if first.suffix != ".jsonl":
            raise ValueError(f"ledger={str(path)!r}: name a file that ends in .jsonl")
        self._first, self._path = first, _of_process(first, jax.process_index())
        first.parent.mkdir(parents=True, exist_ok=True)
        others = f"{glob.escape(first.stem)}.process-*.jsonl"
        with contextlib.ExitStack() as opening:
            lock = self._path.with_suffix(".lock")
            what = f"ledger {self._path}"
            opening.enter_context(locks.held(lock, what=what, otherwise="pass another ledger"))
            for file in [first, *sorted(first.parent.glob(others))]:
                self._read(file, identity)
            with self._path.open("a+b") as lines:
                jsonl.mend(lines)
            if not self._path.stat().st_size:
                self._append({"identity": identity})
            self._lock = opening.pop_all()

    def _read(self, file: Path, identity: dict[str, Any]) -> None:
        lines = jsonl.read(file)
        if lines:
            _refuse_another(file, lines[0].get("identity"), identity)
        for number, record in enumerate(lines[1:], 2):
            if not _is_verdict(record):
                raise ValueError(f"{file}, line {number} is no verdict; remove that line")
            key = (record["image"], record["attack"])
            self._records[key] = record
            self._images[key] = (file.with_suffix(".images"), record.get("stored"))

    def check_files(self) -> None:
        """Raise ValueError if a process's file, which must be there by now, is not seen here."""
        files = [_of_process(self._first, k) for k in range(jax.process_count())]
        if missing := [str(file) for file in files if not file.exists()]:
            raise ValueError(
                f"process {jax.process_index()} does not see {', '.join(missing)}, where others "
                f"write; {_SHARE}"
            )

    def known(self) -> tuple[int, str]:
        """Return how many verdicts were read, and which, as a hash."""
        keys = repr(sorted(self._records)).encode()
        return len(self._records), hashlib.sha256(keys).hexdigest()

    def find(self, image: int, attack: str) -> dict[str, Any] | None:
        """Return the record of an attack on an image, by the image's id."""
        return self._records.get((image, attack))

    def adversarial(self, image: int, attack: str, shape: tuple[int, ...]) -> np.ndarray:
        """Return the adversarial image f32[H,W,C] of a record of a fooled image."""
        file, stored = self._images[image, attack]
        if file is None:
            return stored
        count = int(np.prod(shape))
        end = 4 * count * (stored + 1)
        if not file.exists() or file.stat().st_size < end:
            raise ValueError(
                f"{file} lacks the adversarial image of {attack} on image {image}; remove "
                f"{file.with_suffix('.jsonl')} too, to evaluate again"
            )
        return np.fromfile(file, np.float32, count, offset=end - 4 * count).reshape(shape)

    def add(self, record: dict[str, Any], adversarial: np.ndarray | None) -> None:
        """Append a record, after its image; a process that is killed later does not lose it."""
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

    def close(self) -> None:
        """Let another process append; what is in memory stays."""
        self._lock.close()

    def _append(self, record: dict[str, Any]) -> None:
        if self._path is not None:
            with self._path.open("a") as lines:
                lines.write(json.dumps(record) + "\n")


@contextlib.contextmanager
def open_ledger(path: str | Path | None, identity: dict[str, Any]) -> Iterator[Ledger]:
    """Yield the ledger, opened by all processes of a pod: none adds a verdict before all have read.

    Raises:
      ValueError: in all of them. What `Ledger` refuses in one; they evaluate different things; they
        do not see each other's files.
    """
    hosts.agree(identity)
    with contextlib.ExitStack() as opened:

        def opens() -> Ledger:
            return opened.enter_context(contextlib.closing(Ledger(path, identity)))

        # Process 0 goes first: a network file system may remember that a file was not there.
        book = hosts.together(lambda: None if jax.process_index() else opens())
        book = hosts.together(lambda: book or opens())
        if path is not None:
            hosts.together(book.check_files)
            seen = hosts.everyone(book.known())
            if len(set(seen)) > 1:
                counts = ", ".join(str(count) for count, _ in seen)
                raise ValueError(f"processes see different verdicts ({counts}) in {path}; {_SHARE}")
        yield book


def _refuse_another(path, theirs, ours):
    theirs = theirs if isinstance(theirs, dict) else {}
    # An older one has no hash of the weights: the logits must do.
    ours = {key: ours[key] for key in ours if key in theirs or not key.endswith("weights")}
    if words := hosts.differences(theirs, json.loads(json.dumps(ours))):
        raise ValueError(
            f"ledger {path} belongs to another evaluation: {words}. "
            "Pass another ledger, or the settings of that one"
        )


def _is_verdict(record):
    kinds = {"image": int, "attack": str, "fooled": bool, "flat": bool}
    stored = record.get("stored")
    return all(isinstance(record.get(key), kind) for key, kind in kinds.items()) and (
        not record["fooled"] or (isinstance(stored, int) and stored >= 0)
    )


def _of_process(path: Path, process: int) -> Path:
    if not process:
        return path
    return path.with_name(f"{path.stem}.process-{process}{path.suffix}")
