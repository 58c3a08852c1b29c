"""HTML from text that is not trusted: what is not marked as HTML is escaped."""

import html
import json
import math
from collections.abc import Iterable, Sequence
from typing import Any

Child = Any  # Html as it is, None: nothing, a list: each of it, else: its text, escaped
_VOID = ("img", "meta", "br", "line", "path", "rect", "circle")


class Html(str):
    """Text that is HTML already."""

    __slots__ = ()


def tag(_name: str, *children: Child, **attributes: Any) -> Html:
    """Return an element; `class_` is class, `aria_label` aria-label, None or False left out."""
    written = []
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        name = key.rstrip("_").replace("_", "-")
        written.append(f" {name}" if value is True else f' {name}="{html.escape(str(value))}"')
    inside = join(children)
    if not inside and _name in _VOID:
        return Html(f"<{_name}{''.join(written)}/>")
    return Html(f"<{_name}{''.join(written)}>{inside}</{_name}>")


def join(children: Iterable[Child]) -> Html:
    """Return children one after the other."""
    return Html("".join(map(_text, children)))


def _text(child: Child) -> str:
    if child is None or isinstance(child, Html):
        return child or ""
    if isinstance(child, (list, tuple)):
        return join(child)
    return html.escape(str(child)).replace(" %", "\u00a0%")  # no line ends between them


def data(identity: str, value: Any) -> Html:
    """Return data as JSON inside of the page, where nothing can end the element early."""
    text = json.dumps(plain(value), separators=(",", ":"), allow_nan=False)
    for letter in "<>&\u2028\u2029":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return Html(f'<script type="application/json" id="{html.escape(identity)}">{text}</script>')


def plain(value: Any) -> Any:
    """Return a value as JSON has it: five digits, and null for what is not finite."""
    if isinstance(value, dict):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    if hasattr(value, "tolist"):  # of NumPy
        return plain(value.tolist())
    if isinstance(value, float):
        rounded = float(f"{value:.5g}") if math.isfinite(value) else None
        return int(value) if rounded is not None and value == int(value) else rounded
    return value


def remark(text: str) -> Html | None:
    """Return a paragraph in small letters; nothing of no text."""
    return tag("p", text, class_="note") if text else None


def doubts(texts: Iterable[str]) -> Html | None:
    """Return a list that warns; nothing of no texts."""
    items = [tag("li", text) for text in texts]
    return tag("ul", items, class_="doubts") if items else None


def table(
    caption: str,
    head: Sequence[str],
    rows: Iterable[Sequence[Child]],
    *,
    words: int = 1,
    of: str = "",
) -> Html:
    """Return a table that scrolls where it is too wide; its first `words` columns are text."""
    first = tag("tr", [tag("th", name, scope="col") for name in head])
    body = []
    for row in rows:
        cells = [tag("td", cell, class_=None if at < words else "n") for at, cell in enumerate(row)]
        body.append(tag("tr", cells))
    whole = tag("table", tag("caption", caption), tag("thead", first), tag("tbody", body))
    return tag("div", whole, class_="wide", tabindex=0, role="region", aria_label=f"{caption}{of}")


def copied(title: str, text: str) -> Html:
    """Return a text to copy, folded under its title, with a button."""
    button = tag("button", "Copy", type="button", class_="copy")
    inside = (tag("summary", title), button, tag("pre", Html(html.escape(text)), tabindex=0))
    return tag("details", inside, class_="copyonly")
