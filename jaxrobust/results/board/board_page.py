"""The page of all boards: HTML and CSS, which loads nothing and needs no script."""

import re
from collections.abc import Mapping, Sequence

from jaxrobust import __version__
from jaxrobust.report.drawing.appearance import STYLE
from jaxrobust.report.drawing.markup import Child, Html, remark, tag
from jaxrobust.results.board.entries import BoardEntry
from jaxrobust.results.board.ranking import ALPHA, AttackTable, Board, Standing

TITLE = "Robust accuracy, verified"
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
_HEAD = (
    *("rank", "network", "clean", "robust", "95 % interval", "images"),
    *("passes an image", "time", "flags"),
)
_STYLE = """
table{width:100%}tbody{border-bottom:1px solid var(--rule)}tbody td{border-bottom:0}
th:nth-child(1){width:9%}th:nth-child(2){width:23%}th:nth-child(3),th:nth-child(4){width:8%}
th:nth-child(5){width:15%}th:nth-child(6){width:10%}th:nth-child(7){width:9%}th:nth-child(8){width:7%}
.rank{white-space:nowrap;font-weight:600}td b{overflow-wrap:anywhere}
tr.check td{padding-top:0;padding-bottom:8px;font-size:.85rem;color:var(--soft)}
code{font:12px/1.5 ui-monospace,monospace;overflow-wrap:anywhere}
.check p{margin:2px 0;max-width:none}.check span{margin-right:1.5em}
.check details{margin:2px 0}summary{font-weight:400}
.check ul{margin:2px 0;padding-left:1.4em;max-width:64em}
@media (max-width:760px){thead{display:none}
table,caption,tbody,tr,td,.check span{display:block}tbody{padding:8px 0}
td{padding:1px 0}td[data-head]{display:flex;gap:10px;justify-content:space-between}
td[data-head]::before{content:attr(data-head);color:var(--soft);flex:none;font-weight:400}
td[data-head] .cell{text-align:right;min-width:0}tr.check td{padding:4px 0}}
@media print{tbody{break-inside:avoid}}
"""
_LEAD = (
    "Every number here is of a bundle that was verified before this page was made: each image was "
    "tried on the network itself, as it is and as the attack leaves it, so clean accuracy is what "
    "is shown, and robust accuracy at most that. Then APGD-CE and APGD-T attacked a random sample "
    "of the images that stand: with 95 % confidence these two leave at least what stands below. "
    "Under common corruptions each image was tried with each of them, and the accuracies are what "
    "is shown. Whoever has the bundle and the network can check it with the command in its row. "
    "Which attack searched, what it cost, and its flags are what the bundle says."
)
_RANKS = (
    "Sorted by the robust accuracy that is left at least. Networks share a rank with the first of "
    "it where McNemar's exact "
    f"test, on the images that both have, cannot tell the two apart (p at least {ALPHA}, corrected "
    "by Holm's method for all pairs of a table; standing images that may fall are no images that "
    "only the first keeps). Intervals are exact (Clopper-Pearson), of robust "
    "accuracy. Under common corruptions the mean over all of them is what is sorted, the paired t "
    "test over images tells two networks apart, and intervals are by the standard error over "
    "images. A pass is one of an image through the network, forward or backward."
)


def page(boards: Sequence[Board], left_out: Mapping[str, str]) -> str:
    """Write the page of boards, and of the bundles that were left out with the reasons."""
    head = tag(
        "head",
        Html('<meta charset="utf-8"/>'),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("title", TITLE),
        tag("style", Html(STYLE + _STYLE)),
    )
    keys = _keys([title(board) for board in boards])
    links = [
        tag("li", tag("a", title(board), href=f"#{key}"))
        for board, key in zip(boards, keys, strict=True)
    ]
    nav = tag("nav", tag("ul", links), aria_label="Boards") if len(boards) > 1 else None
    sections = [_board(board, key) for board, key in zip(boards, keys, strict=True)]
    none = None if boards else tag("p", "No bundle verified, so there is no board.")
    about = (tag("p", _LEAD), tag("p", _RANKS, class_="note"))
    main = tag("main", tag("h1", TITLE), about, nav, none, sections, _foot(left_out))
    return f"<!DOCTYPE html>\n{tag('html', head, tag('body', main), lang='en')}\n"


def title(board: Board) -> str:
    """Name a board."""
    return f"{board.data}: {board.threat}"


def _keys(titles: Sequence[str]) -> list[str]:
    """Name places on the page, each once: cifar10-test-l-8-255-1."""
    plain = (re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") for text in titles)
    return [f"{text}-{number}" for number, text in enumerate(plain, 1)]


def _board(board: Board, key: str) -> Html:
    tables = [_table(table, title(board)) for table in board.tables]
    return tag("section", tag("h2", title(board)), tables, id=key)


def _table(table: AttackTable, of: str) -> list[Child]:
    weaker = "A stronger attack than this can only find more: robust accuracies are at most these."
    names = _names(table.corrupted)
    head = tag("tr", [tag("th", name, scope="col") for name in names])
    bodies = [_network(row, table.rows) for row in table.rows]
    caption = f"{'Images: ' if table.corrupted else 'Attacked by '}{table.attack}"
    whole = tag("table", tag("caption", caption), tag("thead", head), bodies)
    label = f"{caption}: {of}"
    return [
        tag("div", whole, class_="wide", tabindex=0, role="region", aria_label=label),
        None if table.standard else remark(weaker),
    ]


def _network(row: Standing, rows: Sequence[Standing]) -> Html:
    one = row.entry
    shared = sum(other.rank == row.rank for other in rows) > 1
    split = one.split_images
    cells: list[Child] = [
        f"{row.rank}{' (shared)' if shared else ''}",
        [tag("b", one.name), tag("br"), tag("span", one.weights, class_="note")]
        if one.weights
        else tag("b", one.name),
        "not said" if one.clean is None else percent(one.clean),
        [tag("b", percent(one.robust)), *_least(one)],
        f"{100 * one.interval[0]:.2f} to {percent(one.interval[1])}",
        f"{one.n:,} of {split:,}" if split else f"{one.n:,}",
        "not said" if one.passes is None else f"{one.passes / one.n:,.0f}",
        "not said" if one.seconds is None else _time(one.seconds),
        ", ".join(one.flags) or "none",
    ]
    tds = [
        tag("td", tag("div", cell, class_="cell"), class_=_class(name), data_head=name)
        for name, cell in zip(_names(bool(one.corruptions)), cells, strict=True)
    ]
    check = tag("td", _check(row), colspan=len(_HEAD))
    return tag("tbody", tag("tr", tds), tag("tr", check, class_="check"))


def _least(one: BoardEntry) -> list[Child]:
    if one.corruptions:
        return []
    return [tag("br"), tag("span", f"at least {percent(one.at_least)}", class_="note")]


def _names(corrupted: bool) -> tuple[str, ...]:
    """Name the columns of a table."""
    return tuple("mean" if corrupted and name == "robust" else name for name in _HEAD)


def _class(name: str) -> str | None:
    return "rank" if name == "rank" else None if name in ("network", "flags") else "n"


def _check(row: Standing) -> list[Child]:
    one = row.entry
    parts: list[Child] = []
    for number, command in zip(one.numbers, one.commands, strict=True):
        bundle = tag("span", "bundle ", tag("code", number))
        parts.append(tag("p", bundle, " ", tag("code", command)))
    remarks = [f"time on {one.device}"] if one.device else []
    if row.common < one.n:
        remarks.append(f"compared with the first of its rank on {row.common:,} images")
    if remarks:
        parts.append(tag("p", "; ".join(remarks)))
    if one.flags:
        items = [tag("li", f"{name}: {text}") for name, text in one.flags.items()]
        parts.append(tag("details", tag("summary", "what the flags say"), tag("ul", items)))
    return parts


def _foot(left_out: Mapping[str, str]) -> Html:
    made = remark(f"Made by jaxrobust {__version__}.")
    if not left_out:
        return tag("footer", made)
    items = [tag("li", tag("b", name), f": {reason}") for name, reason in left_out.items()]
    heading = tag("h2", "Left out, not ranked: bundles that did not verify")
    return tag("footer", heading, tag("ul", items, class_="doubts"), made)


def percent(value: float) -> str:
    """Write a share of images: 51.24 %."""
    return f"{100 * value:.2f} %"


def _time(seconds: float) -> str:
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:,.1f} s"


def plain(boards: Sequence[Board], left_out: Mapping[str, str]) -> dict[str, object]:
    """List all of a page for JSON; accuracies are fractions."""
    return {
        "boards": [
            {
                "data": board.data,
                "threat": board.threat,
                "tables": [
                    {"attack": table.attack, "rows": [_plain(row) for row in table.rows]}
                    for table in board.tables
                ],
            }
            for board in boards
        ],
        "left_out": dict(left_out),
        "whole": not left_out,
    }


def _plain(row: Standing) -> dict[str, object]:
    one: BoardEntry = row.entry
    return {
        "rank": row.rank,
        **{"network": one.name, "weights": one.weights, "images": one.n},
        **{"clean": one.clean, "robust": one.robust, "robust_at_least": one.at_least},
        "interval": list(one.interval),
        **{"passes": one.passes, "seconds": one.seconds, "flags": one.flags},
        **{"bundles": list(one.numbers), "commands": list(one.commands)},
    }
