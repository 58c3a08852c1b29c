"""A plan for people: a line for each run."""

import itertools
from collections.abc import Sequence

from jaxrobust.analysis.planning.progress import APART, BEYOND, DONE, OVER, PlannedStep
from jaxrobust.estimate.devices import Target


def text(
    steps: Sequence[PlannedStep],
    paper: str,
    target: Target,
    utilisation: float,
    budget: float | None,
) -> str:
    """Write the runs in their order, with hours, sums and what they are for."""
    left = [step for step in steps if step.state not in OVER]
    filled, cells = (sum(step.cells[i] for step in steps) for i in (0, 1))
    hours = sum(step.cost.hours for step in left)
    chips = f"{target.chips} x {target.kind}"
    lines = [
        f"{paper} on {target.name} ({chips}), at an assumed {utilisation:.0%} of the peak",
        f"{len(steps)} runs, of which {sum(s.state == DONE for s in steps)} are done; records fill "
        f"{filled} of the {cells} cells of their rows",
        f"{len(left)} runs to make: {hours:,.0f} hours, {hours * target.chips:,.0f} chip-hours",
    ]
    if decided := sum(step.state == APART for step in steps):
        lines[1] += (
            f"; McNemar's test tells {decided} apart already from what they are compared with"
        )
    if budget is not None:
        beyond = sum(step.state == BEYOND for step in steps)
        lines[-1] += f", within a budget of {budget:,.0f} hours; {beyond} runs are beyond it"
    totals = itertools.accumulate(s.cost.hours if s in left else 0.0 for s in steps)
    width = max(len(step.planned.folder) for step in steps) - len("runs/")
    lines += ["", f"{'hours':>7} {'sum':>8}  {'run, under runs/':{width}}  state    rows"]
    for step, total in zip(steps, totals, strict=True):
        shown = f"{total:8,.1f}" if step in left else " " * 8
        name = step.planned.folder.removeprefix("runs/")
        own = "-" if step.cost.refused else f"{step.cost.hours:,.1f}"
        lines.append(f"{own:>7} {shown}  {name:{width}}  {step.state:7}  {_rows(step)}")
    for sentence in dict.fromkeys(step.cost.refused for step in steps if step.cost.refused):
        lines.append(f"refused: {sentence}")
    return "\n".join(lines)


def _rows(step: PlannedStep) -> str:
    by_table: dict[str, list[str]] = {}
    for place in step.planned.rows:
        by_table.setdefault(place.table, []).append(str(place.row + 1))
    rows = "; ".join(f"{table} {', '.join(numbers)}" for table, numbers in by_table.items())
    needs = ", ".join(need.removeprefix("runs/") for need in step.planned.needs)
    return f"{rows or 'a start'}{f' (after {needs})' if needs else ''}"
