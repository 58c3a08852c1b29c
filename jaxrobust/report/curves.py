"""Metrics of a run as curves: read line by line, thinned for pictures, and their warnings."""

import itertools
import json
import threading
from array import array
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from jaxrobust.training.update import alarm

_STRETCHES = 20  # stretches of skipped steps reported separately
_COMPARED = 200  # bytes compared to check that a file has only grown
_ALARM = ("alarm_loss", "alarm_loss_stronger", "alarm_gradient_agreement", "alarm_gradient_zero")


class Curve(NamedTuple):
    """One quantity of one phase."""

    steps: np.ndarray  # f64[n]
    values: np.ndarray  # f64[n], not always finite


class CurveEvent(NamedTuple):
    """An event at a step."""

    phase: str
    step: int
    kind: str  # alarm, rollback, resumption, skipped
    text: str


class Metrics(NamedTuple):
    """The content of metrics.jsonl."""

    curves: dict[str, dict[str, Curve]]  # phase -> quantity -> curve, phases in order
    events: list[CurveEvent]
    notes: list[str]  # on lines that could not be read


def read(path: Path) -> Metrics:
    """Read the metrics of a file; damaged lines and a torn last line are skipped and noted."""
    return _Growing(path).read()


class Followed:
    """Metrics of growing files, each read from where the last call stopped."""

    def __init__(self) -> None:
        self._files: dict[Path, _Growing] = {}
        self._lock = threading.Lock()

    def read(self, path: Path) -> Metrics:
        """Read the lines added to a file since the last call; return all metrics."""
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
        self._before = b""  # the bytes before the offset

    def read(self) -> Metrics:
        torn = False
        if not self._path.is_file():
            self._begin()
        else:
            with self._path.open("rb") as lines:
                lines.seek(self._offset - len(self._before))
                if lines.read(len(self._before)) != self._before:  # a resumed run truncates it
                    self._begin()
                    lines.seek(0)
                torn = self._take(lines)
        curves = {
            phase: {n: Curve(np.array(s, float), np.array(v, float)) for n, (s, v) in pairs.items()}
            for phase, pairs in self._columns.items()
        }
        notes, damaged = [], self._damaged
        if torn:
            read = f"the {self._lines:,} lines before it are used"
            notes.append(f"The last line of {self._path} was cut off; {read}.")
        if damaged:
            shown = ", ".join(map(str, damaged[:5])) + (" and others" if len(damaged) > 5 else "")
            notes.append(f"{len(damaged):,} damaged lines of {self._path} are left out: {shown}.")
        return Metrics(curves, self._alarms + _overfitting(curves) + _skipped(curves), notes)

    def _take(self, lines: BinaryIO) -> bool:
        """Read the complete lines; return True if the last line is torn."""
        for line in lines:
            complete = line.endswith(b"\n")
            blank = line == b"\n" and self._before and not self._before.endswith(b"\n")
            row = None if blank else _row(line)
            if row is None and not complete:
                return True  # it may still be being written
            self._offset, self._before = self._offset + len(line), line[-_COMPARED:]
            if blank:
                continue  # the newline of a line read before without it
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
    """Find steps without an update: one event for each stretch of lines that report some."""
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
            text = f"{values[last:][values[last:] > 0].sum():,.0f} more skipped steps from here on"
            events.append(CurveEvent(phase, int(steps[last]), "skipped", text))
    return events


def thinned(curve: Curve, most: int) -> Curve:
    """Keep about `most` points: the first, the last, and the extremes of each stretch."""
    n = len(curve.steps)
    if n <= most:
        return curve
    edges = np.linspace(0, n, max(most // 2, 1) + 1).astype(int)
    keep = {0, n - 1}
    for start, end in itertools.pairwise(edges):
        part = curve.values[start:end]
        finite = np.isfinite(part)
        if not finite.all():
            keep.add(start + int(np.argmin(finite)))  # keeps the gap visible
        if finite.any():
            keep.add(start + int(np.argmin(np.where(finite, part, np.inf))))
            keep.add(start + int(np.argmax(np.where(finite, part, -np.inf))))
    order = np.array(sorted(keep))
    return Curve(curve.steps[order], curve.values[order])
