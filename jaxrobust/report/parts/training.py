"""The training of a run: a row of figures for each phase, and what happened on the way."""

from typing import NamedTuple

import numpy as np

from jaxrobust.report.drawing import figures
from jaxrobust.report.drawing.curves import Curve, thinned
from jaxrobust.report.drawing.figures import Axis, Line, Mark
from jaxrobust.report.drawing.markup import Html, table, tag
from jaxrobust.report.gathered import ReportedRun
from jaxrobust.report.parts import sentences

# Of events, and what they are together.
KINDS = {"alarm": "alarms", "rollback": "rollbacks"}
KINDS |= {"resumption": "resumptions", "skipped": "skipped steps"}
DOUBTFUL = ("alarm", "rollback")
_LARGE = 300  # a positive quantity that spans more than this factor is drawn on a log axis


class Panel(NamedTuple):
    """A figure of a phase: quantities by their names in metrics.jsonl, and what they are called."""

    title: str
    quantities: dict[str, str]
    percent: bool = False
    log: bool = False


PANELS = {
    "loss": Panel("Loss", {"loss": "loss"}, log=True),
    "accuracy": Panel(
        "Accuracy",
        {"clean": "batches, clean", "robust": "batches, under attack"}
        | {"selection_clean": "selection, clean", "selection_robust": "selection, under attack"},
        percent=True,
    ),
    "lr": Panel("Learning rate", {"lr": "learning rate"}),
    "speed": Panel("Images per second", {"images_per_second": "images/s"}),
    "wait": Panel("Time spent waiting for data", {"data_wait": "waiting"}, percent=True),
    "gradient": Panel("Norm of the gradient", {"gradient_norm": "norm"}, log=True),
    "skipped": Panel("Steps that updated nothing", {"skipped": "steps"}),
    "epsilon": Panel("Radius of the attack", {"epsilon": "radius"}),
    "alarm": Panel(
        "Loss under the attack and under a stronger one",
        {"alarm_loss": "the training's attack", "alarm_loss_stronger": "three steps more"},
    ),
}


def part(run: ReportedRun, key: str, most: int) -> Html:
    """Return the training of a run; a curve is thinned to `most` points."""
    beside = min(len(run.phases), 3)
    drawn = []
    for name, panel in PANELS.items():
        of_phases = [
            _panel(run, phase, name, f"{key}-{number}-{name}", most)
            for number, phase in enumerate(run.phases)
            if _worth(name, panel, run.metrics.curves[phase])
        ]
        drawn.append(tag("div", of_phases, class_="phases") if of_phases else None)
    return tag(
        "section",
        tag("h3", f"Training of {run.name}"),
        tag("p", sentences.state(run)),
        tag("div", drawn, class_=f"figures beside{beside}"),
        _events(run),
    )


def _worth(name: str, panel: Panel, own: dict[str, Curve]) -> bool:
    known = [own[quantity] for quantity in panel.quantities if quantity in own]
    if name == "skipped":  # all zero is nothing to look at
        return any((curve.values != 0).any() for curve in known)
    return bool(known)


def _panel(run: ReportedRun, phase: str, name: str, key: str, most: int) -> Html:
    panel, own = PANELS[name], run.metrics.curves[phase]
    events = [event for event in run.metrics.events if event.phase == phase]
    marks = [Mark(float(e.step), f"{e.kind}: {e.text}", e.kind not in DOUBTFUL) for e in events]
    known = {q: own[q] for q in panel.quantities if q in own}
    cut = {q: thinned(curve, most) for q, curve in known.items()}
    named = panel.quantities
    curves = [Line(named[q], c.steps.tolist(), c.values.tolist()) for q, c in cut.items()]
    low, high = (0.0, 1.0) if panel.percent else (None, None)
    y = Axis(panel.title.lower(), panel.percent, panel.log and _spans(known), low, high)
    notes = [_not_finite(named[q], curve) for q, curve in known.items()]
    if any(len(cut[q].steps) < len(known[q].steps) for q in known):
        notes.append("Thinned; the lowest and highest value of each stretch of steps are kept.")
    if kinds := [KINDS[kind] for kind in KINDS if any(e.kind == kind for e in events)]:
        notes.append(f"Dashed: {' and '.join(kinds)}.")
    title, note = f"{panel.title}, {phase}", " ".join(filter(None, notes))
    return figures.lines(key, title, curves, Axis("step"), y, marks=marks, note=note)


def _spans(curves: dict[str, Curve]) -> bool:
    values = np.concatenate([curve.values for curve in curves.values()])
    finite = values[np.isfinite(values)]
    return bool(len(finite) and finite.min() > 0 and finite.max() > _LARGE * finite.min())


def _not_finite(name: str, curve: Curve) -> str:
    steps = curve.steps[~np.isfinite(curve.values)]
    if not len(steps):
        return ""
    count = f"{len(steps):,} of {len(curve.steps):,} points"
    return f"Not finite: {name} at {count}, steps {steps[0]:,.0f} to {steps[-1]:,.0f}."


def _events(run: ReportedRun) -> Html | None:
    rows = [(e.phase, f"{e.step:,}", e.kind, e.text) for e in run.metrics.events[:50]]
    if not rows:
        return tag("p", "No alarm was raised, no step was skipped and nothing was rolled back.")
    more = len(run.metrics.events) - 50
    caption = f"What happened{f' (and {more} more events)' if more > 0 else ''}"
    return table(caption, ("phase", "step", "what", "details"), rows, words=4)
