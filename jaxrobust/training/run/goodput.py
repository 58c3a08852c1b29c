"""Goodput: where the wall time of a run goes, as `goodput.jsonl` records it."""

import contextlib
import datetime
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from jaxrobust.runtime.devices import compilation
from jaxrobust.runtime.files import jsonl
from jaxrobust.runtime.text.progress import clock
from jaxrobust.runtime.text.spelling import counted

FILE = "goodput.jsonl"
KINDS = {  # how a process spends its time, and the words for it
    "training": "training",
    "compiling": "compiling",
    "data": "waiting for data",
    "saving": "saving",
    "evaluating": "evaluating",
    "starting": "starting",  # checks, reading data and checkpoints
    "repeated": "work repeated after a restart or a rollback",
}
_REPEATED = ("training", "data", "saving", "evaluating")  # what going back to a checkpoint undoes
EVERY_S = 60.0  # between two lines, unless something is saved or evaluated
_LEAST = 0.0005  # smaller shares are not mentioned


class Clock:
    """Divides the time of a process among the kinds, and appends it to `goodput.jsonl`.

    A line holds the seconds since the line before. The first one of a process is written only when
    there is work to do, and holds when the process started and when the last one was still alive.
    """

    def __init__(self, workdir: Path | None = None) -> None:
        """Start in the kind `starting`; without a workdir nothing is recorded."""
        self._file = workdir and workdir / FILE
        self._begun: dict[str, Any] | None = {"start": _now(), "alive": _alive(workdir)}
        self._kind, self._since = "starting", time.perf_counter()
        self._compiled, self._written = compilation.seconds(), self._since
        self._seconds: dict[str, float] = defaultdict(float)
        self._at: dict[str, Any] = {}

    @contextlib.contextmanager
    def of(self, kind: str) -> Iterator[None]:
        """Count the time inside as this kind, except for announced compilations."""
        outer = self._switch(kind)
        try:
            yield
        finally:
            self._switch(outer)

    def _switch(self, kind: str) -> str:
        now, compiled, before = time.perf_counter(), compilation.seconds(), self._kind
        self.move("compiling", compiled - self._compiled)
        self._seconds[before] += now - self._since
        self._since, self._compiled, self._kind = now, compiled, kind
        return before

    def move(self, kind: str, seconds: float) -> None:
        """Count some of the time of the current kind as another."""
        self._seconds[kind] += seconds
        self._seconds[self._kind] -= seconds

    def reached(self, phase: str, step: int, *, write: bool = False) -> None:
        """Note how many steps of a phase were taken; `write` a line now, else once a minute."""
        self._at = {"phase": phase, "step": step}
        if write or time.perf_counter() - self._written >= EVERY_S:
            self._write()

    def _write(self) -> None:
        self._switch(self._kind)
        self._written = self._since
        if self._file is None:
            return
        if self._begun:
            jsonl.append(self._file, self._begun)
            self._begun = None
        seconds = {kind: round(self._seconds[kind], 3) for kind in KINDS if self._seconds[kind]}
        self._seconds.clear()
        jsonl.append(self._file, {"time": _now()} | self._at | {"seconds": seconds})

    def __enter__(self) -> "Clock":
        return self

    def __exit__(self, *unused: object) -> None:
        if not self._begun:
            with contextlib.suppress(OSError):  # the error that ends the run says more
                self._write()


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")


def _alive(workdir: Path | None) -> str | None:
    """Read when the last process was alive: it kept touching the lock of the workdir."""
    with contextlib.suppress(OSError):
        if workdir:
            changed = (workdir / "lock").stat().st_mtime
            return datetime.datetime.fromtimestamp(changed, datetime.UTC).isoformat()
    return None


NONE = Clock()


class Goodput(NamedTuple):
    """The wall time of a run in seconds."""

    seconds: dict[str, float]  # by kind, while a process was at work
    between: float  # from the last sign of life of a process to the start of the next one
    restarts: int

    @property
    def share(self) -> float:
        """Training that counts, as a share of the time at work."""
        return self.seconds["training"] / max(sum(self.seconds.values()), 1e-9)

    def plain(self) -> dict[str, Any]:
        """Return the figures for JSON."""
        seconds = {kind: round(value, 3) for kind, value in self.seconds.items()}
        return {"share": round(self.share, 4), "seconds": seconds} | {
            "between_restarts": round(self.between, 3),
            "restarts": self.restarts,
        }

    def line(self) -> str:
        """Describe where the time went in a sentence or two."""
        total = max(sum(self.seconds.values()), 1e-9)
        parts = [
            f"{KINDS[kind]} {value / total:.1%}"
            for kind, value in sorted(self.seconds.items(), key=lambda pair: -pair[1])
            if value >= _LEAST * total
        ]
        text = f"Goodput {self.share:.1%}. Working time {clock(total)}: {', '.join(parts)}."
        if self.restarts:
            times = counted(self.restarts, "restart")
            text += f" In addition, no process ran for {clock(self.between)} before {times}."
        return text


def total(rows: list[dict[str, Any]]) -> Goodput | None:
    """Add up the lines of a `goodput.jsonl`; None: there are none.

    Where a phase goes back to an earlier step, the work after that step becomes `repeated`, and so
    does the time between the last line of a process and its last sign of life.
    """
    seconds, between, restarts = dict.fromkeys(KINDS, 0.0), 0.0, 0
    spans: dict[str, list[tuple[int, int, dict[str, float]]]] = {}  # phase -> steps, their seconds
    last: datetime.datetime | None = None
    for row in rows:
        if "start" in row:
            start = datetime.datetime.fromisoformat(row["start"])
            if last is not None:
                alive = datetime.datetime.fromisoformat(row["alive"]) if row["alive"] else last
                alive = min(max(alive, last), start)
                seconds["repeated"] += (alive - last).total_seconds()
                between += (start - alive).total_seconds()
                restarts += 1
            last = start
            continue
        last = datetime.datetime.fromisoformat(row["time"])
        step, of_phase = row["step"], spans.setdefault(row["phase"], [])
        for kind, value in row["seconds"].items():
            seconds[kind] += value
        for at, (first, end, spent) in enumerate(of_phase):
            if end <= step:
                continue
            share = (end - max(first, step)) / (end - first) if end > first else 1.0
            undone = {kind: share * spent.get(kind, 0.0) for kind in _REPEATED}
            for kind, value in undone.items():
                seconds[kind] -= value
                seconds["repeated"] += value
            rest = {kind: spent.get(kind, 0.0) - value for kind, value in undone.items()}
            of_phase[at] = (min(first, step), step, rest)
        of_phase.append((of_phase[-1][1] if of_phase else step, step, row["seconds"]))
    return Goodput(seconds, between, restarts) if last else None
