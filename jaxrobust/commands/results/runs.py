"""List the training runs and evaluations below a folder with their results, newest first.

`jaxrobust runs [FOLDER]`. Each training run is one line, with the results of its last phase, and so
is each evaluation: date, accuracies, number of images, threats, attack, weights, and the pictures
and reports next to it. Figures from `jaxrobust figure` in folders without records come last.
Unreadable files are reported, and the rest is listed.

Exit codes: 0 done; 2 a mistake in the command, or nothing to list, with one sentence on stderr; 3 a
file cannot be read.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxrobust.commands.flags.shared import shared
from jaxrobust.runtime.commandline import fields
from jaxrobust.runtime.commandline.arguments import answer
from jaxrobust.runtime.commandline.fields import flag
from jaxrobust.runtime.text import patience, terminal


@dataclass(frozen=True, kw_only=True)
class RunsFlags:
    """The folder to list."""

    folder: Path = flag(
        "Folder of runs and evaluations, at any depth; default: runs.",
        Path("runs"),
        word=True,
        nargs="?",
    )
    json: bool = shared("json", False)


def main(argv: list[str] | None = None) -> None:
    """Read the command line and print the table."""
    answer(_listed, fields.read(RunsFlags, __doc__, argv), "run the same command to start again")


def _listed(flags: RunsFlags) -> dict[str, Any]:
    with patience.of(patience.LOADING):
        from jaxrobust.results import listing

    runs = listing.find(flags.folder)
    print(terminal.fitted(listing.text(runs), None))
    return runs.plain()
