"""A matrix of counts as SVG with its data beside it: a row and a column for each class."""

from collections.abc import Sequence

import numpy as np

from jaxrobust.report.drawing.figures import figure
from jaxrobust.report.drawing.markup import Html, tag

MOST = 15  # classes that can be told apart on a telephone
_LEFT, _TOP, _SIDE, _BELOW = 78, 6, 254, 78
_NUMBERS = 11  # classes up to which a count fits into its cell
_LEVELS = 6  # of colour
_LETTERS = 11  # of a name


def cells(
    identity: str, title: str, names: Sequence[str], counts: np.ndarray, *, alt: str, note: str
) -> Html:
    """Return a figure of counts i[K, K] of K <= `MOST` classes, rows over columns."""
    size = _SIDE / len(names)
    parts: list[Html] = [_shades(counts, size)]
    for at, name in enumerate(names):
        short = name if len(name) <= _LETTERS else f"{name[: _LETTERS - 1]}…"
        x, y = (f"{start + size * (at + 0.5):.1f}" for start in (_LEFT, _TOP))
        turned = f"translate({x} {_TOP + _SIDE + 5}) rotate(-90)"
        parts.append(tag("text", short, x=_LEFT - 4, y=y, dy="0.35em", class_="end"))
        parts.append(tag("text", short, class_="end", transform=turned, dy="0.35em"))
    if len(names) <= _NUMBERS:
        for row, column in np.argwhere(counts > 0).tolist():
            number = f"{counts[row, column]}" if counts[row, column] < 1000 else "1k+"
            x, y = f"{_LEFT + size * (column + 0.5):.1f}", f"{_TOP + size * (row + 0.5):.1f}"
            parts.append(tag("text", number, x=x, y=y, dy="0.35em", class_="middle ink"))
    grid = "".join(
        f"M{_LEFT} {_TOP + size * at:.1f}h{_SIDE}M{_LEFT + size * at:.1f} {_TOP}v{_SIDE}"
        for at in range(len(names) + 1)
    )
    parts.append(tag("path", d=grid, class_="grid"))
    frame = {"left": _LEFT, "top": _TOP, "cell": size}
    content = {"kind": "cells", "title": title, "names": names, "counts": counts, "frame": frame}
    drawn = [tag("g", parts, aria_hidden="true")]
    return figure(identity, title, drawn, _TOP + _SIDE + _BELOW, content, alt, [], note)


def _shades(counts: np.ndarray, size: float) -> Html:
    levels = -(-_LEVELS * counts // max(counts.max(initial=0), 1))
    paths, cell = [], f"h{size:.1f}v{size:.1f}h{-size:.1f}z"
    for level in range(1, _LEVELS + 1):
        places = "".join(
            f"M{_LEFT + size * column:.1f} {_TOP + size * row:.1f}{cell}"
            for row, column in np.argwhere(levels == level).tolist()
        )
        if places:
            shade = f"{0.5 * level / _LEVELS:.2f}"  # the number in it stays readable
            paths.append(tag("path", d=places, class_="heat", fill_opacity=shade))
    return tag("g", paths)
