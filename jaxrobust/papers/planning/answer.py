"""From what the command line names to a plan: its runs, costs, progress, scripts, and text."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxrobust.doctor.estimate import devices
from jaxrobust.doctor.estimate.devices import Target
from jaxrobust.papers.planning import costs, progress, runs, scripts
from jaxrobust.papers.planning.progress import APART, BEYOND, DONE, OVER, PlannedStep
from jaxrobust.papers.tables import matching
from jaxrobust.results import run_records
from jaxrobust.runtime.text import patience


def of(flags: Any, made_by: str) -> str:
    """Plan as the flags of `jaxrobust plan` say; the text for people."""
    target = devices.target(flags.on)
    if target.here:
        raise ValueError(f"--on {flags.on} is no chip that can be assumed; name some, as v5e:8x8")
    planned = runs.of_paper(flags.paper, flags.table, flags.row)
    with patience.lasting(f"estimating {len(planned)} runs"):
        how: dict[str, Any] = {"utilisation": flags.utilisation, "file": flags.estimates}
        priced = list(costs.of_runs(planned, target, **how))
    places = [
        Path(each.folder) for each in planned if (Path(each.folder) / "config.json").is_file()
    ]
    records = matching.collect_checked([*places, *flags.records])
    steps = progress.in_order(flags.paper, priced, records, root=Path(), budget=flags.budget)
    shown = text(steps, flags.paper, target, flags.utilisation, flags.budget)
    for doubt in dict.fromkeys(filter(None, map(run_records.other_config, records))):
        shown += f"\nnot counted: {doubt}"
    if flags.write is None:
        return shown
    written = scripts.write(steps, flags.write, made_by)
    return "\n".join([shown, "", "written:", *(f"  {path}" for path in written)])


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
        f"{len(left)} runs to make: {hours:,.0f} hours, {hours * target.whole:,.0f} chip-hours",
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
