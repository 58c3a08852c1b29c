"""The page: what was gathered as one HTML file, which loads nothing."""

import datetime
from collections.abc import Callable

from jaxrobust.report.drawing.appearance import SCRIPT, STYLE
from jaxrobust.report.drawing.markup import Child, Html, join, tag
from jaxrobust.report.gathered import Evaluation, Gathered
from jaxrobust.report.parts import comparison, evaluation, sentences, training

_POINTS = 4000  # of one quantity, of all runs together: a page stays small
_HEADLINES = 3
_OPEN = 4  # runs or evaluations; of more, each is folded
_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; "
    "connect-src 'self'"
)
Pictures = Callable[[Evaluation], Child]


def page(found: Gathered, *, pictures: Pictures | None = None, refresh: float = 0) -> str:
    """Return the whole page, with `pictures` of evaluations, renewed every `refresh` seconds."""
    title = _title(found)
    head = tag(
        "head",
        Html('<meta charset="utf-8"/>'),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("title", title),
        tag("style", Html(STYLE)),
    )
    parts = _parts(found, pictures)
    links = [tag("li", tag("a", name, href=f"#{key}")) for key, name, _ in parts]
    said = [tag("section", inside, id=key) for key, _, inside in parts]
    nav = tag("nav", tag("ul", links), aria_label="Parts of this page")
    main = tag("main", tag("h1", title), _lead(found), nav, said, _foot(found))
    body = tag("body", main, tag("script", Html(SCRIPT)))
    every = f"{refresh:g}" if refresh else None
    return f"<!DOCTYPE html>\n{tag('html', head, body, lang='en', data_refresh=every)}\n"


def _title(found: Gathered) -> str:
    runs = [run.name for run in found.runs]
    names = list(dict.fromkeys(runs + [one.name for one in found.evaluations]))
    shown = ", ".join(names[:_HEADLINES])
    return f"{shown} and {len(names) - _HEADLINES} more" if len(names) > _HEADLINES else shown


def _lead(found: Gathered) -> Html:
    chosen = sentences.chosen(found)
    shown: list[Child] = []
    for one in chosen[:_HEADLINES]:
        shown.append(tag("p", sentences.headline(one), class_="lead"))
        said = sentences.doubts(one, found.runs)
        shown.append(
            tag("ul", [tag("li", text) for text in said], class_="doubts") if said else None
        )
    if len(chosen) > _HEADLINES:
        rest = f"{len(chosen) - _HEADLINES} more networks are in the table below."
        shown.append(tag("p", f"These are the most robust ones; {rest}"))
    evaluated = {one.run.resolve() for one in found.evaluations if one.run}
    waiting = [run for run in found.runs if run.folder.resolve() not in evaluated]
    for run in waiting[:_HEADLINES]:
        shown.append(tag("p", sentences.state(run), " It has not been tested yet.", class_="lead"))
    alarms = [
        f"{run.name}, {e.phase}, step {e.step:,}: {e.text}"
        for run in found.runs
        for e in run.metrics.events
        if e.kind in training.DOUBTFUL
    ]
    doubtful = [*found.notes, *alarms[:10]]
    shown.append(
        tag("ul", [tag("li", text) for text in doubtful], class_="doubts") if doubtful else None
    )
    return join(shown)


def _parts(found: Gathered, pictures: Pictures | None) -> list[tuple[str, str, Html]]:
    own, runs = found.evaluations, found.runs
    made: list[tuple[str, str, Child]] = [
        ("differences", "Differences", comparison.part(own)),
        ("radii", "Radii", evaluation.radii(evaluation.ladders(own), "radii")),
        ("evaluations", "Evaluations", _evaluations(found, pictures) if own else None),
        ("overlays", "Runs compared", comparison.overlays(runs) if len(runs) > 1 else None),
        ("training", "Training", _training(found) if runs else None),
    ]
    return [(key, name, join([inside])) for key, name, inside in made if inside]


def _evaluations(found: Gathered, pictures: Pictures | None) -> Html:
    own = found.evaluations
    first = sentences.chosen(found)[:_HEADLINES]
    shown = []
    for at, one in enumerate(own):
        images = pictures(one) if pictures else None
        told = len(own) <= _OPEN and any(one is other for other in first)
        shown.append(evaluation.part(one, f"e{at}", found.runs, images, told=told))
    titles = [evaluation.title(one) for one in own]
    bare = [one.verdicts is None and not one.record.costs for one in own]
    many = len(own) > _OPEN
    parts = [
        _folded(title, one) if many or little else one
        for title, one, little in zip(titles, shown, bare, strict=True)
    ]
    return tag("div", tag("h2", "Evaluations"), evaluation.overview(own), parts)


def _training(found: Gathered) -> Html:
    most = max(40, min(400, _POINTS // len(found.runs)))
    shown = [training.part(run, f"t{at}", most) for at, run in enumerate(found.runs)]
    if len(shown) > _OPEN:
        shown = [_folded(run.name, one) for run, one in zip(found.runs, shown, strict=True)]
    return tag("div", tag("h2", "Training"), shown)


def _folded(title: str, shown: Html) -> Html:
    return tag("details", tag("summary", title), shown)


def _foot(found: Gathered) -> Html:
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    rule = (
        "The headline shows for each network its strongest evaluation: at least 100 images before "
        "fewer, standard AutoAttack before other attacks, the radius of the training before "
        "others, then more images, more attacks."
    )
    folders = ", ".join(dict.fromkeys(str(run.folder) for run in found.runs[:5]))
    said = f"Made {now}{f' from {folders}' if folders else ''}. {rule}"
    return tag("footer", tag("p", said, class_="note"))
