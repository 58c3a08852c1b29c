"""Metrics of a run as curves: read line by line, thinned for a picture, and what they warn of."""

import itertools
import json
from array import array
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxrobust.training import alarm

_ALARM = ("alarm_loss", "alarm_loss_stronger", "alarm_gradient_agreement", "alarm_gradient_zero")


class Curve(NamedTuple):
    """One quantity of one phase."""

    steps: np.ndarray  # f64[n]
    values: np.ndarray  # f64[n], not always finite


class Event(NamedTuple):
    """What happened at a step."""

    phase: str
    step: int
    kind: str  # alarm, rollback, resumption
    text: str


class Metrics(NamedTuple):
    """What metrics.jsonl tells."""

    curves: dict[str, dict[str, Curve]]  # phase -> quantity -> curve, phases in their order
    events: list[Event]
    notes: list[str]  # what could not be read


def read(path: Path) -> Metrics:
    """Return the metrics of a file; damaged lines and a torn last one are left out and noted.

    A file of 500,000 lines needs 16 bytes for each number in it.
    """
    columns: dict[str, dict[str, tuple[array, array]]] = {}
    events: list[Event] = []
    damaged: list[int] = []
    last, torn = 0, False
    if path.is_file():
        with path.open("rb") as lines:
            for last, line in enumerate(lines, 1):
                row = _row(line)
                if row is None:
                    damaged.append(last)
                    torn = not line.endswith(b"\n")
                else:
                    _add(columns, row)
                    events += _alarms(row)
    curves = {
        phase: {name: Curve(np.array(s, float), np.array(v, float)) for name, (s, v) in own.items()}
        for phase, own in columns.items()
    }
    return Metrics(curves, events + _overfitting(curves), _notes(path, damaged, last, torn))


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
        step = row["step"]
        sound = isinstance(row["phase"], str) and isinstance(step, int) and 0 <= step < 2**53
        return row if sound else None
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


def _add(columns: dict[str, dict[str, tuple[array, array]]], row: dict[str, Any]) -> None:
    own, step = columns.setdefault(row["phase"], {}), row["step"]
    for name, value in row.items():
        if name in ("phase", "step") or isinstance(value, bool):
            continue
        if isinstance(value, (int, float)):
            steps, values = own.setdefault(name, (array("d"), array("d")))
            steps.append(step)
            values.append(value)


def _alarms(row: dict[str, Any]) -> list[Event]:
    if "alarm_loss" not in row:
        return []
    values = {key: row.get(key) for key in _ALARM}
    if not all(isinstance(value, (int, float)) for value in values.values()):
        return []
    said = alarm.warnings({key: float(value or 0) for key, value in values.items()})
    return [Event(row["phase"], int(row["step"]), "alarm", text) for text in said]


def _overfitting(curves: dict[str, dict[str, Curve]]) -> list[Event]:
    """Return the alarms of robust overfitting, as the training gives them."""
    found = []
    for phase, own in curves.items():
        if not {"selection_robust", "selection_images", "robust"} <= own.keys():
            continue
        steps, scores = own["selection_robust"]
        images = own["selection_images"].values[-1]
        images = int(images) if np.isfinite(images) else 1
        training: list[float] = []
        before = -1.0
        for number, step in enumerate(steps, 1):
            inside = (own["robust"].steps > before) & (own["robust"].steps <= step)
            training.append(float(own["robust"].values[inside].mean()) if inside.any() else np.nan)
            before = step
            said = alarm.overfitting(scores[:number].tolist(), training, images=max(images, 1))
            if said:
                found.append(Event(phase, int(step), "alarm", said))
                break  # once is enough for a page
    return found


def _notes(path: Path, damaged: list[int], lines: int, torn: bool) -> list[str]:
    if not damaged:
        return []
    whole = [number for number in damaged if not (torn and number == lines)]
    found = []
    if torn:
        found.append(f"The last line of {path} was cut off; the {lines - 1:,} before it are used.")
    if whole:
        shown = ", ".join(map(str, whole[:5])) + (" and others" if len(whole) > 5 else "")
        found.append(f"{len(whole):,} damaged lines of {path} are left out: {shown}.")
    return found


def thinned(curve: Curve, most: int) -> Curve:
    """Return at most about `most` points, with the least and greatest of each stretch of steps.

    So no peak is lost; the first and the last point stay.
    """
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
