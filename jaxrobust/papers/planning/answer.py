"""The plan for a command line: its runs, costs, progress, scripts, and text."""

import itertools
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxrobust.doctor.estimate import devices
from jaxrobust.doctor.estimate.devices import Target
from jaxrobust.papers.planning import costs, progress, runs
from jaxrobust.papers.planning.progress import APART, BEYOND, DONE, OVER, PlannedStep
from jaxrobust.papers.tables import matching, tables
from jaxrobust.results import run_records
from jaxrobust.runtime.text import patience
from jaxrobust.runtime.text.spelling import counted

_HEAD = """#!/bin/bash
# Made by `{made_by}`.
# Start this again to continue after an interruption; finished runs take a moment.
"""
_ARRAY = """#!/bin/bash
# Runs one line of the given file, a run with its evaluations, on one node. #SBATCH
--job-name=jaxrobust-plan #SBATCH --ntasks=1 #SBATCH --requeue #SBATCH --open-mode=append #SBATCH
--signal=TERM@180 trap : TERM # a preemption also signals this shell, which must outlive the
processes srun bash -c "$(sed -n "${SLURM_ARRAY_TASK_ID}p" "$1")" code=$? if [[ $code == 75 || $code
== 143 ]]; then # preempted: it continues
  scontrol requeue "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
fi
exit "$code"
"""


def of(flags: Any, made_by: str) -> str:
    """Make the plan for the flags of `jaxrobust plan`; return its text."""
    target = devices.target(flags.on)
    if target.here:
        raise ValueError(f"--on {flags.on} is not a known chip; write, for example, v5e:8x8")
    planned = runs.of_paper(flags.paper, flags.table, flags.row)
    with patience.lasting(f"estimating {len(planned)} runs"):
        options: dict[str, Any] = {"utilisation": flags.utilisation, "file": flags.estimates}
        priced = list(costs.of_runs(planned, target, **options))
    places = [
        Path(entry.folder) for entry in planned if (Path(entry.folder) / "config.json").is_file()
    ]
    records = matching.collect_checked([*places, *flags.records])
    steps = progress.in_order(flags.paper, priced, records, root=Path(), budget=flags.budget)
    shown = text(steps, flags.paper, target, flags.utilisation, flags.budget)
    for doubt in dict.fromkeys(filter(None, map(run_records.other_config, records))):
        shown += f"\nnot counted: {doubt}"
    if flags.table is None:
        more = {run.folder for run in runs.of_paper(flags.paper, tables.FIGURES)}
        number = counted(len(more - {run.folder for run in planned}), "more run")
        shown += f"\nfigures and text need {number}: --table {tables.FIGURES}"
    if flags.write is None:
        return shown
    written = write_scripts(steps, flags.write, made_by)
    return "\n".join([shown, "", "written:", *(f"  {path}" for path in written)])


def text(
    steps: Sequence[PlannedStep],
    paper: str,
    target: Target,
    utilisation: float,
    budget: float | None,
) -> str:
    """Write the runs in order, with hours, sums and the rows that they fill."""
    remaining = [step for step in steps if step.state not in OVER]
    filled, cells = (sum(step.cells[i] for step in steps) for i in (0, 1))
    hours = sum(step.cost.hours for step in remaining)
    chips = f"{target.chips} x {target.kind}"
    lines = [
        f"{paper} on {target.name} ({chips}), at an assumed {utilisation:.0%} of the peak",
        f"{len(steps)} runs, of which {sum(s.state == DONE for s in steps)} are done; records fill "
        f"{filled} of the {cells} cells of their rows",
        f"{len(remaining)} remaining runs: {hours:,.0f} hours, {hours * target.whole:,.0f} "
        "chip-hours",
    ]
    if decided := sum(step.state == APART for step in steps):
        lines[1] += f"; McNemar's test already separates {decided} from what they are compared with"
    if budget is not None:
        beyond = sum(step.state == BEYOND for step in steps)
        lines[-1] += f", within a budget of {budget:,.0f} hours; {beyond} runs exceed it"
    totals = itertools.accumulate(s.cost.hours if s in remaining else 0.0 for s in steps)
    width = max(len(step.planned.folder) for step in steps) - len("runs/")
    lines += ["", f"{'hours':>7} {'sum':>8}  {'run, under runs/':{width}}  state    rows"]
    for step, total in zip(steps, totals, strict=True):
        shown = f"{total:8,.1f}" if step in remaining else " " * 8
        name = step.planned.folder.removeprefix("runs/")
        hours_text = "-" if step.cost.refused else f"{step.cost.hours:,.1f}"
        lines.append(f"{hours_text:>7} {shown}  {name:{width}}  {step.state:7}  {_rows(step)}")
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


def write_scripts(steps: Sequence[PlannedStep], folder: Path, made_by: str) -> list[Path]:
    """Write the scripts for the remaining runs; return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    remaining = [step for step in steps if step.state not in OVER]
    lines = [" && ".join(step.planned.commands()) for step in remaining]
    head = _HEAD.format(made_by=made_by)
    pod = folder / "runs.sh"
    pod.write_text(head + "".join(f"{line} || exit\n" for line in lines))
    (array := folder / "array.sbatch").write_text(_ARRAY)
    levels, submits, dependency = _levels(remaining), [], ""
    paths = [pod, array]
    for number, level in enumerate(levels, 1):
        path = folder / f"generation-{number}.txt"
        path.write_text("".join(" && ".join(step.planned.commands()) + "\n" for step in level))
        paths.append(path)
        submits.append(
            f"job=$(sbatch --parsable --array=1-{len(level)}{dependency} "
            f"{shlex.quote(str(array))} {shlex.quote(str(path))})\n"
        )
        dependency = " --dependency=afterok:$job"
    (submit := folder / "submit.sh").write_text(head + "set -e\n" + "".join(submits))
    for path in (pod, submit):
        path.chmod(0o755)
    return [*paths, submit]


def _levels(steps: Sequence[PlannedStep]) -> list[list[PlannedStep]]:
    """Group the runs by their number of predecessors; runs in a group are independent."""
    depth: dict[str, int] = {}
    levels: list[list[PlannedStep]] = []
    for step in steps:
        at = max((depth[need] + 1 for need in step.planned.needs if need in depth), default=0)
        depth[step.planned.folder] = at
        levels += [[] for _ in range(at + 1 - len(levels))]
        levels[at].append(step)
    return levels
