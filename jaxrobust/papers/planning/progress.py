"""Progress of a plan, from the files of its runs, and what a budget pays for first.

A claim of a paper rests on two rows of a table that differ in one setting. If two of our networks
already differ by McNemar's exact test on a part of the images, evaluating the rest adds nothing to
the claim. Each pair is tested separately, at 5%. With many looks or many pairs, more than 5% of
the decisions may be wrong, so a plan may stop too early, and no record says so.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxrobust.evaluation.records import comparisons
from jaxrobust.papers.planning.costs import RunCost
from jaxrobust.papers.planning.runs import PaperRun
from jaxrobust.papers.tables import matching, tables
from jaxrobust.papers.tables.tables import Table
from jaxrobust.results.comparison import evaluations
from jaxrobust.results.run_records import RunRecord
from jaxrobust.weights.trained import start_run

DONE, APART, BEGUN, PLANNED = "done", "apart", "begun", "planned"
BEYOND, REFUSED = "beyond", "refused"
OVER = (DONE, APART, BEYOND, REFUSED)  # which need no further work

SIGNIFICANT = 0.05
_METHOD = "autoattack standard"  # of the records in the tables
_OF_STEMS = ("start", "pretrain_epochs", "stem", "design")  # which differ together with the stem


class PlannedStep(NamedTuple):
    """A run, in order of execution."""

    planned: PaperRun
    cost: RunCost
    state: str
    cells: tuple[int, int]  # of its rows: filled ones, and all


def in_order(
    paper: str,
    costs: Sequence[tuple[PaperRun, RunCost]],
    records: list[RunRecord],
    *,
    root: Path,
    budget: float | None,
) -> list[PlannedStep]:
    """Order the runs within the budget: claims first, each run after those that it needs.

    Args:
      records: records of our runs, which fill cells of the tables.
      root: the folder that contains `runs/...`.
      budget: hours for remaining work; a run beyond the budget is left out, together with those
        that need it. None: unlimited.
    """
    by_id = _by_id(paper)
    cells = {run.folder: _cells(run, by_id, records) for run, _ in costs}
    states = {run.folder: _state(run, cells[run.folder], root) for run, _ in costs}
    decided = apart(paper, [run for run, _ in costs], root)
    states |= {folder: APART for folder in decided if states[folder] == BEGUN}
    refused = {run.folder for run, cost in costs if cost.refused}
    for run, _ in costs:  # and the later runs that need it
        if states[run.folder] not in (DONE, APART) and refused & {run.folder, *run.needs}:
            states[run.folder] = REFUSED
            refused.add(run.folder)
    if budget is not None:
        _spend(costs, states, budget)
    return [PlannedStep(run, cost, states[run.folder], cells[run.folder]) for run, cost in costs]


def _spend(
    costs: Sequence[tuple[PaperRun, RunCost]], states: dict[str, str], budget: float
) -> None:
    """Spend the budget on runs in order, each with those that it needs; the others wait."""
    by_folder = {planned.folder: (planned, cost) for planned, cost in costs}
    paid = {folder for folder, state in states.items() if state in (DONE, APART)}

    def unpaid(folder: str) -> set[str]:
        if folder in paid:
            return set()
        return {folder}.union(*map(unpaid, by_folder[folder][0].needs))

    for planned, _ in costs:
        runs_here = planned.rows and states[planned.folder] != REFUSED
        wanted = unpaid(planned.folder) if runs_here else set()
        hours = sum(by_folder[folder][1].hours for folder in wanted)
        if hours <= budget:
            budget -= hours
            paid |= wanted
    states |= {folder: BEYOND for folder in states.keys() - paid if states[folder] != REFUSED}


def _by_id(paper: str) -> dict[str, Table]:
    return {table.id: table for table in [*tables.tables(paper), tables.figures(paper)]}


def _cells(planned: PaperRun, by_id: dict, records: list[RunRecord]) -> tuple[int, int]:
    filled = every = 0
    for place in planned.rows:
        table = by_id[place.table]
        row = table.rows[place.row]
        for key, result in table.attacked().items():
            if row.get(key) is None:
                continue
            every += 1
            filled += any(
                matching.measured(result, run_record.record) is not None
                and not matching.differences(table, row, key, run_record)
                for run_record in records
            )
    return filled, every


def _state(planned: PaperRun, cells: tuple[int, int], root: Path) -> str:
    folder = root / planned.folder
    if cells[1] and cells[0] == cells[1]:
        return DONE
    no_cells = all(place.table == tables.FIGURES for place in planned.rows)
    evaluated = not planned.flags or (folder / "evaluation" / "results.jsonl").is_file()
    if no_cells and evaluated and (folder / "config.json").is_file():
        config = planned.run.load()
        same = not start_run.differences(folder, config)
        if same and start_run.is_finished(folder, config):
            return DONE
    return BEGUN if (folder / "config.json").is_file() else PLANNED


def compared(paper: str, planned: Iterable[PaperRun]) -> Iterator[tuple[str, str, str]]:
    """List the pairs of runs that a table compares, each with a threat: linf:4/255."""
    of_rows = {place: run.folder for run in planned for place in run.rows}
    by_id = _by_id(paper)
    listed = set()
    for (one, first), (other, second) in itertools.combinations(of_rows.items(), 2):
        if one.table != other.table or first == second:
            continue
        table = by_id[one.table]
        if not _alike(table, table.rows[one.row], table.rows[other.row]):
            continue
        for threat in _threats(table, table.rows[one.row], table.rows[other.row]):
            if (first, second, threat) not in listed:
                listed.add((first, second, threat))
                yield first, second, threat


def _alike(table: Table, one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Tell whether two rows differ in exactly one setting of the training, or in the stem."""
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
    for key, result in table.attacked().items():
        if result["attack"] == "autoattack" and all(row.get(key) is not None for row in rows):
            yield f"{result['norm']}:{result['epsilon']}"


def apart(paper: str, planned: list[PaperRun], root: Path) -> set[str]:
    """Find the runs for which every comparison is decided, under each threat."""
    decided: dict[str, list[bool]] = {}
    for first, second, threat in compared(paper, planned):
        differ = _told_apart(root / first, root / second, threat)
        for folder in (first, second):
            decided.setdefault(folder, []).append(differ)
    return {folder for folder, decisions in decided.items() if all(decisions)}


def _told_apart(first: Path, second: Path, threat: str) -> bool:
    places = [folder / "evaluation" for folder in (first, second)]
    if not all((place / "results.jsonl").is_file() for place in places):
        return False
    try:
        one, other = evaluations.load([*map(str, places)], threat)
    except ValueError:  # such as other images, or no verdicts
        return False
    if not all(str(evaluation.record.method).startswith(_METHOD) for evaluation in (one, other)):
        return False
    return comparisons.compare(one.verdicts.robust, other.verdicts.robust).p < SIGNIFICANT
