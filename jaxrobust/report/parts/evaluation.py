"""An evaluation: results and costs of each attack, accuracy by class, and the confusion."""

from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from markupsafe import Markup

from jaxrobust.evaluation.network import checks
from jaxrobust.evaluation.records import records, stopping
from jaxrobust.evaluation.records.verdicts import Verdicts
from jaxrobust.report import figures, markup
from jaxrobust.report.figures import Bar
from jaxrobust.report.gathered import ReportedEvaluation, ReportedRun
from jaxrobust.report.parts import commands, sentences
from jaxrobust.report.parts.radii import ACCURACY
from jaxrobust.report.parts.sentences import between, interval, interval_name, percent

_CLASSES = 40  # named in a figure; if there are more, the lowest 30 and the highest 10
_PAIRS = 20  # in the table of the confusion, if there are too many classes for a matrix
_COSTS = (
    *("attack", "images fooled", "passes forward", "backward", "idle", "seconds"),
    *("compiling", "step rule"),
)
_COUNTS, _SECONDS = ("fooled", "forward", "backward", "idle"), ("seconds", "compile_seconds")
_CORRUPTED = "under corruptions"
_INTERVALS: dict[str, Literal["clean", "robust"]] = {
    "clean": "clean",
    "under all": "robust",
    "under attack": "robust",
}
_TITLE = "Classes that the attacks reached"
_UNKNOWN = (
    "Which classes the attacks reached is unknown: these verdicts come from an older version, "
    "which did not record them. Repeat the evaluation with another --out to record them."
)
_NO_VERDICTS = (
    "Classes, confusion and images are not shown, because there are no per-image verdicts. "
    "jaxrobust evaluate writes them; training and older versions do not."
)
_NOT_FOOLED = "No attack fooled an image that is classified correctly, so no class was reached."


def part(
    one: ReportedEvaluation,
    key: str,
    runs: Sequence[ReportedRun],
    pictures: Markup | None = None,
    *,
    in_lead: bool = False,
) -> Markup:
    """Return an evaluation; `in_lead`: its headline and doubts are already shown above."""
    matrix, below = confusion(one, f"{key}-confusion")
    return markup.parts.evaluation(
        title(one),
        "" if in_lead else sentences.headline(one),
        [] if in_lead else sentences.doubts(one, runs),
        records.notes_of(one.record),
        [_accuracies(one, f"{key}-left"), _classes(one, f"{key}-classes"), matrix],
        [below, _costs(one), pictures, commands.part(one)],
    )


def title(one: ReportedEvaluation) -> str:
    """Return the title of an evaluation."""
    threats = ", ".join(sentences.balls(one.record)) or "no attack"
    attack = f"{sentences.method(one.record)}, {threats}"
    return f"{one.name}{f', {one.phase}' if one.phase else ''}: {attack}"


def overview(evaluations: Sequence[ReportedEvaluation]) -> Markup:
    """Return all evaluations as a table."""
    head = ("network", "clean", "robust", "95% interval", "threat", "attack", "images", "data")
    rows = []
    for one in evaluations:
        record = one.record
        least = stopping.fast_bound(record.fast) if record.fast else ""
        key: Literal["clean", "robust"] = "clean" if record.robust is None else "robust"
        rows.append(
            (
                one.name,
                percent(record.clean),
                percent(record.robust) + (f" (fast; standard at least {least})" if least else ""),
                between(interval(one, key)) + (" (sequence)" if record.stopped else ""),
                ", ".join(sentences.balls(record)) or "-",
                sentences.method(record),
                f"{one.images:,}" if one.images else "-",
                f"{record.dataset}, {record.split}",
                str(record.weights or "-"),
            )
        )
    return markup.parts.table("All evaluations", (*head, "weights"), rows)


def accuracies(one: ReportedEvaluation) -> list[tuple[str, float]]:
    """Return the accuracies of an evaluation with their names, in the order of measurement."""
    record = one.record
    values: list[tuple[str, float | None]] = [("clean", record.clean)]
    if record.corruptions:
        values.append((_CORRUPTED, record.corruptions["mean"]))
    if record.certified:
        values.append(("certified at radius 0", next(iter(record.certified["accuracy"].values()))))
    union = record.method == sentences.UNION
    after = record.accuracy_after or {}
    if record.worst_case and _each_alone(one):
        members = zip(after, record.worst_case, strict=True)
        values += [(f"under {name}", member["robust"]) for name, member in members]
    else:
        values += [(f"after {name}", value) for name, value in after.items()]
    if record.robust is not None and (union or len(values) == 1):
        values.append(("under all" if union else "under attack", record.robust))
    return [(name, float(value)) for name, value in values if value is not None]


def _each_alone(one: ReportedEvaluation) -> bool:
    members = one.record.worst_case or []
    return bool(members) and all(member["robust"] is not None for member in members)


def _accuracies(one: ReportedEvaluation, key: str) -> Markup:
    record, bars = one.record, []
    for name, value in accuracies(one):
        ends = interval(one, _INTERVALS[name]) if name in _INTERVALS else None
        if record.stopped:
            ends = stopping.bounds_of(record.stopped, value)
        elif ends is None and one.images and name != _CORRUPTED:
            ends = checks.binomial_interval(round(value * one.images), one.images)
        bars.append(Bar(name, value, *(ends or (None, None))))
    head = f"Accuracy after each {'threat' if record.method == sentences.UNION else 'attack'}"
    if _each_alone(one):
        head = "Accuracy under each attack and under all"
    note = "Bars: exact 95% intervals." if one.images else ""
    if record.stopped:
        note = f"Bars: {interval_name(one)}."
    if fast := record.fast:
        note += (
            f" All attacks were run on {fast['sampled']:,} of {fast['survivors']:,} surviving "
            f"images, chosen at random; {sentences.at_least(fast)}."
        )
    return figures.rows(key, head, bars, ACCURACY, names=("right", ""), note=note)


def _costs(one: ReportedEvaluation) -> Markup:
    costs: list[Any] = [*(one.record.costs or ())]
    if not costs:
        return markup.parts.note(
            "This record lacks the cost of each attack: it comes from training or an older version."
        )
    total = {k: sum(c.get(k) or 0 for c in costs) for k in (*_COUNTS, *_SECONDS)}
    rows = []
    for cost in (*costs, {"attack": "all", "step_rule": "", **total}):
        counts = ["-" if (n := cost.get(k)) is None else f"{n:,}" for k in _COUNTS]
        spent = ["-" if (s := cost.get(k)) is None else f"{s:,.1f} s" for k in _SECONDS]
        rule = cost.get("step_rule")
        rows.append((cost.get("attack"), *counts, *spent, "-" if rule is None else rule))
    caption, of = "Images fooled and cost of each attack", f": {title(one)}"
    return markup.parts.table(caption, _COSTS, rows, words=0, of=of)


def by_class(verdicts: Verdicts) -> dict[int, tuple[int, int, int]]:
    """Count the images of each label: all, correctly classified, and robust."""
    counts = {}
    for label in np.unique(verdicts.labels):
        mask = verdicts.labels == label
        right, robust = int(verdicts.clean[mask].sum()), int(verdicts.robust[mask].sum())
        counts[int(label)] = int(mask.sum()), right, robust
    return counts


def _classes(one: ReportedEvaluation, key: str) -> Markup | None:
    if one.verdicts is None or not len(one.verdicts.labels) or one.record.task:
        return None
    bars = []
    for label, (n, clean, robust) in by_class(one.verdicts).items():
        ends: tuple[Any, Any] = (None, None)
        if not one.record.stopped:
            ends = checks.binomial_interval(robust, n)
        bars.append(Bar(one.class_name(label), robust / n, *ends, clean / n))
    bars.sort(key=lambda bar: bar.value or 0.0)
    note = "Sorted; bars: exact 95% intervals of robust accuracy."
    if one.record.stopped:
        note = "Sorted, for the evaluated images; there are no confidence sequences by class."
    if len(bars) > _CLASSES:
        note = f"The 30 lowest and the 10 highest of {len(bars):,} classes. {note}"
        bars = bars[:30] + bars[-10:]
    names = ("robust", "clean")
    return figures.rows(key, "Robust accuracy by class", bars, ACCURACY, names=names, note=note)


def confused(one: ReportedEvaluation) -> list[tuple[int, int, int]]:
    """Return (label, class reached, number of images), most frequent first, ties by label."""
    verdicts = one.verdicts
    if verdicts is None:
        return []
    reached = verdicts.reached >= 0
    both = np.stack([verdicts.labels[reached], verdicts.reached[reached]], axis=1)
    pairs, counts = np.unique(both, axis=0, return_counts=True)
    counted = [(int(a), int(b), int(n)) for (a, b), n in zip(pairs, counts, strict=True)]
    return sorted(counted, key=lambda pair: (-pair[2], pair[:2]))


def confusion(one: ReportedEvaluation, key: str) -> tuple[Markup | None, Markup | None]:
    """Return the confusion as a matrix, or as a table or note below the figures."""
    verdicts, pairs = one.verdicts, confused(one)
    attacked = one.record.robust is not None
    if one.record.task:  # it has no classes
        return None, Markup()
    if verdicts is None:
        return None, markup.parts.note(_NO_VERDICTS if attacked else "")
    fooled = int((verdicts.clean & ~verdicts.robust).sum())
    if not fooled:
        return None, markup.parts.note(_NOT_FOOLED if attacked else "")
    if not pairs:
        return None, markup.parts.note(_UNKNOWN)
    unknown = fooled - sum(n for _, _, n in pairs)
    lacking = f" {unknown:,} more fooled images lack a recorded prediction." if unknown > 0 else ""
    size = max(len(one.classes), *(1 + max(a, b) for a, b, _ in pairs))
    if 1 < size <= figures.CLASSES and min(a for a, _, _ in pairs) >= 0:
        counts = np.zeros((size, size), int)
        for a, b, n in pairs:
            counts[a, b] = n
        names = [one.class_name(label) for label in range(size)]
        alt = "; ".join(f"{names[a]} became {names[b]} {n} times" for a, b, n in pairs[:5])
        note = (
            "Rows: the label. Columns: the network's prediction for the image that fooled it. "
            f"Images misclassified without an attack do not count.{lacking}"
        )
        return figures.cells(key, _TITLE, names, counts, alt=alt, note=note), None
    totals: Counter[int] = Counter()
    for a, _, n in pairs:
        totals[a] += n
    rows = [
        (one.class_name(a), one.class_name(b), f"{n:,}", f"{100 * n / totals[a]:.0f}%")
        for a, b, n in pairs[:_PAIRS]
    ]
    more = f": the {_PAIRS} most frequent of {len(pairs):,} pairs" if pairs[_PAIRS:] else ""
    head = ("label", "class reached", "images", "of fooled images with this label")
    of = f": {one.name}, {one.file}"
    table = markup.parts.table(f"{_TITLE}{more}", head, rows, words=2, of=of)
    return None, table + markup.parts.note(lacking.strip())
