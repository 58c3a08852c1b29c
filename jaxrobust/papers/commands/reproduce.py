"""Show the papers' tables next to our records: paper, ours or `not measured`.

`jaxrobust reproduce RUN_OR_RECORDS... --paper revisiting_at --table 2 --out FOLDER`. Records come
from `jaxrobust train` and `jaxrobust evaluate`; without any, only the paper's numbers are shown. A
record fills a cell only if it measures exactly that: the same network, trained or downloaded, the
same attack, radius and images. Other records are listed with their differences. `--commands`
prints the commands that train and evaluate each row, or why there are none; then those for the
paper's figures and text.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

from jaxrobust.papers.tables import tables
from jaxrobust.runtime.commandline import fields
from jaxrobust.runtime.commandline.arguments import ending
from jaxrobust.runtime.commandline.fields import flag
from jaxrobust.runtime.text import patience


@dataclass(frozen=True, kw_only=True)
class ReproduceFlags:
    """The records and the tables to compare."""

    records: tuple[Path, ...] = flag(
        "Runs, results.jsonl files, folders that contain one, or folders of imported weights.",
        (),
        word=True,
        nargs="*",
    )
    paper: str | None = flag(f"Only one paper: {', '.join(tables.PAPERS)}; default: all.")
    table: str | None = flag(
        "Only one table of --paper: its number, an id such as text_1, or, with --commands, figures "
        "for everything outside tables."
    )
    row: str | None = flag("Only one row of --table, by its number or name; with --commands.")
    out: Path | None = flag(
        "Folder for one Markdown file per paper, with pictures; default: stdout."
    )
    commands: bool = flag(
        "Print the commands that measure each row instead, or why there is no command.", False
    )
    alike: bool = flag("Also show records with different training or images, in italics.", False)


def main(argv: list[str] | None = None) -> None:
    """Read the command line, print or write."""
    flags = asdict(fields.read(ReproduceFlags, __doc__, argv))
    places = flags.pop("records")
    with ending("run the same command to start again"):
        with patience.of(patience.LOADING):
            from jaxrobust.papers.tables import documents

        print(documents.answer(places, **flags), end="")
