"""The training of a run: a row of figures for each quantity, and the events."""

from typing import NamedTuple

import numpy as np
from markupsafe import Markup

from jaxrobust.report import figures, markup
from jaxrobust.report.curves import thinned
from jaxrobust.report.figures import Axis, Line, Mark
from jaxrobust.report.gathered import ReportedRun
from jaxrobust.report.parts import sentences

# Kinds of events, and their plurals.
KINDS = {"alarm": "alarms", "rollback": "rollbacks"}
KINDS |= {"resumption": "resumptions", "skipped": "skipped steps"}
DOUBTFUL = ("alarm", "rollback")
_QUIET = {"skipped": 0.0, "wait": 0.01}  # panels that never exceed this are left out
_LARGE = 300  # positive quantities that span a larger factor are drawn on a log axis


class Panel(NamedTuple):
    """A figure of a phase: quantities by their names in metrics.jsonl, with their labels."""

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
    "gradient": Panel("Gradient norm", {"gradient_norm": "norm"}, log=True),
    "skipped": Panel("Steps without an update", {"skipped": "steps"}),
    "epsilon": Panel("Radius of the attack", {"epsilon": "radius"}),
    "alarm": Panel(
        "Loss under the attack and under a stronger one",
        {"alarm_loss": "the training attack", "alarm_loss_stronger": "three more steps"},
    ),
}


def part(run: ReportedRun, key: str, most: int) -> Markup:
    """Return the training of a run; a curve is thinned to `most` points."""
    rows = []
    for name in PANELS:
        phases = enumerate(run.phases)
        row = [_panel(run, phase, name, f"{key}-{at}-{name}", most) for at, phase in phases]
        if drawn := Markup().join(filter(None, row)):
            rows.append(Markup('<div class="phases">{}</div>').format(drawn))
    kind = f"figures beside{min(len(run.phases), 3)}"
    texts = [sentences.state(run), *([run.goodput.line()] if run.goodput else [])]
    about = {"texts": texts, "figures": rows, "below": [_events(run)]}
    return markup.parts.section(f"Training of {run.name}", level=3, kind=kind, **about)


def _panel(run: ReportedRun, phase: str, name: str, key: str, most: int) -> Markup | None:
    panel = PANELS[name]
    logged = run.metrics.curves[phase]
    curves = {quantity: logged[quantity] for quantity in panel.quantities if quantity in logged}
    quiet = _QUIET.get(name)
    if not curves or (
        quiet is not None and all((c.values <= quiet).all() for c in curves.values())
    ):
        return None
    values = np.concatenate([curve.values for curve in curves.values()])
    finite = values[np.isfinite(values)]
    wide = len(finite) and finite.min() > 0 and finite.max() > _LARGE * finite.min()
    low, high = (0.0, 1.0) if panel.percent else (None, None)
    y = Axis(panel.title.lower(), panel.percent, bool(panel.log and wide), low, high)
    drawn, notes, thin = [], [], False
    for quantity, curve in curves.items():
        shown = thinned(curve, most)
        thin |= len(shown.steps) < len(curve.steps)
        label = panel.quantities[quantity]
        drawn.append(Line(label, shown.steps.tolist(), shown.values.tolist()))
        if len(steps := curve.steps[~np.isfinite(curve.values)]):
            count = f"{len(steps):,} of {len(curve.steps):,} points"
            last = f"steps {steps[0]:,.0f} to {steps[-1]:,.0f}"
            notes.append(f"Not finite: {label} at {count}, {last}.")
    if thin:
        notes.append("Thinned to the lowest and highest values of each stretch of steps.")
    events = [event for event in run.metrics.events if event.phase == phase]
    marks = [Mark(float(e.step), f"{e.kind}: {e.text}", e.kind not in DOUBTFUL) for e in events]
    if kinds := [KINDS[kind] for kind in KINDS if any(e.kind == kind for e in events)]:
        notes.append(f"Dashed: {' and '.join(kinds)}.")
    title, note = f"{panel.title}, {phase}", " ".join(notes)
    return figures.lines(key, title, drawn, Axis("step"), y, marks=marks, note=note)


def _events(run: ReportedRun) -> Markup:
    rows = [(e.phase, f"{e.step:,}", e.kind, e.text) for e in run.metrics.events[:50]]
    if not rows:
        return Markup(
            "<p>No alarm was raised, no step was skipped and nothing was rolled back.</p>"
        )
    more = len(run.metrics.events) - 50
    caption = f"Events{f' (and {more} more)' if more > 0 else ''}"
    return markup.parts.table(caption, ("phase", "step", "what", "details"), rows, words=4)
