"""Verdicts stored on disk one by one, so that a killed evaluation can resume."""

import contextlib
import glob
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxrobust.evaluation.network import fingerprint, randomised
from jaxrobust.evaluation.records import records
from jaxrobust.runtime.files import jsonl, locks, whole
from jaxrobust.runtime.processes import hosts
from jaxrobust.runtime.text.progress import say

_SHARE = "put the ledger in a folder that all hosts share"
# Fields kept in memory per attack and image; the others of a record are only on disk.
ROW = np.dtype(
    [
        ("known", "?"),
        ("fooled", "?"),
        ("once", "?"),  # fooled by one draw; same as `fooled` unless the network is randomized
        ("flat", "?"),
        ("doubtful", "?"),  # a point was found that the last pass did not confirm
        ("file", "u2"),  # number of the file with its adversarial image
        ("stored", "i4"),  # its place there
        ("norm", "f8"),  # of the perturbation
        ("reached", "i4"),  # predicted class there; -1: none, or written by an older version
        ("steps", "i4"),  # of all jobs up to the one that fooled; 0: written by an older version
    ]
)


PART = " (part)"  # suffix of an attack's name: only some of its jobs ran, and found nothing


class TriedJobs(NamedTuple):
    """The jobs of a part of an attack: its targets, and the number of first restarts of each."""

    targets: list[int]
    restarts: int


Results = tuple[np.ndarray, list[np.ndarray]]  # ROW[n], and points not stored in a file


class Ledger:
    """An append-only file of JSON lines next to a file of the adversarial images.

    The first line identifies the evaluation; each other line is the verdict of an attack on an
    image. Each process of a pod appends to its own file; at the start it reads all files, however
    many processes wrote them. Without a path, everything stays in memory.
    Until `close`, no other process can open the file for appending.
    """

    def __init__(self, path: str | Path | None, identity: dict[str, Any], ids: np.ndarray) -> None:
        """Open or create a ledger of images with these ids, u32[N]; places are 0 to N - 1."""
        self._ids, self._path = ids, None if path is None else Path(path)
        self._rows: dict[str, np.ndarray] = {}  # attack -> ROW[N]
        self._tried: dict[tuple[int, str], TriedJobs] = {}  # of verdicts of parts
        self._files: list[Path] = []  # of adversarial images
        self._points: dict[tuple[int, str], np.ndarray] = {}  # those without a file
        self.begun_by: dict[str, str] | None = None  # versions, if different from today's
        self._lock = contextlib.ExitStack()
        self._unwritten: dict[str, Any] | None = None  # the first line, until a second is written
        self._noted: dict[str, Any] = {}  # other facts in that line
        self._read_from: list[tuple[Path, np.ndarray | None]] = []  # files, and clean answers there
        if self._path is None:
            return
        first = self._first = self._path
        if first.suffix != ".jsonl":
            raise ValueError(f"ledger={str(path)!r}: name a file that ends in .jsonl")
        self._path = _of_process(first, jax.process_index())
        first.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as opening:
            lock, resource = self._path.with_suffix(".lock"), f"ledger {self._path}"
            opening.enter_context(
                locks.held(lock, resource=resource, otherwise="pass another ledger")
            )
            others = first.parent.glob(f"{glob.escape(first.stem)}.process-*.jsonl")
            for file in [first, *sorted(others)]:
                self._read(file, identity)
            with self._path.open("a+b") as lines:
                jsonl.mend(lines)
            if not self._path.stat().st_size:
                self._unwritten = identity
            self._lock = opening.pop_all()

    def _read(self, file: Path, identity: dict[str, Any]) -> None:
        lines = jsonl.read(file)
        if lines:
            self.begun_by = _begun_by(file, lines[0].get("identity"), identity) or self.begun_by
        if not lines[1:]:
            return
        answers = lines[0].get("answers")
        self._read_from.append((file, None if answers is None else np.array(answers)))
        places = {image: place for place, image in enumerate(self._ids.tolist())}
        for number, record in enumerate(lines[1:], 2):
            if not _is_verdict(record):
                raise ValueError(f"{file}, line {number} is not a verdict; remove that line")
            if record["image"] not in places:
                raise ValueError(
                    f"{file}, line {number} is about image {record['image']}, which is not "
                    "evaluated here; remove that line"
                )
            self._keep(places[record["image"]], file, record)

    def _keep(self, place: int, file: Path | None, record: dict[str, Any]) -> None:
        self._rows_of(record["attack"])[place] = (
            *(True, record["fooled"], record.get("once", record["fooled"]), record["flat"]),
            *(record.get("doubtful", False), self._number(file), record.get("stored", 0)),
            *(record.get("norm", 0.0), record.get("reached", -1), record.get("iterations", 0)),
        )
        if tried := record.get("tried"):
            self._tried[place, record["attack"]] = TriedJobs(tried["targets"], tried["restarts"])

    def confirm(
        self, answers: np.ndarray, right: np.ndarray, sure: np.ndarray, hashes: np.ndarray
    ) -> None:
        """Raise if the ledger's network predicts other classes for clean images; else store these.

        Older versions noted no answers, but the images that they attacked were classified right.

        Args:
          answers: i[N], the predicted class of each image; -1: none.
          right: bool[N], whether it is the label.
          sure: bool[N], whether rounding cannot change the answer.
          hashes: str[N], of the images, for evaluations that replay the ledger.
        """
        ids = records.ranges(self._ids.tolist())
        self._noted = {"image_ids": ids, "answers": answers.tolist(), "hashes": hashes.tolist()}
        attacked = np.zeros(len(answers), bool)
        for rows in self._rows.values():
            attacked |= rows["known"]
        for file, old_answers in self._read_from:
            older = old_answers is None or old_answers.shape != answers.shape
            others = int((sure & (attacked & ~right if older else old_answers != answers)).sum())
            if others:
                raise ValueError(
                    f"ledger {file} belongs to another evaluation: its network gave "
                    f"different answers on {others:,} of {len(answers):,} clean images. Pass "
                    "another ledger, or that network"
                )
            if older:
                say(
                    f"WARNING: {file} was written by an older version that stored no answers. The "
                    "only evidence that it belongs to this network is a few noisy images and the "
                    f"{int(attacked.sum()):,} attacked images (of {len(answers):,}), which "
                    "this network also classifies correctly"
                )

    def _number(self, file: Path | None) -> int:
        if file is None:
            return 0
        images = file.with_suffix(".images")
        if images not in self._files:
            self._files.append(images)
        return self._files.index(images)

    def check_files(self) -> None:
        """Raise ValueError if this process cannot see the file of every process."""
        files = [_of_process(self._first, k) for k in range(jax.process_count())]
        if missing := [str(file) for file in files if not file.exists()]:
            raise ValueError(
                f"process {jax.process_index()} cannot see {', '.join(missing)}, which other "
                f"processes write; {_SHARE}"
            )

    def known(self) -> tuple[int, str]:
        """Return the number of verdicts read, and their hash."""
        digest, count = hashlib.sha256(repr(sorted(self._rows)).encode()), 0
        for _, rows in sorted(self._rows.items()):
            digest.update(rows["known"].tobytes())
            count += int(rows["known"].sum())
        return count, digest.hexdigest()

    def rows(self, attack: str) -> np.ndarray:
        """Look up an attack's verdicts on each image, ROW[N]; those of parts are read-only."""
        if attack.endswith(PART) and attack not in self._rows:  # most attacks have none
            return np.broadcast_to(np.zeros((), ROW), len(self._ids))
        return self._rows_of(attack)

    def _rows_of(self, attack: str) -> np.ndarray:
        return self._rows.setdefault(attack, np.zeros(len(self._ids), ROW))

    def tried(self, place: int, attack: str) -> TriedJobs:
        """Look up the jobs behind the verdict of a part of an attack."""
        return self._tried[place, attack + PART]

    def adversarial(self, place: int, attack: str, shape: tuple[int, ...]) -> np.ndarray:
        """Read the adversarial image f32[H,W,C] of an image that the attack fooled."""
        if (place, attack) in self._points:
            return self._points[place, attack]
        row, count = self._rows[attack][place], int(np.prod(shape))
        file, start = self._files[row["file"]], 4 * count * int(row["stored"])
        if not file.exists() or file.stat().st_size < start + 4 * count:
            raise ValueError(
                f"{file} lacks the adversarial image from {attack} for image {self._ids[place]}; "
                f"to evaluate again, remove {file.with_suffix('.jsonl')} too"
            )
        return np.fromfile(file, np.float32, count, offset=start).reshape(shape)

    def add(self, place: int, record: dict[str, Any], adversarial: np.ndarray | None) -> None:
        """Append a record after its image, so that a kill from then on does not lose it."""
        self.write_identity()
        record = {"image": int(self._ids[place])} | record
        if adversarial is not None and self._path is None:
            self._points[place, record["attack"]] = adversarial
        elif adversarial is not None and self._path is not None:
            file, point = self._path.with_suffix(".images"), np.asarray(adversarial, np.float32)
            with whole.explained(file), file.open("ab") as images:
                stored = images.tell() // point.nbytes
                images.truncate(stored * point.nbytes)  # drop an image that a kill cut off
                images.write(point.tobytes())
            record = record | {"stored": stored}
        self._keep(place, self._path, record)
        self._append(record)

    def results(self, places: np.ndarray, attack: str) -> Results:
        """Gather this process's results on images that the attack fooled, for `take_over`."""
        keys = [(place, attack) for place in places.tolist()]
        points = [self._points[key] for key in keys if key in self._points]
        return self.rows(attack)[places], points

    def take_over(self, process: int, places: np.ndarray, attack: str, results: Results) -> None:
        """Adopt another process's results on these images, and where it stored them."""
        new_rows, points = results
        if process == jax.process_index() or not len(places):
            return
        rows = self._rows_of(attack)
        rows[places] = new_rows
        if points:
            keys = [(place, attack) for place in places.tolist()]
            self._points |= dict(zip(keys, points, strict=True))
        else:
            rows["file"][places] = self._number(_of_process(self._first, process))

    def survived(
        self, places: np.ndarray, attacks: Sequence[str]
    ) -> list[tuple[int, dict[str, Any]]]:
        """Gather the images that attacks, or parts of them, did not fool, for the next method."""
        survivors = []
        for attack in attacks:
            rows = self.rows(attack)
            for place in places[(rows["known"] & ~rows["fooled"])[places]].tolist():
                record: dict[str, Any] = {"attack": attack}
                record |= {key: bool(rows[key][place]) for key in ("fooled", "flat", "doubtful")}
                if tried := self._tried.get((place, attack)):
                    record["tried"] = tried._asdict()
                survivors.append((place, record))
        return survivors

    def take_over_survived(self, process: int, survivors: list[tuple[int, dict[str, Any]]]) -> None:
        """Adopt the records of images that another process did not fool."""
        for place, record in survivors if process != jax.process_index() else ():
            self._keep(place, None, record)

    def close(self) -> None:
        """Let another process append; the contents stay in memory."""
        self._lock.close()

    def write_identity(self) -> None:
        """Write the line that identifies the evaluation, waiting for its fingerprint."""
        identity, self._unwritten = self._unwritten, None
        if identity is not None:
            network = fingerprint.resolved(identity["fingerprint"])
            self._append({"identity": identity | {"fingerprint": network}} | self._noted)

    def _append(self, record: dict[str, Any]) -> None:
        if self._path is not None:
            with whole.explained(self._path), self._path.open("a") as lines:
                lines.write(json.dumps(record) + "\n")


@contextlib.contextmanager
def open_ledger(
    path: str | Path | None, identity: dict[str, Any], ids: np.ndarray
) -> Iterator[Ledger]:
    """Yield the ledger, opened by all processes: none adds a line before all have read."""
    network = identity["fingerprint"]  # its probe and versions may differ between processes
    same = {key: network[key] for key in (*fingerprint.EXACT, "images")}
    hosts.agree({key: identity[key] for key in identity if key != "fingerprint"} | same)
    with contextlib.ExitStack() as opened:

        def opens() -> Ledger:
            return opened.enter_context(contextlib.closing(Ledger(path, identity, ids)))

        # Process 0 goes first: a network file system may cache that a file does not exist.
        book = hosts.together(lambda: None if jax.process_index() else opens())
        book = hosts.together(lambda: book or opens())
        if path is not None:
            hosts.together(book.check_files)
            verdicts = hosts.everyone(book.known())
            if len(set(verdicts)) > 1:
                counts = ", ".join(str(count) for count, _ in verdicts)
                raise ValueError(f"processes see different verdicts ({counts}) in {path}; {_SHARE}")
        yield book
        book.write_identity()  # even if there was nothing to decide


def _begun_by(path: Path, old: Any, new: dict[str, Any]) -> dict[str, str] | None:
    """Read the versions that began this evaluation's ledger, if different from today's."""
    old = old if isinstance(old, dict) else {}
    old_network, network = old.get("fingerprint"), new["fingerprint"]
    if old.get("version") == "rand":  # an older version's verdicts were those of one draw
        old = {"verdict": randomised.verdict(randomised.ONE)._asdict()} | old
    if not isinstance(old_network, dict):
        raise ValueError(
            f"ledger {path} was written by an older version that did not fingerprint networks, so "
            "it may belong to another network and is not continued. Pass another ledger; "
            "replay=[...] can try this one's adversarial images first"
        )
    none = {"fingerprint": None, "network": None, "search": None}
    words = [hosts.differences(old | none, json.loads(json.dumps(new | none)))]
    if old_network.get("images") != network["images"]:
        words.append("its images or labels differ")
    text = fingerprint.difference(old_network, network)
    if text and "task" in new:  # whose targets are among the arrays, and its score in the program
        text = "the network, the targets or the task's settings differ"
    words.append(text)
    older = fingerprint.other_versions(old_network.get("versions") or {}, network["versions"])
    old_search, search = old.get("search"), new["search"]
    if older and isinstance(old_search, dict) and isinstance(search, dict):
        old_search, search = old_search.get("arrays"), search["arrays"]
    if old_search != search:
        words.append("its search used another network")
    if text := "; ".join(filter(None, words)):
        raise ValueError(
            f"ledger {path} belongs to another evaluation: {text}. "
            "Pass another ledger, or the same settings"
        )
    return old_network["versions"] if older else None


def _is_verdict(record: dict[str, Any]) -> bool:
    kinds = {"image": int, "attack": str, "fooled": bool, "flat": bool}
    if not all(isinstance(record.get(key), kind) for key, kind in kinds.items()):
        return False
    numbers, stored = [record.get("reached", -1)], record.get("stored", -1)
    if record["attack"].endswith(PART):
        tried = record.get("tried")
        if not (isinstance(tried, dict) and isinstance(tried.get("targets"), list)):
            return False
        numbers += [*tried["targets"], tried.get("restarts")]
    numbers += [stored] if record["fooled"] else []
    return all(isinstance(n, int) for n in numbers) and (not record["fooled"] or stored >= 0)


def _of_process(path: Path, process: int) -> Path:
    name = f"{path.stem}.process-{process}{path.suffix}" if process else path.name
    return path.with_name(name)
