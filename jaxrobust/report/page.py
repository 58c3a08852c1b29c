"""The page: the gathered data as one self-contained HTML file."""

import datetime
from collections.abc import Callable

from markupsafe import Markup

from jaxrobust.report import markup
from jaxrobust.report.gathered import Gathered, ReportedEvaluation
from jaxrobust.report.parts import comparison, evaluation, radii, sentences, training

_POINTS = 4000  # per quantity, over all runs, to keep the page small
_HEADLINES = 3
_OPEN = 4  # runs or evaluations; if there are more, each is folded
_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; "
    "connect-src 'self'"
)
Pictures = Callable[[ReportedEvaluation], Markup | None]


def page(gathered: Gathered, *, pictures: Pictures | None = None, refresh: float = 0) -> str:
    """Return the page, with `pictures` of evaluations, reloaded every `refresh` seconds."""
    runs, evaluations = gathered.runs, gathered.evaluations
    names = list(dict.fromkeys([run.name for run in runs] + [one.name for one in evaluations]))
    title = ", ".join(names[:_HEADLINES])
    if len(names) > _HEADLINES:
        title += f" and {len(names) - _HEADLINES} more"
    chosen = sentences.chosen(gathered)
    evaluated = {one.run.resolve() for one in evaluations if one.run}
    untested = [run for run in runs if run.folder.resolve() not in evaluated]
    alarms = [
        f"{run.name}, {e.phase}, step {e.step:,}: {e.text}"
        for run in runs
        for e in run.metrics.events
        if e.kind in training.DOUBTFUL
    ]
    ladders = radii.ladders(evaluations)
    sections: list[tuple[str, str, Markup | None]] = [
        ("differences", "Differences", comparison.part(evaluations)),
        ("radii", "Radii", radii.attacked(ladders, "radii")),
        ("certified", "Certified", radii.certified(evaluations, ladders, "certified")),
        ("evaluations", "Evaluations", _evaluations(gathered, pictures)),
        ("overlays", "Runs compared", comparison.overlays(runs) if len(runs) > 1 else None),
        ("training", "Training", _training(gathered)),
    ]
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    folders = ", ".join(dict.fromkeys(str(run.folder) for run in runs[:5]))
    return markup.ENVIRONMENT.get_template("page.html").render(
        title=title,
        policy=_POLICY,
        refresh=f"{refresh:g}" if refresh else "",
        headlines=[
            (sentences.headline(one), sentences.doubts(one, runs)) for one in chosen[:_HEADLINES]
        ],
        more=max(len(chosen) - _HEADLINES, 0),
        untested=[sentences.state(run) for run in untested[:_HEADLINES]],
        notes=[*gathered.notes, *alarms[:10]],
        sections=[section for section in sections if section[-1]],
        made=f"Made {now}{f' from {folders}' if folders else ''}.",
    )


def _evaluations(gathered: Gathered, pictures: Pictures | None) -> Markup | None:
    evaluations = gathered.evaluations
    if not evaluations:
        return None
    many, first = len(evaluations) > _OPEN, sentences.chosen(gathered)[:_HEADLINES]
    shown = evaluation.overview(evaluations)
    for at, one in enumerate(evaluations):
        images = pictures(one) if pictures else None
        in_lead = not many and any(one is other for other in first)
        part = evaluation.part(one, f"e{at}", gathered.runs, images, in_lead=in_lead)
        bare = one.verdicts is None and not one.record.costs
        shown += markup.parts.folded(evaluation.title(one), part) if many or bare else part
    return Markup("<div><h2>Evaluations</h2>{}</div>").format(shown)


def _training(gathered: Gathered) -> Markup | None:
    if not gathered.runs:
        return None
    most = max(40, min(400, _POINTS // len(gathered.runs)))
    shown = Markup()
    for at, run in enumerate(gathered.runs):
        part = training.part(run, f"t{at}", most)
        shown += markup.parts.folded(run.name, part) if len(gathered.runs) > _OPEN else part
    return Markup("<div><h2>Training</h2>{}</div>").format(shown)
