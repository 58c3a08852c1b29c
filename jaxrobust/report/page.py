"""The page: what was gathered as one HTML file, which loads nothing."""

import datetime
from collections.abc import Callable

from jaxrobust.report.drawing.appearance import SCRIPT, STYLE
from jaxrobust.report.drawing.markup import Child, Html, doubts, join, remark, tag
from jaxrobust.report.gathered import Gathered, ReportedEvaluation
from jaxrobust.report.parts import certified, comparison, evaluation, sentences, training

_POINTS = 4000  # of one quantity, of all runs together: a page stays small
_HEADLINES = 3
_OPEN = 4  # runs or evaluations; of more, each is folded
_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; "
    "connect-src 'self'"
)
Pictures = Callable[[ReportedEvaluation], Child]


def page(gathered: Gathered, *, pictures: Pictures | None = None, refresh: float = 0) -> str:
    """Return the whole page, with `pictures` of evaluations, renewed every `refresh` seconds."""
    title = _title(gathered)
    head = tag(
        "head",
        Html('<meta charset="utf-8"/>'),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("title", title),
        tag("style", Html(STYLE)),
    )
    parts = _parts(gathered, pictures)
    links = [tag("li", tag("a", name, href=f"#{key}")) for key, name, _ in parts]
    sections = [tag("section", inside, id=key) for key, _, inside in parts]
    nav = tag("nav", tag("ul", links), aria_label="Parts of this page")
    main = tag("main", tag("h1", title), _lead(gathered), nav, sections, _foot(gathered))
    body = tag("body", main, tag("script", Html(SCRIPT)))
    every = f"{refresh:g}" if refresh else None
    return f"<!DOCTYPE html>\n{tag('html', head, body, lang='en', data_refresh=every)}\n"


def _title(gathered: Gathered) -> str:
    runs = [run.name for run in gathered.runs]
    names = list(dict.fromkeys(runs + [one.name for one in gathered.evaluations]))
    shown = ", ".join(names[:_HEADLINES])
    return f"{shown} and {len(names) - _HEADLINES} more" if len(names) > _HEADLINES else shown


def _lead(gathered: Gathered) -> Html:
    chosen = sentences.chosen(gathered)
    shown: list[Child] = []
    for one in chosen[:_HEADLINES]:
        shown.append(tag("p", sentences.headline(one), class_="lead"))
        shown.append(doubts(sentences.doubts(one, gathered.runs)))
    if len(chosen) > _HEADLINES:
        rest = f"{len(chosen) - _HEADLINES} more networks are in the table below."
        shown.append(tag("p", f"These are the most robust ones; {rest}"))
    evaluated = {one.run.resolve() for one in gathered.evaluations if one.run}
    waiting = [run for run in gathered.runs if run.folder.resolve() not in evaluated]
    for run in waiting[:_HEADLINES]:
        shown.append(tag("p", sentences.state(run), " It has not been tested yet.", class_="lead"))
    alarms = [
        f"{run.name}, {e.phase}, step {e.step:,}: {e.text}"
        for run in gathered.runs
        for e in run.metrics.events
        if e.kind in training.DOUBTFUL
    ]
    return join([*shown, doubts([*gathered.notes, *alarms[:10]])])


def _parts(gathered: Gathered, pictures: Pictures | None) -> list[tuple[str, str, Html]]:
    own, runs = gathered.evaluations, gathered.runs
    made: list[tuple[str, str, Child]] = [
        ("differences", "Differences", comparison.part(own)),
        ("radii", "Radii", evaluation.radii(evaluation.ladders(own), "radii")),
        ("certified", "Certified", certified.curves(own, evaluation.ladders(own), "certified")),
        ("evaluations", "Evaluations", _evaluations(gathered, pictures) if own else None),
        ("overlays", "Runs compared", comparison.overlays(runs) if len(runs) > 1 else None),
        ("training", "Training", _training(gathered) if runs else None),
    ]
    return [(key, name, join([inside])) for key, name, inside in made if inside]


def _evaluations(gathered: Gathered, pictures: Pictures | None) -> Html:
    own = gathered.evaluations
    many, first = len(own) > _OPEN, sentences.chosen(gathered)[:_HEADLINES]
    parts = []
    for at, one in enumerate(own):
        images = pictures(one) if pictures else None
        in_lead = not many and any(one is other for other in first)
        shown = evaluation.part(one, f"e{at}", gathered.runs, images, in_lead=in_lead)
        bare = one.verdicts is None and not one.record.costs
        parts.append(_folded(evaluation.title(one), shown) if many or bare else shown)
    return tag("div", tag("h2", "Evaluations"), evaluation.overview(own), parts)


def _training(gathered: Gathered) -> Html:
    most = max(40, min(400, _POINTS // len(gathered.runs)))
    shown = [training.part(run, f"t{at}", most) for at, run in enumerate(gathered.runs)]
    if len(shown) > _OPEN:
        shown = [_folded(run.name, one) for run, one in zip(gathered.runs, shown, strict=True)]
    return tag("div", tag("h2", "Training"), shown)


def _folded(title: str, shown: Html) -> Html:
    return tag("details", tag("summary", title), shown)


def _foot(gathered: Gathered) -> Html:
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    folders = ", ".join(dict.fromkeys(str(run.folder) for run in gathered.runs[:5]))
    sentence = (
        f"Made {now}{f' from {folders}' if folders else ''}. "
        "The headline shows for each network its strongest evaluation: at least 100 images before "
        "fewer, standard AutoAttack before other attacks, the radius of the training before "
        "others, then more images, more attacks."
    )
    return tag("footer", remark(sentence))
