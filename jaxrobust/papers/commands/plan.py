"""Plan the runs of a paper: `jaxrobust plan PAPER --on v5e:8x8 [--budget HOURS] [--write DIR]`.

Lists the runs that fill the paper's tables, each once and after the run whose weights it starts
from; runs behind the paper's main claims come first. Costs are estimated as by `jaxrobust estimate
--fast`, and stored; progress is read from `runs/`. Run the same command again to see the progress.
A run needs no further evaluation once McNemar's test, on the images evaluated so far, separates it
from all networks that the tables compare it with. `--write` writes the remaining runs as scripts:
for a pod, and as Slurm arrays.

Exit codes: 0 done; 2 a mistake in the command, with one sentence on stderr; 3 another reason.
"""

import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from jaxrobust.papers.tables import tables
from jaxrobust.runtime.commandline import fields
from jaxrobust.runtime.commandline.arguments import ending, number, stop
from jaxrobust.runtime.commandline.fields import flag
from jaxrobust.runtime.text import patience
from jaxrobust.runtime.text.spelling import meant

UTILISATION = 0.2


@dataclass(frozen=True, kw_only=True)
class PlanFlags:
    """The runs to plan, the devices, and the budget."""

    paper: str = flag(f"Paper: {', '.join(tables.PAPERS)}.", word=True, required=True)
    records: tuple[Path, ...] = flag(
        "Further records, as for jaxrobust reproduce, in addition to those in runs/.",
        (),
        word=True,
        nargs="*",
    )
    on: str = flag("Chips, such as v5e:8x8 or h100:8.", required=True, metavar="DEVICES")
    table: str | None = flag(
        "Only one table of the paper: its number, an id such as text_1, or figures for everything "
        "outside tables."
    )
    row: str | None = flag("Only one row of --table, by its number or name.")
    budget: float | None = flag("Maximum number of hours; default: unlimited.", reads=number)
    utilisation: float = flag("Assumed share of the chips' peak.", str(UTILISATION), reads=number)
    write: Path | None = flag("Folder for the scripts of the remaining runs.")
    estimates: Path = flag(
        "File that caches estimates; default: runs/estimates.jsonl.",
        Path("runs/estimates.jsonl"),
    )


def main() -> None:
    """Read the command line, print the plan, write the scripts."""
    flags = fields.read(PlanFlags, __doc__)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing runs
    if flags.paper not in tables.PAPERS:
        stop(f"{flags.paper} is not a paper; {meant(flags.paper, tables.PAPERS)}", 2)
    if flags.row and not flags.table:
        stop(f"--row {flags.row} needs a table; name it with --table", 2)
    if flags.budget is not None and not 0 < flags.budget < float("inf"):
        stop(f"--budget={flags.budget:g} must be above 0 hours; leave it out for all runs", 2)
    if not 0 < flags.utilisation <= 1:
        stop(f"--utilisation={flags.utilisation:g} must be above 0 and at most 1", 2)
    with ending("run the same command to continue"):
        with patience.of(patience.LOADING):
            from jaxrobust.papers.planning import answer
        made_by = shlex.join(["jaxrobust", "plan", *sys.argv[1:]])
        print(answer.of(flags, made_by))
