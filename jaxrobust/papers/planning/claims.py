"""What a paper compares: rows of a table that differ in one thing, and whether ours are apart.

A claim rests on two rows, not on one. Where two networks of ours are evaluated on a part of the
images already, and McNemar's exact test tells them apart there, the rest of their images says
nothing new about the claim. Each pair is tested alone, at 5 %: who looks often, or at many pairs,
is told more than is true by that much, so a plan may stop early, and no record says so.
"""

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from jaxrobust.evaluation.records import pairs
from jaxrobust.papers.planning.runs import PaperRun
from jaxrobust.papers.tables import tables
from jaxrobust.papers.tables.tables import Table
from jaxrobust.results.comparison import evaluations

SIGNIFICANT = 0.05
_METHOD = "autoattack standard"  # of records that the tables are about
_OF_STEMS = ("start", "pretrain_epochs", "stem", "design")  # which differ where the stem does


def compared(paper: str, planned: Iterable[PaperRun]) -> Iterator[tuple[str, str, str]]:
    """List the pairs of runs that a table compares, each with a threat: linf:4/255."""
    of_rows = {place: each.folder for each in planned for place in each.rows}
    by_id = {table.id: table for table in tables.tables(paper)}
    seen = set()
    for (one, first), (other, second) in itertools.combinations(of_rows.items(), 2):
        if one.table != other.table or first == second:
            continue
        table = by_id[one.table]
        if not _alike(table, table.rows[one.row], table.rows[other.row]):
            continue
        for threat in _threats(table, table.rows[one.row], table.rows[other.row]):
            if (first, second, threat) not in seen:
                seen.add((first, second, threat))
                yield first, second, threat


def _alike(table: Table, one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Tell whether two rows differ in one thing: a setting of the training, or the stem."""
    models = {str(row.get("model")).removesuffix("_cvst") for row in (one, other)}
    if len(models) > 1 or one["image_size"] != other["image_size"]:
        return False
    settings = [tables.settings(table, row) for row in (one, other)]
    keys = {*settings[0], *settings[1]}
    differing = {key for key in keys if settings[0].get(key) != settings[1].get(key)}
    if one.get("model") != other.get("model"):
        return differing <= set(_OF_STEMS)
    return len(differing) == 1


def _threats(table: Table, *rows: dict[str, Any]) -> Iterator[str]:
    for key, what in table.attacked().items():
        if what["attack"] == "autoattack" and all(row.get(key) is not None for row in rows):
            yield f"{what['norm']}:{what['epsilon']}"


def apart(paper: str, planned: list[PaperRun], root: Path) -> set[str]:
    """Find the runs of which every comparison is decided, in each of its threats."""
    decided: dict[str, list[bool]] = {}
    for first, second, threat in compared(paper, planned):
        differ = _told_apart(root / first, root / second, threat)
        for folder in (first, second):
            decided.setdefault(folder, []).append(differ)
    return {folder for folder, each in decided.items() if all(each)}


def _told_apart(first: Path, second: Path, threat: str) -> bool:
    places = [folder / "evaluation" for folder in (first, second)]
    if not all((place / "results.jsonl").is_file() for place in places):
        return False
    try:
        one, other = evaluations.load([*map(str, places)], threat)
    except ValueError:  # such as other images, or no verdicts
        return False
    if not all(str(each.record.method).startswith(_METHOD) for each in (one, other)):
        return False
    return pairs.compare(one.verdicts.robust, other.verdicts.robust).p < SIGNIFICANT
