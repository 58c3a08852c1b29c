"""Several runs or evaluations: overlaid curves, and differences image by image."""

from collections.abc import Sequence

import numpy as np
from markupsafe import Markup

from jaxrobust.evaluation.records import checked, comparisons, verdicts
from jaxrobust.evaluation.records.comparisons import Paired
from jaxrobust.evaluation.records.verdicts import Verdicts
from jaxrobust.report import figures, markup
from jaxrobust.report.curves import thinned
from jaxrobust.report.figures import Axis, Bar, Line
from jaxrobust.report.gathered import ReportedEvaluation, ReportedRun
from jaxrobust.report.parts import sentences

_OVERLAID = {
    "loss": ("Loss", False),
    "robust": ("Accuracy under attack on training batches", True),
    "selection_clean": ("Clean accuracy on the selection split", True),
    "selection_robust": ("Robust accuracy on the selection split", True),
}
_DRAWN = 12  # runs in one figure; more cannot be told apart
_POINTS = 120
_LEVEL = 0.05  # of Holm's correction
_HEAD = (
    *("network", "accuracy", "points", "95% interval", "p", "images", "only this one is right"),
    *("only the first is right", "images needed"),
)


def overlays(runs: Sequence[ReportedRun]) -> Markup | None:
    """Return overlaid curves of several runs for each phase that at least two of them have."""
    phases = list(dict.fromkeys(p for run in runs for p in run.phases))
    drawn = []
    for at, phase in enumerate(phases):
        for quantity, (title, percent) in _OVERLAID.items():
            having = [r for r in runs if quantity in r.metrics.curves.get(phase, {})]
            if len(having) < 2:
                continue
            curves = []
            for run in having[:_DRAWN]:
                curve = thinned(run.metrics.curves[phase][quantity], _POINTS)
                curves.append(Line(run.name, curve.steps.tolist(), curve.values.tolist()))
            note = f"The first {_DRAWN} of {len(having)} runs." if len(having) > _DRAWN else ""
            key, axes = f"overlay-{at}-{quantity}", (Axis("step"), Axis(title.lower(), percent))
            drawn.append(figures.lines(key, f"{title}, {phase}", curves, *axes, note=note))
    return markup.parts.section("Runs overlaid", figures=drawn) if drawn else None


def groups(evaluations: Sequence[ReportedEvaluation]) -> list[list[ReportedEvaluation]]:
    """Return evaluations of different networks that answer the same question, with verdicts."""
    same: dict[str, dict[str, ReportedEvaluation]] = {}
    for one in sorted(evaluations, key=lambda one: one.record.stopped is not None):
        if one.verdicts is not None:  # complete evaluations take precedence over stopped ones
            same.setdefault(sentences.question(one), {}).setdefault(sentences.identity(one), one)
    return [list(group.values()) for group in same.values() if len(group) > 1]


def difference(first: ReportedEvaluation, other: ReportedEvaluation, key: str) -> Paired | None:
    """Compare the common images, without replayed ones; None if there are none or labels differ."""
    (a, b), left_out = _aligned(first, other)
    if left_out.all() or (a.labels != b.labels).any():
        return None
    both = (getattr(a, key)[~left_out], getattr(b, key)[~left_out])
    return checked.paired([first.record, other.record], a.image_ids[~left_out], *both)


def _aligned(
    first: ReportedEvaluation, other: ReportedEvaluation
) -> tuple[list[Verdicts], np.ndarray]:
    assert first.verdicts is not None and other.verdicts is not None, "groups() has them"
    both = verdicts.aligned([first.verdicts, other.verdicts])
    if not len(both[0].labels):
        return both, np.zeros(0, bool)
    return both, checked.left_out([first.record, other.record], both)


def part(evaluations: Sequence[ReportedEvaluation]) -> Markup | None:
    """Return paired differences against the first evaluation of each question."""
    shown = [_group(group, f"pairs-{number}") for number, group in enumerate(groups(evaluations))]
    if not any(shown):
        return None
    lead = (
        "Networks that were attacked in the same way are compared on the same images. The interval "
        "is Tango's interval for paired proportions; p is from McNemar's exact test, with Holm's "
        "correction for the number of comparisons. If an evaluation stopped early, the interval "
        "and p come from a confidence sequence and hold at any stopping time. Significant "
        "differences (p below 0.05) are drawn in orange."
    )
    return markup.parts.section("Differences, image by image", texts=[lead], below=shown)


def _group(group: Sequence[ReportedEvaluation], key: str) -> Markup | None:
    first, *others = group
    drawn, rows = [], []
    for accuracy in ("robust", "clean") if first.record.attacks else ("clean",):
        compared = [(o, d) for o in others if (d := difference(first, o, accuracy)) is not None]
        if not compared:
            return None
        corrected = comparisons.holm(np.array([d.p for _, d in compared]))
        bars = []
        for (other, d), p in zip(compared, corrected, strict=True):
            label, apart, needed = _label(other), bool(p < _LEVEL), comparisons.images_needed(d)
            stopped = checked.stop_order([first.record, other.record]) is not None
            bars.append(Bar(label, d.difference, d.low, d.high, strong=apart))
            points, low, high = (f"{100 * v:+.1f}" for v in (d.difference, d.low, d.high))
            enough = "-" if apart or needed is None or stopped else f"{needed:,}"
            within = f"{low} to {high}{' (sequence)' if stopped else ''}"
            counts = (f"{d.n:,}", f"{d.gained:,}", f"{d.lost:,}")
            rows.append((label, accuracy, points, within, f"{p:.3g}", *counts, enough))
        title = f"{accuracy.capitalize()} accuracy minus that of {_label(first)}"
        axis, names = Axis("difference", percent=True), ("difference", "")
        drawn.append(figures.rows(f"{key}-{accuracy}", title, bars, axis, names=names))
    texts = []
    replayed = [(int(_aligned(first, other)[1].sum()), _label(other)) for other in others]
    if without := [f"{n:,} with {label}" for n, label in replayed if n]:
        texts.append(
            "Images decided by replayed points are left out, because the attacks alone might not "
            f"have fooled them: {', '.join(without)}."
        )
    unsure = [_label(one) for one in others if not _same_images(first, one)]
    if unsure:
        texts.append(
            f"Only the images' names show that {', '.join(unsure)} used the same images as "
            f"{_label(first)}: older versions did not store a hash of each image."
        )
    threat = ", ".join(sentences.balls(first.record)) or "no attack"
    return markup.parts.section(
        f"{sentences.method(first.record)}, {threat}; the first is {_label(first)}",
        level=3,
        texts=texts,
        figures=drawn,
        below=[markup.parts.table(f"Differences from {_label(first)}", _HEAD, rows, words=2)],
    )


def _same_images(first: ReportedEvaluation, other: ReportedEvaluation) -> bool:
    assert first.verdicts is not None and other.verdicts is not None, "groups() has them"
    images = (first.verdicts.images, other.verdicts.images)
    return checked.same_images_shown(first.record, other.record, *images)


def _label(one: ReportedEvaluation) -> str:
    return f"{one.name} {one.phase}".strip()
