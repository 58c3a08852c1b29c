"""Figures of the page as SVG files that stand alone, for programs that show pictures."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from textwrap import wrap
from xml.etree import ElementTree

from jaxrobust.report import gathered
from jaxrobust.report.drawing.appearance import STYLE
from jaxrobust.report.drawing.markup import Html, tag
from jaxrobust.report.parts import evaluation, training
from jaxrobust.runtime.text import raster

_FIGURE = re.compile(r"<figure [^>]*id=.*?</figure>", re.DOTALL)
_POINTS = 400  # that a curve is thinned to
_WIDTH, _EDGE, _LINE = 340, 6, 15  # of figures.py; around them; height of a line of text
_LETTER = 6.2  # width, on average, of the letters of the legend


def of_phase(workdir: Path, phase: str) -> dict[str, str]:
    """Return the figures of a phase's training and of its last record: name to text of an SVG."""
    contents = gathered.gather([workdir])
    run = next(run for run in contents.runs if run.folder == workdir)
    parts = [training.part(one_phase(run, phase), "training", _POINTS)]
    own = [e for e in contents.evaluations if e.file == workdir / "results.jsonl"]
    own = [e for e in own if e.phase == phase]
    parts += [evaluation.part(one, "record", contents.runs) for one in own[-1:]]
    return {name: svg for part in parts for name, svg in standalone(part, phase)}


def one_phase(run: gathered.ReportedRun, phase: str) -> gathered.ReportedRun:
    """Return a run as if it had this phase alone."""
    metrics = run.metrics
    curves = {name: own for name, own in metrics.curves.items() if name == phase}
    events = [event for event in metrics.events if event.phase == phase]
    return run._replace(metrics=metrics._replace(curves=curves, events=events))


def standalone(part: Html, phase: str = "") -> Iterator[tuple[str, str]]:
    """Yield (name, such as `learning-rate`, text of an SVG file) for each figure of a part."""
    for text in _FIGURE.findall(part):
        figure = ElementTree.fromstring(text)
        title = "".join(figure.find("figcaption").itertext())  # type: ignore[union-attr]
        drawn = figure.find("svg")
        if drawn is not None:
            name = "-".join(re.findall(r"[a-z0-9]+", title.removesuffix(f", {phase}").lower()))
            yield name, _file(title, drawn, figure.findall("ul[@class='legend']/li"))


def _file(title: str, drawn: ElementTree.Element, legend: list[ElementTree.Element]) -> str:
    head = [
        tag("text", line, x=2, y=12 + _LINE * at, style=f"font:bold 12px {raster.FONTS};fill:#000")
        for at, line in enumerate(wrap(title, 48))
    ]
    _, _, width, height = map(float, drawn.attrib["viewBox"].split())
    y = _LINE * len(head) + 4
    drawn.attrib |= {"y": f"{y}", "width": f"{width:g}", "height": f"{height:g}"}
    signs, below = _legend(legend, y + height + 4)
    parts = [*head, _written(drawn), *signs]
    across, down = (f"{length + 2 * _EDGE:g}" for length in (width, below))
    size = {"viewBox": f"{-_EDGE} {-_EDGE} {across} {down}", "width": across, "height": down}
    return tag("svg", parts, xmlns="http://www.w3.org/2000/svg", **size)


def _legend(items: list[ElementTree.Element], top: float) -> tuple[list[Html], float]:
    parts, x, y = [], 0.0, top
    for item in items:
        name = " ".join(item.itertext())
        swatch = item.find("svg")
        room = 28 if swatch is not None else 0  # a sign is a letter of the name
        if x and x + room + _LETTER * len(name) > _WIDTH:
            x, y = 0.0, y + _LINE
        if swatch is not None:
            swatch.attrib |= {"x": f"{x:g}", "y": f"{y + 1:g}", "width": "22", "height": "10"}
            parts.append(_written(swatch))
        style = f"font:11px {raster.FONTS};fill:#000"
        parts.append(tag("text", name, x=f"{x + room:g}", y=f"{y + 10:g}", style=style))
        x += room + _LETTER * len(name) + 12
    return parts, y + _LINE if items else top


def _written(drawn: ElementTree.Element) -> Html:
    for element in drawn.iter():
        if style := _style(element.tag, set(element.get("class", "").split())):
            element.set("style", style)
    return Html(ElementTree.tostring(drawn, encoding="unicode"))


def _style(name: str, classes: set[str]) -> str:
    declared: dict[str, str] = {}
    for selectors, declarations in _rules():
        for selector in selectors.split(","):
            kind, *needed = selector.strip().split(" ")[-1].split(".")
            if kind in ("", name) and set(needed) <= classes and (kind or needed):
                declared |= declarations
    light = STYLE.partition("}")[0]  # the first rule has the colours
    own = dict(re.findall(r"(--\w+):([^;}]*)", light)) | declared
    shown = {k: _resolved(v, own) for k, v in declared.items() if not k.startswith("--")}
    return ";".join(f"{key}:{value}" for key, value in shown.items())


def _resolved(value: str, variables: Mapping[str, str]) -> str:
    while name := re.search(r"var\((--\w+)\)", value):
        value = value.replace(name[0], variables.get(name[1], "currentColor"))
    return value.replace("system-ui,sans-serif", raster.FONTS)


def _rules() -> list[tuple[str, dict[str, str]]]:
    plain = re.sub(r"@media[^{]*\{(?:[^{}]*\{[^{}]*\})*[^{}]*\}", "", STYLE)
    plain = re.sub(r"@media print.*", "", plain, flags=re.DOTALL)
    return [
        (selectors, dict(part.split(":", 1) for part in body.split(";") if ":" in part))  # type: ignore[misc]
        for selectors, body in re.findall(r"([^{}]+)\{([^{}]*)\}", plain)
    ]
