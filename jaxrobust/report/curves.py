"""Metrics of a run as curves: read line by line, thinned for a picture, and what they warn of."""

import itertools
import json
import threading
from array import array
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from jaxrobust.training.update import alarm

_STRETCHES = 20  # of skipped steps, that are told one by one
_COMPARED = 200  # bytes that show that a file is what it was, and longer
_ALARM = ("alarm_loss", "alarm_loss_stronger", "alarm_gradient_agreement", "alarm_gradient_zero")


class Curve(NamedTuple):
    """One quantity of one phase."""

    steps: np.ndarray  # f64[n]
    values: np.ndarray  # f64[n], not always finite


class CurveEvent(NamedTuple):
    """What happened at a step."""

    phase: str
    step: int
    kind: str  # alarm, rollback, resumption, skipped
    text: str


class Metrics(NamedTuple):
    """What metrics.jsonl tells."""

    curves: dict[str, dict[str, Curve]]  # phase -> quantity -> curve, phases in their order
    events: list[CurveEvent]
    notes: list[str]  # what could not be read


def read(path: Path) -> Metrics:
    """Return the metrics of a file; damaged lines and a torn last one are left out and noted."""
    return _Growing(path).read()


class Followed:
    """Metrics of files that grow: each is read from where it was left off the last time."""

    def __init__(self) -> None:
        self._files: dict[Path, _Growing] = {}
        self._lock = threading.Lock()

    def read(self, path: Path) -> Metrics:
        """Read what was added to a file since the last call."""
        with self._lock:
            return self._files.setdefault(path, _Growing(path)).read()


class _Growing:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._begin()

    def _begin(self) -> None:
        self._columns: dict[str, dict[str, tuple[array, array]]] = {}
        self._alarms: list[CurveEvent] = []
        self._damaged: list[int] = []
        self._lines = self._offset = 0
        self._before = b""  # the bytes in front of the offset

    def read(self) -> Metrics:
        torn = False
        if not self._path.is_file():
            self._begin()
        else:
            with self._path.open("rb") as lines:
                lines.seek(self._offset - len(self._before))
                if lines.read(len(self._before)) != self._before:  # a run that continues cuts it
                    self._begin()
                    lines.seek(0)
                torn = self._take(lines)
        curves = {
            phase: {n: Curve(np.array(s, float), np.array(v, float)) for n, (s, v) in pairs.items()}
            for phase, pairs in self._columns.items()
        }
        notes, damaged = [], self._damaged
        if torn:
            read = f"the {self._lines:,} before it are used"
            notes.append(f"The last line of {self._path} was cut off; {read}.")
        if damaged:
            shown = ", ".join(map(str, damaged[:5])) + (" and others" if len(damaged) > 5 else "")
            notes.append(f"{len(damaged):,} damaged lines of {self._path} are left out: {shown}.")
        return Metrics(curves, self._alarms + _overfitting(curves) + _skipped(curves), notes)

    def _take(self, lines: BinaryIO) -> bool:
        """Read the lines that are complete; True: the last one is torn."""
        for line in lines:
            complete = line.endswith(b"\n")
            blank = line == b"\n" and self._before and not self._before.endswith(b"\n")
            row = None if blank else _row(line)
            if row is None and not complete:
                return True  # somebody may be writing it
            self._offset, self._before = self._offset + len(line), line[-_COMPARED:]
            if blank:
                continue  # the end of a line that was complete but for it
            self._lines += 1
            if row is None:
                self._damaged.append(self._lines)
                continue
            columns = self._columns.setdefault(row["phase"], {})
            for name, value in row.items():
                number = isinstance(value, (int, float)) and not isinstance(value, bool)
                if number and name not in ("phase", "step"):
                    steps, values = columns.setdefault(name, (array("d"), array("d")))
                    steps.append(row["step"])
                    values.append(value)
            losses = {key: row.get(key) for key in _ALARM}
            if all(isinstance(value, (int, float)) for value in losses.values()):
                for text in alarm.warnings(
                    {key: float(value or 0) for key, value in losses.items()}
                ):
                    self._alarms.append(CurveEvent(row["phase"], int(row["step"]), "alarm", text))
        return False


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
        step = row["step"]
        sound = isinstance(row["phase"], str) and isinstance(step, int) and 0 <= step < 2**53
        return row if sound else None
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


def _overfitting(curves: dict[str, dict[str, Curve]]) -> list[CurveEvent]:
    events = []
    for phase, logged in curves.items():
        if not {"selection_robust", "selection_images", "robust"} <= logged.keys():
            continue
        steps, scores = logged["selection_robust"]
        images = logged["selection_images"].values[-1]
        images = max(int(images), 1) if np.isfinite(images) else 1
        training: list[float] = []
        robust = logged["robust"]
        between = np.split(robust.values, np.searchsorted(robust.steps, steps, "right"))
        for number, (step, values) in enumerate(zip(steps, between, strict=False), 1):
            training.append(float(values.mean()) if len(values) else np.nan)
            if warning := alarm.overfitting(scores[:number].tolist(), training, images=images):
                events.append(CurveEvent(phase, int(step), "alarm", warning))
                break  # once is enough for a page
    return events


def _skipped(curves: dict[str, dict[str, Curve]]) -> list[CurveEvent]:
    """Find the steps that updated nothing: one event for each stretch of lines that say so."""
    events = []
    for phase, logged in curves.items():
        if "skipped" not in logged:
            continue
        steps, values = logged["skipped"]
        bad = np.flatnonzero(values > 0)
        stretches = np.split(bad, np.flatnonzero(np.diff(bad) > 1) + 1) if len(bad) else []
        for lines in stretches[:_STRETCHES]:
            text = f"{values[lines].sum():,.0f} steps had no finite gradient"
            until = f", up to step {steps[lines[-1]]:,.0f}" if len(lines) > 1 else ""
            events.append(CurveEvent(phase, int(steps[lines[0]]), "skipped", text + until))
        if len(stretches) > _STRETCHES:
            last = stretches[_STRETCHES][0]
            text = f"{values[last:][values[last:] > 0].sum():,.0f} more steps from here on"
            events.append(CurveEvent(phase, int(steps[last]), "skipped", text))
    return events


def thinned(curve: Curve, most: int) -> Curve:
    """Return about `most` points: the first, the last, each stretch's least and greatest."""
    n = len(curve.steps)
    if n <= most:
        return curve
    edges = np.linspace(0, n, max(most // 2, 1) + 1).astype(int)
    keep = {0, n - 1}
    for start, end in itertools.pairwise(edges):
        part = curve.values[start:end]
        finite = np.isfinite(part)
        if not finite.all():
            keep.add(start + int(np.argmin(finite)))  # the gap is seen
        if finite.any():
            keep.add(start + int(np.argmin(np.where(finite, part, np.inf))))
            keep.add(start + int(np.argmax(np.where(finite, part, -np.inf))))
    order = np.array(sorted(keep))
    return Curve(curve.steps[order], curve.values[order])
