"""The page of all boards, made of bundles: HTML and CSS, which loads nothing and has no script."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxrobust import __version__
from jaxrobust.report import markup
from jaxrobust.results.board import entries, listing, ranking
from jaxrobust.results.board.entries import BoardEntry
from jaxrobust.results.board.ranking import ALPHA, Board, Standing
from jaxrobust.runtime.files import whole
from jaxrobust.runtime.text.progress import say
from jaxrobust.runtime.text.spelling import counted

_WEAKER = "A stronger attack than this can only find more: robust accuracies are at most these."
PAGE = "index.html"
TITLE = "Robust accuracy, verified"
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
_HEAD = (
    *("rank", "network", "clean", "robust", "95% interval", "images"),
    *("passes an image", "time", "flags"),
)
_LEAD = (
    "Every number here is of a bundle that was verified before this page was made: each image was "
    "tried on the network itself, as it is and as the attack leaves it, so clean accuracy is what "
    "is shown, and robust accuracy at most that. Then APGD-CE and APGD-T attacked a random sample "
    "of the images that survive: with 95% confidence these two leave at least what stands below. "
    "Under common corruptions each image was tried with each of them, and the accuracies are what "
    "is shown. Anyone with the bundle and the network can check it with the command in its row. "
    "Which attack searched, what it cost, and its flags are what the bundle says."
)
_RANKS = (
    "Sorted by the robust accuracy that is left at least. Networks share a rank with the first of "
    "it where McNemar's exact "
    f"test, on the images that both have, cannot tell the two apart (p at least {ALPHA}, corrected "
    "by Holm's method for all pairs of a table; standing images that may fall are not images that "
    "only the first keeps). Intervals are exact (Clopper-Pearson), of robust "
    "accuracy. Under common corruptions the mean over all of them is what is sorted, the paired t "
    "test over images tells two networks apart, and intervals are by the standard error over "
    "images. A pass is one of an image through the network, forward or backward."
)


def make(
    paths: Sequence[Path], out: Path, *, networks: Path | None = None, **settings: Any
) -> dict[str, Any]:
    """Write `out`/index.html of the bundles that verified; return all of it for JSON.

    Args:
      paths: bundles, or folders of several.
      out: folder of the page, which is made if need be.
      networks: file that says which network each bundle is of; None: `networks.toml` next to each.
      settings: `batch`, `sample` and `seed`, as `jaxrobust verify` takes them.
    Raises:
      ValueError: there is no bundle, or `out` is a file. A bundle that does not verify is named on
        stderr and on the page, and `whole` is False.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out={out} is a file; name a folder")
    listed = listing.find(paths, networks)
    by_name: dict[str, BoardEntry] = {}
    left_out: dict[str, str] = {}
    for number, one in enumerate(listed, 1):
        say(f"bundle {number} of {len(listed)}: {one.folder}")
        verified = entries.verified(one, **settings)
        if isinstance(verified, str):
            left_out[str(one.folder)] = verified
            say(f"{one.folder} is left out: {verified}; it is not ranked")
        else:  # a copy of a bundle is no other network
            by_name.setdefault(verified.numbers[0], verified)
    boards = ranking.boards([*by_name.values()])
    text = page(boards, left_out)
    out.mkdir(parents=True, exist_ok=True)
    with whole.writing(out / PAGE, len(text.encode())) as part:
        part.write_text(text, encoding="utf-8")
    missing = f", {counted(len(left_out), 'bundle')} left out" if left_out else ""
    shown = f"{counted(len(by_name), 'bundle')} on {counted(len(boards), 'board')}{missing}"
    print(f"{out / PAGE}: {shown}")
    return {"out": str(out / PAGE)} | plain(boards, left_out)


def page(boards: Sequence[Board], left_out: Mapping[str, str]) -> str:
    """Write the page of boards, and of the bundles that were left out with the reasons."""
    sections = []
    for number, board in enumerate(boards, 1):
        # Each place on the page has its own name: cifar10-test-l-8-255-1.
        key = re.sub(r"[^a-z0-9]+", "-", title(board).lower()).strip("-")
        tables = []
        for table in board.tables:
            caption = f"{'Images: ' if table.corrupted else 'Attacked by '}{table.attack}"
            head = ["mean" if table.corrupted and name == "robust" else name for name in _HEAD]
            networks = [_network(row, table.rows, head) for row in table.rows]
            tables.append((caption, head, networks, "" if table.standard else _WEAKER))
        sections.append((f"{key}-{number}", title(board), tables))
    return markup.ENVIRONMENT.get_template("board.html").render(
        title=TITLE, policy=_POLICY, refresh="", lead=_LEAD, ranks=_RANKS, sections=sections,
        left_out=left_out, made=f"Made by jaxrobust {__version__}.",
    )  # fmt: skip


def title(board: Board) -> str:
    """Name a board."""
    return f"{board.data}: {board.threat}"


def _network(row: Standing, rows: Sequence[Standing], head: Sequence[str]) -> dict[str, Any]:
    one, split = row.entry, row.entry.split_images
    shared = sum(other.rank == row.rank for other in rows) > 1
    values: list[tuple[str, str]] = [
        (f"{row.rank}{' (shared)' if shared else ''}", ""),
        (one.name, one.weights),
        ("not said" if one.clean is None else percent(one.clean), ""),
        (percent(one.robust), "" if one.corruptions else f"at least {percent(one.at_least)}"),
        (f"{100 * one.interval[0]:.2f} to {percent(one.interval[1])}", ""),
        (f"{one.n:,} of {split:,}" if split else f"{one.n:,}", ""),
        ("not said" if one.passes is None else f"{one.passes / one.n:,.0f}", ""),
        ("not said" if one.seconds is None else _time(one.seconds), ""),
        (", ".join(one.flags) or "none", ""),
    ]
    remarks = [f"time on {one.device}"] if one.device else []
    if row.common < one.n:
        remarks.append(f"compared with the first of its rank on {row.common:,} images")
    return {
        "cells": [(name, *value) for name, value in zip(head, values, strict=True)],
        "bundles": list(zip(one.numbers, one.commands, strict=True)),
        "remarks": "; ".join(remarks),
        "flags": one.flags,
    }


def percent(value: float) -> str:
    """Write a share of images: 51.24%."""
    return f"{100 * value:.2f}%"


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
                    {"attack": table.attack, "rows": [_row(row) for row in table.rows]}
                    for table in board.tables
                ],
            }
            for board in boards
        ],
        "left_out": dict(left_out),
        "whole": not left_out,
    }


def _row(row: Standing) -> dict[str, object]:
    one: BoardEntry = row.entry
    return {
        "rank": row.rank,
        **{"network": one.name, "weights": one.weights, "images": one.n},
        **{"clean": one.clean, "robust": one.robust, "robust_at_least": one.at_least},
        "interval": list(one.interval),
        **{"passes": one.passes, "seconds": one.seconds, "flags": one.flags},
        **{"bundles": list(one.numbers), "commands": list(one.commands)},
    }
