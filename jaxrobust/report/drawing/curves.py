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
        """Read a file from where it was left off the last time."""
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
                if lines.read(len(self._before)) != self._before:  # a run that goes on cuts it
                    self._begin()
                    lines.seek(0)
                torn = self._take(lines)
        curves = {
            phase: {n: Curve(np.array(s, float), np.array(v, float)) for n, (s, v) in own.items()}
            for phase, own in self._columns.items()
        }
        events = self._alarms + _overfitting(curves) + _skipped(curves)
        return Metrics(curves, events, self._notes(torn))

    def _take(self, lines: BinaryIO) -> bool:
        for line in lines:
            whole = line.endswith(b"\n")
            if line == b"\n" and self._before and not self._before.endswith(b"\n"):
                self._left(line)  # the end of a line that was whole but for it
                continue
            row = _row(line)
            if row is None and not whole:
                return True  # somebody may be writing it
            self._left(line)
            self._lines += 1
            if row is None:
                self._damaged.append(self._lines)
            else:
                self._add(row)
                self._alarms += _alarms(row)
        return False

    def _add(self, row: dict[str, Any]) -> None:
        own = self._columns.setdefault(row["phase"], {})
        for name, value in row.items():
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if number and name not in ("phase", "step"):
                steps, values = own.setdefault(name, (array("d"), array("d")))
                steps.append(row["step"])
                values.append(value)

    def _notes(self, torn: bool) -> list[str]:
        notes, damaged = [], self._damaged
        before = f"the {self._lines:,} before it are used"
        if torn:
            notes.append(f"The last line of {self._path} was cut off; {before}.")
        if damaged:
            shown = ", ".join(map(str, damaged[:5])) + (" and others" if len(damaged) > 5 else "")
            notes.append(f"{len(damaged):,} damaged lines of {self._path} are left out: {shown}.")
        return notes

    def _left(self, line: bytes) -> None:
        self._offset, self._before = self._offset + len(line), line[-_COMPARED:]


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
        step = row["step"]
        sound = isinstance(row["phase"], str) and isinstance(step, int) and 0 <= step < 2**53
        return row if sound else None
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


def _alarms(row: dict[str, Any]) -> list[CurveEvent]:
    values = {key: row.get(key) for key in _ALARM}
    if not all(isinstance(value, (int, float)) for value in values.values()):
        return []
    warnings = alarm.warnings({key: float(value or 0) for key, value in values.items()})
    return [CurveEvent(row["phase"], int(row["step"]), "alarm", text) for text in warnings]


def _overfitting(curves: dict[str, dict[str, Curve]]) -> list[CurveEvent]:
    events = []
    for phase, own in curves.items():
        if not {"selection_robust", "selection_images", "robust"} <= own.keys():
            continue
        steps, scores = own["selection_robust"]
        images = own["selection_images"].values[-1]
        images = max(int(images), 1) if np.isfinite(images) else 1
        training: list[float] = []
        robust = own["robust"]
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
    for phase, own in curves.items():
        if "skipped" not in own:
            continue
        steps, values = own["skipped"]
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
