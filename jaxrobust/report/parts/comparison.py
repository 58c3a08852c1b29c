"""Several runs or evaluations: curves over each other, and differences image by image."""

from collections.abc import Sequence

import numpy as np

from jaxrobust.evaluation.records import comparable, pairs, verdicts
from jaxrobust.evaluation.records.pairs import Paired
from jaxrobust.evaluation.records.verdicts import Verdicts
from jaxrobust.report.drawing import figures
from jaxrobust.report.drawing.curves import thinned
from jaxrobust.report.drawing.figures import Axis, Bar, Line
from jaxrobust.report.drawing.markup import Html, table, tag
from jaxrobust.report.gathered import ReportedEvaluation, ReportedRun
from jaxrobust.report.parts import sentences

_OVERLAID = {
    "loss": ("Loss", False),
    "robust": ("Accuracy of batches under attack", True),
    "selection_clean": ("Clean accuracy on the selection split", True),
    "selection_robust": ("Robust accuracy on the selection split", True),
}
_DRAWN = 12  # runs in one figure; more cannot be told apart
_POINTS = 120
_LEVEL = 0.05  # of Holm's correction
_HEAD = (
    *("network", "accuracy", "points", "95 % interval", "p", "images", "only it is right"),
    *("only the first is right", "images to tell apart"),
)


def overlays(runs: Sequence[ReportedRun]) -> Html | None:
    """Return the curves of several runs over each other, for each phase that two of them have."""
    phases = list(dict.fromkeys(p for run in runs for p in run.phases))
    drawn = []
    for at, phase in enumerate(phases):
        for quantity, (title, percent) in _OVERLAID.items():
            having = [r for r in runs if quantity in r.metrics.curves.get(phase, {})]
            if len(having) < 2:
                continue
            curves = []
            for run in having[:_DRAWN]:
                cut = thinned(run.metrics.curves[phase][quantity], _POINTS)
                curves.append(Line(run.name, cut.steps.tolist(), cut.values.tolist()))
            note = f"The first {_DRAWN} of {len(having)} runs." if len(having) > _DRAWN else ""
            named, axes = f"{title}, {phase}", (Axis("step"), Axis(title.lower(), percent=percent))
            key = f"overlay-{at}-{quantity}"
            drawn.append(figures.lines(key, named, curves, *axes, note=note))
    parts = tag("h2", "Runs over each other"), tag("div", drawn, class_="figures")
    return tag("section", *parts) if drawn else None


def groups(evaluations: Sequence[ReportedEvaluation]) -> list[list[ReportedEvaluation]]:
    """Return evaluations of different networks that answer the same question, with verdicts."""
    same: dict[str, dict[str, ReportedEvaluation]] = {}
    for one in sorted(evaluations, key=lambda one: one.record.stopped is not None):
        if one.verdicts is not None:  # a whole evaluation of a network before one that stopped
            same.setdefault(sentences.question(one), {}).setdefault(sentences.identity(one), one)
    return [list(own.values()) for own in same.values() if len(own) > 1]


def difference(first: ReportedEvaluation, other: ReportedEvaluation, key: str) -> Paired | None:
    """Compare the common images, without replayed ones; None: there are none, or other labels."""
    (a, b), left_out = _of_both(first, other)
    if left_out.all() or (a.labels != b.labels).any():
        return None
    both = (getattr(a, key)[~left_out], getattr(b, key)[~left_out])
    return comparable.paired([first.record, other.record], a.image_ids[~left_out], *both)


def _of_both(
    first: ReportedEvaluation, other: ReportedEvaluation
) -> tuple[list[Verdicts], np.ndarray]:
    assert first.verdicts is not None and other.verdicts is not None, "groups() has them"
    both = verdicts.aligned([first.verdicts, other.verdicts])
    if not len(both[0].labels):
        return both, np.zeros(0, bool)
    return both, comparable.left_out([first.record, other.record], both)


def part(evaluations: Sequence[ReportedEvaluation]) -> Html | None:
    """Return paired differences against the first evaluation of each question."""
    own = enumerate(groups(evaluations))
    shown = [drawn for number, group in own if (drawn := _group(group, f"pairs-{number}"))]
    if not shown:
        return None
    lead = (
        "Networks that were attacked in the same way are compared on the same images. The interval "
        "is Tango's for paired proportions; p is McNemar's exact test, corrected by Holm for the "
        "number of comparisons. Where an evaluation stopped when its numbers said so, both are "
        "those of a sequence, which hold whenever one looks. What can be told apart (p below 0.05) "
        "is drawn in orange."
    )
    return tag("section", tag("h2", "Differences, image by image"), tag("p", lead), shown)


def _group(own: Sequence[ReportedEvaluation], key: str) -> Html | None:
    first, *others = own
    attacked = bool(first.record.attacks)
    drawn, rows = [], []
    for what in ("robust", "clean") if attacked else ("clean",):
        known = [(o, d) for o in others if (d := difference(first, o, what)) is not None]
        if not known:
            return None
        corrected = pairs.holm(np.array([d.p for _, d in known]))
        bars = []
        for (other, d), p in zip(known, corrected, strict=True):
            label, apart, needed = _label(other), bool(p < _LEVEL), pairs.images_needed(d)
            stopped = comparable.stop_order([first.record, other.record]) is not None
            bars.append(Bar(label, d.difference, d.low, d.high, strong=apart))
            points, low, high = (f"{100 * v:+.1f}" for v in (d.difference, d.low, d.high))
            enough = "-" if apart or needed is None or stopped else f"{needed:,}"
            within = f"{low} to {high}{' (sequence)' if stopped else ''}"
            counts = (f"{d.n:,}", f"{d.gained:,}", f"{d.lost:,}")
            rows.append((label, what, points, within, f"{p:.3g}", *counts, enough))
        title = f"{what.capitalize()} accuracy minus that of {_label(first)}"
        axis = Axis("difference", percent=True)
        drawn.append(figures.rows(f"{key}-{what}", title, bars, axis, names=("difference", "")))
    threat = ", ".join(sentences.balls(first.record)) or "no attack"
    left = [int(_of_both(first, other)[1].sum()) for other in others]
    without = [f"{n:,} beside {_label(one)}" for one, n in zip(others, left, strict=True) if n]
    sentence = (
        "Images that replayed points decided are left out, as the attacks alone might have left "
        f"them standing: {', '.join(without)}."
    )
    unsure = [_label(one) for one in others if not _same_images(first, one)]
    names_alone = (
        f"That {', '.join(unsure)} saw the same images as {_label(first)} is known by their names "
        "alone: older versions noted no hash of each image."
    )
    name = f"{sentences.method(first.record)}, {threat}; the first is {_label(first)}"
    return tag(
        "section",
        tag("h3", name),
        tag("p", sentence) if without else None,
        tag("p", names_alone) if unsure else None,
        tag("div", drawn, class_="figures"),
        table(f"Differences to {_label(first)}", _HEAD, rows, words=2),
    )


def _same_images(first: ReportedEvaluation, other: ReportedEvaluation) -> bool:
    assert first.verdicts is not None and other.verdicts is not None, "groups() has them"
    images = (first.verdicts.images, other.verdicts.images)
    return comparable.same_images_shown(first.record, other.record, *images)


def _label(one: ReportedEvaluation) -> str:
    return f"{one.name} {one.phase}".strip()
