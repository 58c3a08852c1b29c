"""The runs behind the rows of a paper's tables, each once and after the runs it starts from.

Training itself makes a run that others start from (`init.weights=run:CONFIG`). A plan lists it
separately, so that runs which share it can execute in parallel.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from jaxrobust.papers.tables import lines, tables
from jaxrobust.papers.tables.lines import Run
from jaxrobust.papers.tables.tables import Table
from jaxrobust.weights.trained import start_run

# Tables in order of importance for a paper's claims; the others follow in their own order.
CLAIMS = {
    "revisiting_at": ("table_1", "table_2", "table_12", "table_16", "table_7", "table_9"),
    "xcit_light_recipe": ("table_5", "table_6", "table_3", "table_2", "table_4"),
    "twenty_architectures": ("table_1",),
    "robust_resnets": ("table_2", "text_1", "table_1"),
}


class RowPlace(NamedTuple):
    """A row of a table: the table's id, and the row's index, from 0."""

    table: str
    row: int


class PaperRun(NamedTuple):
    """A run, and the rows that need it."""

    folder: str  # the run's folder
    run: Run
    needs: tuple[str, ...] = ()  # folders of earlier runs
    rows: tuple[RowPlace, ...] = ()
    flags: tuple[str, ...] = ()  # of jaxrobust evaluate, for each evaluation of its rows

    def commands(self) -> list[str]:
        """Write the commands that train and evaluate it; each of them can be resumed."""
        return [
            self.run.command(),
            *(f"jaxrobust evaluate --workdir {self.folder} {f}" for f in self.flags),
        ]


def of_paper(paper: str, table: str | None = None, row: str | None = None) -> list[PaperRun]:
    """List the runs of a paper, a table or a row, those behind its claims first.

    Raises:
      ValueError: there is no such paper, table or row, or nothing trains that row.
    """
    chosen = tables.tables(paper, table)
    places = list(_places(chosen))
    if row is not None:
        at = tables.row(chosen[0], row)
        places = [entry for entry in places if entry[0].row == at]
        if not places:
            raise ValueError(
                f"--row {row}: nothing is trained for that row; jaxrobust reproduce --commands "
                f"--paper {paper} --table {table} --row {row} explains why"
            )
    first = [*CLAIMS[paper], *dict.fromkeys(place.table for place, _ in places)]
    places.sort(key=lambda entry: first.index(entry[0].table))
    planned: dict[str, PaperRun] = {}
    for place, line in places:
        for run in line.runs:
            _add(planned, run, (place,), line.flags)
    return list(planned.values())


def _add(
    planned: dict[str, PaperRun],
    run: Run,
    rows: tuple[RowPlace, ...] = (),
    flags: Iterable[str] = (),
) -> None:
    folder = run.workdir
    if folder not in planned:
        start = start_run.named(run.load().init.weights)
        needs = [Run(start)] if start else []
        for needed in needs:
            _add(planned, needed)
        planned[folder] = PaperRun(folder, run, tuple(needed.workdir for needed in needs))
    listed = planned[folder]
    more = tuple(dict.fromkeys((*listed.flags, *flags)))
    planned[folder] = listed._replace(rows=(*listed.rows, *rows), flags=more)


def _places(chosen: Iterable[Table]) -> Iterator[tuple[RowPlace, lines.RowLine]]:
    for table in chosen:
        for index, row in enumerate(table.rows):
            if (line := lines.of_row(row)).runs:
                yield RowPlace(table.id, index), line
