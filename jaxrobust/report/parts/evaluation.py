"""An evaluation: what each attack removed and cost, each class, the union; radii side by side."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from jaxrobust.evaluation.network import checks
from jaxrobust.evaluation.records import records, stopping, survivors
from jaxrobust.evaluation.records.record import AccuracyRecord
from jaxrobust.evaluation.records.verdicts import Verdicts
from jaxrobust.report.drawing import figures
from jaxrobust.report.drawing.figures import Axis, Bar, Line
from jaxrobust.report.drawing.markup import Child, Html, doubts, remark, table, tag
from jaxrobust.report.gathered import ReportedEvaluation, ReportedRun
from jaxrobust.report.parts import commands, confusion, sentences
from jaxrobust.report.parts.sentences import between, interval, interval_name, percent

_CLASSES = 40  # that a figure names; of more the lowest 30 and the highest 10
_COSTS = (
    *("attack", "images fooled", "passes forward", "backward", "idle beside them", "seconds"),
    *("compiling", "how it steps"),
)
_COUNTS, _SECONDS = ("fooled", "forward", "backward", "idle"), ("seconds", "compile_seconds")
_CORRUPTED, _CERTIFIED = "under corruptions", "certified at radius 0"
_ACCURACY = Axis("accuracy", percent=True, low=0.0, high=1.0)


def part(
    one: ReportedEvaluation,
    key: str,
    runs: Sequence[ReportedRun],
    pictures: Child = None,
    *,
    in_lead: bool = False,
) -> Html:
    """Return an evaluation; `in_lead`: its sentence and its doubts stand above already."""
    matrix, confused = confusion.part(one, f"{key}-confusion")
    drawn = [_left(one, f"{key}-left"), _classes(one, f"{key}-classes"), matrix]
    return tag(
        "section",
        tag("h3", title(one)),
        None if in_lead else tag("p", sentences.headline(one)),
        None if in_lead else doubts(sentences.doubts(one, runs)),
        [remark(line) for line in records.notes_of(one.record)],
        tag("div", drawn, class_="figures"),
        confused,
        _costs(one),
        pictures,
        commands.part(one),
    )


def title(one: ReportedEvaluation) -> str:
    """Name an evaluation on the page."""
    threats = ", ".join(sentences.balls(one.record)) or "no attack"
    attack = f"{sentences.method(one.record)}, {threats}"
    return f"{one.name}{f', {one.phase}' if one.phase else ''}: {attack}"


def _after(one: ReportedEvaluation) -> list[tuple[str, float]]:
    record = one.record
    accuracies: list[tuple[str, float | None]] = [("clean", record.clean)]
    if record.corruptions:
        accuracies.append((_CORRUPTED, record.corruptions["mean"]))
    if record.certified:
        accuracies.append((_CERTIFIED, next(iter(record.certified["accuracy"].values()))))
    union = record.method == sentences.UNION
    after = record.accuracy_after or {}
    if record.worst_case and _each(record):
        parts = zip(after, record.worst_case, strict=True)
        accuracies += [(f"under {name}", part["robust"]) for name, part in parts]
    else:
        accuracies += [(f"after {name}", value) for name, value in after.items()]
    if record.robust is not None and (union or len(accuracies) == 1):
        accuracies.append(("under all" if union else "under attack", record.robust))
    return [(name, float(value)) for name, value in accuracies if value is not None]


def _each(record: AccuracyRecord) -> bool:
    parts = record.worst_case or []
    return bool(parts) and all(part["robust"] is not None for part in parts)


_INTERVALS: dict[str, Literal["clean", "robust"]] = {
    "clean": "clean",
    "under all": "robust",
    "under attack": "robust",
}


def _left(one: ReportedEvaluation, key: str) -> Html:
    rows = []
    for name, value in _after(one):
        known = _INTERVALS.get(name)
        ends = interval(one, known) if known else None
        if one.record.stopped:
            ends = stopping.bounds_of(one.record.stopped, value)
        elif ends is None and one.images and name != _CORRUPTED:
            ends = checks.binomial_interval(round(value * one.images), one.images)
        rows.append(Bar(name, value, *(ends or (None, None))))
    union = one.record.method == sentences.UNION
    head = f"What each {'threat' if union else 'attack'} leaves"
    if _each(one.record):
        head = "Accuracy under each attack and under all"
    note = "Bars: exact 95 % intervals." if one.images else ""
    if one.record.stopped:
        note = f"Bars: {interval_name(one)}."
    if fast := one.record.fast:
        note += (
            f" Of {fast['survivors']:,} images that stood, {fast['sampled']:,} at random met all "
            f"attacks; {sentences.at_least(fast)}."
        )
    return figures.rows(key, head, rows, _ACCURACY, names=("right", ""), note=note)


def _costs(one: ReportedEvaluation) -> Html | None:
    costs: list[Any] = [*(one.record.costs or ())]
    if not costs:
        return remark(
            "What each attack cost is not in this record: a training wrote it, or an older version."
        )
    total = {k: sum(c.get(k) or 0 for c in costs) for k in (*_COUNTS, *_SECONDS)}
    rows = []
    for cost in (*costs, {"attack": "all", "step_rule": "", **total}):
        counts = ["-" if (n := cost.get(k)) is None else f"{n:,}" for k in _COUNTS]
        spent = ["-" if (s := cost.get(k)) is None else f"{s:,.1f} s" for k in _SECONDS]
        rule = cost.get("step_rule")
        rows.append((cost.get("attack"), *counts, *spent, "-" if rule is None else rule))
    return table("What each attack removed and cost", _COSTS, rows, words=0, of=f": {title(one)}")


def by_class(seen: Verdicts) -> dict[int, tuple[int, int, int]]:
    """Count the images of each label: all, the right ones, those that withstand everything."""
    counts = {}
    for label in np.unique(seen.labels):
        own = seen.labels == label
        counts[int(label)] = int(own.sum()), int(seen.clean[own].sum()), int(seen.robust[own].sum())
    return counts


def _classes(one: ReportedEvaluation, key: str) -> Html | None:
    if one.verdicts is None or not len(one.verdicts.labels):
        return None
    rows = []
    for label, (n, clean, robust) in by_class(one.verdicts).items():
        ends: tuple[Any, Any] = checks.binomial_interval(robust, n)
        if one.record.stopped:
            ends = None, None
        rows.append(Bar(one.class_name(label), robust / n, *ends, clean / n))
    order = sorted(rows, key=lambda row: row.value or 0.0)
    note = "Sorted; bars: exact 95 % intervals of robust accuracy."
    if one.record.stopped:
        note = "Sorted, of the images that were met; classes have no sequences."
    if len(order) > _CLASSES:
        note = f"The 30 lowest and the 10 highest of {len(order):,} classes. {note}"
        order = order[:30] + order[-10:]
    names = ("robust", "clean")
    return figures.rows(key, "Robust accuracy by class", order, _ACCURACY, names=names, note=note)


def ladders(evaluations: Sequence[ReportedEvaluation]) -> list[list[ReportedEvaluation]]:
    """Return groups of evaluations that differ in their radius alone, smallest radius first."""
    groups: dict[str, dict[float, ReportedEvaluation]] = {}
    for one in evaluations:
        record = one.record
        if record.robust is None or len(set(record.threats)) != 1:
            continue
        images = [record.dataset, record.split, record.image_ids, record.preprocessing]
        how = [record.attacks[0]["norm"], record.method, record.search_dtype]
        same = str([sentences.identity(one), *images, *how])
        groups.setdefault(same, {})[one.record.threats[0].epsilon] = one
    return [[own[e] for e in sorted(own)] for own in groups.values() if len(own) > 1]


def radii(groups: Sequence[Sequence[ReportedEvaluation]], key: str) -> Html | None:
    """Return robust accuracy against the radius, a figure for each group of `ladders`."""
    drawn = []
    for number, group in enumerate(groups):
        points = [
            (one.record.threats[0].epsilon, one.record.robust or 0.0, interval(one, "robust"))
            for one in group
        ]
        first, clean = group[0], group[0].record.clean
        if points[0][0] > 0 and clean is not None:  # at radius 0 nothing can be changed
            points.insert(0, (0.0, clean, interval(first, "clean")))
        xs, ys, ends = zip(*points, strict=True)
        low, high = ([e[at] if e else float("nan") for e in ends] for at in (0, 1))
        norm = sentences.ball(first.record.attacks[0]).partition(" ")[0]
        name = f"{first.name}, {sentences.method(first.record)}"
        about = f"Accuracy against the {norm} radius: {name}"
        note = "Bars: exact 95 % intervals. Radius 0 is clean accuracy."
        axes = Axis("radius, pixels in [0, 1]", low=0.0), _ACCURACY
        line = Line("right", xs, ys, low, high)
        drawn.append(figures.lines(f"{key}-{number}", about, [line], *axes, note=note))
    parts = tag("h2", "Accuracy against radius"), tag("div", drawn, class_="figures")
    return tag("section", *parts) if drawn else None


def _bound(record: AccuracyRecord) -> str:
    return f" (fast; standard at least {survivors.least(record.fast)})" if record.fast else ""


def overview(evaluations: Sequence[ReportedEvaluation]) -> Html:
    """Return all evaluations as a table."""
    head = ("network", "clean", "robust", "95 % interval", "threat", "attack", "images", "data")
    rows = [
        (
            one.name,
            percent(one.record.clean),
            percent(one.record.robust) + _bound(one.record),
            between(interval(one, "clean" if one.record.robust is None else "robust"))
            + (" (sequence)" if one.record.stopped else ""),
            ", ".join(sentences.balls(one.record)) or "-",
            sentences.method(one.record),
            f"{one.images:,}" if one.images else "-",
            f"{one.record.dataset}, {one.record.split}",
            str(one.record.weights or "-"),
        )
        for one in evaluations
    ]
    return table("All evaluations", (*head, "weights"), rows)
