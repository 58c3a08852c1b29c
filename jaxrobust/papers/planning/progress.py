"""How far a plan is, by what runs have left behind, and what a budget buys first."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from jaxrobust.papers.planning import claims
from jaxrobust.papers.planning.costs import RunCost
from jaxrobust.papers.planning.runs import PaperRun
from jaxrobust.papers.tables import matching, tables
from jaxrobust.results.run_records import RunRecord
from jaxrobust.weights.trained import start_run

DONE, APART, BEGUN, PLANNED = "done", "apart", "begun", "planned"
BEYOND, REFUSED = "beyond", "refused"
OVER = (DONE, APART, BEYOND, REFUSED)  # which nothing is asked of


class PlannedStep(NamedTuple):
    """A run in the order in which they are made."""

    planned: PaperRun
    cost: RunCost
    state: str
    cells: tuple[int, int]  # of its rows: those that records fill, and all


def in_order(
    paper: str,
    costs: Sequence[tuple[PaperRun, RunCost]],
    records: list[RunRecord],
    *,
    root: Path,
    budget: float | None,
) -> list[PlannedStep]:
    """Order the runs: those of the claims first, each behind what it needs, within the budget.

    Args:
      records: of our runs, which fill cells of the tables.
      root: the folder in which `runs/...` are.
      budget: hours for what is not done yet; a run that it does not pay is left out, and with it
        those that need it. None: all.
    """
    by_id = {table.id: table for table in tables.tables(paper)}
    cells = {own.folder: _cells(own, by_id, records) for own, _ in costs}
    states = {own.folder: _state(own, cells[own.folder], root) for own, _ in costs}
    decided = claims.apart(paper, [own for own, _ in costs], root)
    states |= {folder: APART for folder in decided if states[folder] == BEGUN}
    refused = {own.folder for own, cost in costs if cost.refused}
    for own, _ in costs:  # and what needs it, which comes behind
        if states[own.folder] not in (DONE, APART) and refused & {own.folder, *own.needs}:
            states[own.folder] = REFUSED
            refused.add(own.folder)
    if budget is not None:
        _spend(costs, states, budget)
    return [PlannedStep(*each, states[each[0].folder], cells[each[0].folder]) for each in costs]


def _spend(costs: Sequence[tuple[PaperRun, RunCost]], states: dict[str, str], left: float) -> None:
    """Pay runs in their order, each with what it needs, and say of the others that they wait."""
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
        if hours <= left:
            left -= hours
            paid |= wanted
    states |= {folder: BEYOND for folder in states.keys() - paid if states[folder] != REFUSED}


def _cells(planned: PaperRun, by_id: dict, records: list[RunRecord]) -> tuple[int, int]:
    filled = every = 0
    for place in planned.rows:
        table = by_id[place.table]
        row = table.rows[place.row]
        for key, what in table.attacked().items():
            if row.get(key) is None:
                continue
            every += 1
            filled += any(
                matching.measured(what, ours.record) is not None
                and not matching.differences(table, row, key, ours)
                for ours in records
            )
    return filled, every


def _state(planned: PaperRun, cells: tuple[int, int], root: Path) -> str:
    folder = root / planned.folder
    if cells[1] and cells[0] == cells[1]:
        return DONE
    if not planned.rows and (folder / "config.json").is_file():
        config = planned.run.load()
        same = not start_run.differences(folder, config)
        if same and start_run.is_finished(folder, config):
            return DONE
    return BEGUN if (folder / "config.json").is_file() else PLANNED
