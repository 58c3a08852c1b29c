"""Figures of the page as standalone SVG files, for programs that show pictures."""

import re
from collections.abc import Iterator
from pathlib import Path
from textwrap import wrap
from xml.etree import ElementTree

from markupsafe import Markup

from jaxrobust.report import gathered, markup
from jaxrobust.report.parts import evaluation, training
from jaxrobust.runtime.text import raster

_FIGURE = re.compile(r"<figure [^>]*id=.*?</figure>", re.DOTALL)
_POINTS = 400  # per curve, after thinning
_WIDTH, _EDGE, _LINE = 340, 6, 15  # of a figure; margin around it; height of a line of text
_LETTER = 6.2  # average width of the letters of the legend


def of_phase(workdir: Path, phase: str) -> dict[str, str]:
    """Return the figures of a phase's training and of its last record: name -> SVG text."""
    contents = gathered.gather([workdir])
    run = next(run for run in contents.runs if run.folder == workdir)
    curves = {name: of for name, of in run.metrics.curves.items() if name == phase}
    events = [event for event in run.metrics.events if event.phase == phase]
    run = run._replace(metrics=run.metrics._replace(curves=curves, events=events))
    parts = [training.part(run, "training", _POINTS)]
    tested = [e for e in contents.evaluations if e.file == workdir / "results.jsonl"]
    tested = [e for e in tested if e.phase == phase]
    parts += [evaluation.part(one, "record", contents.runs) for one in tested[-1:]]
    return {name: svg for part in parts for name, svg in standalone(part, phase)}


def standalone(part: Markup, phase: str = "") -> Iterator[tuple[str, str]]:
    """Yield (name, such as `learning-rate`, text of an SVG file) for each figure of a part."""
    colours = dict(re.findall(r"(--\w+):([^;}]*)", _css("page").partition("}")[0]))  # light ones
    style = re.sub(r"var\((--\w+)\)", lambda name: colours[name[1]], _css("figures"))
    style = Markup(style.replace("system-ui,sans-serif", raster.FONTS))
    for text in _FIGURE.findall(part):
        figure = ElementTree.fromstring(text)
        title = "".join(figure.find("figcaption").itertext())  # type: ignore[union-attr]
        drawn = figure.find("svg")
        if drawn is None:
            continue
        _, _, width, height = map(float, drawn.attrib["viewBox"].split())
        lines = wrap(title, 48)
        top = _LINE * len(lines) + 4
        drawn.attrib |= {"y": f"{top}", "width": f"{width:g}", "height": f"{height:g}"}
        legend, bottom = _legend(figure.findall("ul[@class='legend']/li"), top + height + 4)
        size = [f"{length + 2 * _EDGE:g}" for length in (width, bottom)]
        name = "-".join(re.findall(r"[a-z0-9]+", title.removesuffix(f", {phase}").lower()))
        fonts = Markup(raster.FONTS)
        yield name, markup.parts.standalone(style, lines, fonts, size, _text(drawn), legend)


def _legend(
    items: list[ElementTree.Element], top: float
) -> tuple[list[tuple[str, str, Markup, str]], float]:
    """Lay out the names of a legend line by line; return them and their bottom edge."""
    parts, x, y = [], 0.0, top
    for item in items:
        name = " ".join(item.itertext())
        swatch = item.find("svg")
        room = 28 if swatch is not None else 0  # without a swatch, the sign is part of the name
        if x and x + room + _LETTER * len(name) > _WIDTH:
            x, y = 0.0, y + _LINE
        if swatch is not None:
            swatch.attrib |= {"x": f"{x:g}", "y": f"{y + 1:g}", "width": "22", "height": "10"}
        sign = Markup() if swatch is None else _text(swatch)
        parts.append((f"{x + room:g}", f"{y + 10:g}", sign, name))
        x += room + _LETTER * len(name) + 12
    return parts, y + _LINE if items else top


def _css(name: str) -> str:
    return (markup.FOLDER / f"{name}.css").read_text()


def _text(drawn: ElementTree.Element) -> Markup:
    drawn.tail = None
    return Markup(ElementTree.tostring(drawn, encoding="unicode"))
