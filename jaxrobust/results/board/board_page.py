"""The page of all boards, made from bundles: self-contained HTML and CSS without scripts."""

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

_WEAKER = "A stronger attack can only fool more images: robust accuracies are at most these."
PAGE = "index.html"
TITLE = "Robust accuracy, verified"
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
_HEAD = (
    *("rank", "network", "clean", "robust", "95% interval", "images"),
    *("passes per image", "time", "flags"),
)
_LEAD = (
    "Every number here is from a bundle that was verified before this page was made. The network "
    "itself was run on each image, clean and attacked, so clean accuracy is exact, and robust "
    "accuracy is at most the value shown. Then APGD-CE and APGD-T (in L0, two variants of "
    "Sparse-PGD) attacked a random sample of the surviving images: with 95% confidence, accuracy "
    "under these two is at least the bound below. Under common corruptions the network was run on "
    "every corrupted image, so accuracies are exact. Anyone with the bundle and the network can "
    "check it with the command in its row. The attack, its cost and its flags are as stated by the "
    "bundle."
)
_RANKS = (
    "Sorted by the lower bound on robust accuracy. A network shares the rank of the first of its "
    "group if McNemar's exact test, on their common images, cannot tell the two apart (p at least "
    f"{ALPHA}, corrected by Holm's method for all pairs of a table; surviving images that may "
    "still be fooled do not count in favor of the first). Intervals are exact (Clopper-Pearson), "
    "for robust accuracy. Under common corruptions, networks are sorted by the mean over all "
    "corruptions and compared by a paired t test over images; intervals use the standard error "
    "over images. A pass is one image through the network, forward or backward."
)


def make(
    paths: Sequence[Path], out: Path, *, networks: Path | None = None, **settings: Any
) -> dict[str, Any]:
    """Write `out`/index.html for the bundles that verify; return its content for JSON.

    Args:
      paths: bundles, or folders of several.
      out: folder of the page, created if needed.
      networks: file that names the network of each bundle; None: `networks.toml` next to each.
      settings: `batch`, `sample` and `seed`, as for `jaxrobust verify`.
    Raises:
      ValueError: there is no bundle, or `out` is a file. A bundle that fails verification is named
        on stderr and on the page, and `whole` is False.
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
        else:  # a copy of a bundle does not count as another network
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
    """Render the page of boards, with the bundles left out and the reasons."""
    sections = []
    for number, board in enumerate(boards, 1):
        # Each section of the page has its own anchor: cifar10-test-l-8-255-1.
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
    """Return the title of a board."""
    return f"{board.data}: {board.threat}"


def _network(row: Standing, rows: Sequence[Standing], head: Sequence[str]) -> dict[str, Any]:
    one, split = row.entry, row.entry.split_images
    shared = sum(other.rank == row.rank for other in rows) > 1
    values: list[tuple[str, str]] = [
        (f"{row.rank}{' (shared)' if shared else ''}", ""),
        (one.name, one.weights),
        ("not stated" if one.clean is None else percent(one.clean), ""),
        (percent(one.robust), "" if one.corruptions else f"at least {percent(one.at_least)}"),
        (f"{100 * one.interval[0]:.2f} to {percent(one.interval[1])}", ""),
        (f"{one.n:,} of {split:,}" if split else f"{one.n:,}", ""),
        ("not stated" if one.passes is None else f"{one.passes / one.n:,.0f}", ""),
        ("not stated" if one.seconds is None else _time(one.seconds), ""),
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
    """Format a share of images: 51.24%."""
    return f"{100 * value:.2f}%"


def _time(seconds: float) -> str:
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:,.1f} s"


def plain(boards: Sequence[Board], left_out: Mapping[str, str]) -> dict[str, object]:
    """Return the content of a page for JSON; accuracies are fractions."""
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
