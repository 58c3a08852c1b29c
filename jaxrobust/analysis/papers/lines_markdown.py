"""The commands of the rows of tables as Markdown: a list that is read in a terminal too."""

from jaxrobust.analysis.papers import lines, tables, tables_markdown
from jaxrobust.analysis.papers.tables_markdown import Filled

_ABOUT = (
    "What measures each row: trained here, or downloaded where a second way stands below it. "
    "`jaxrobust reproduce RUN ... weights/ID ...` shows the records of runs, of their `evaluation` "
    "folders and of downloaded weights (`runs/evaluation-...`, beside `weights/ID`) in the tables. "
    "A run that several rows have is trained once."
)


def document(name: str, shown: list[Filled], *, measured: bool, only: int | None = None) -> str:
    """Return the commands of the tables of a paper; `measured`: and how many cells are filled.

    `only`: the place of the one row that is shown.
    """
    source = tables.paper(name)["source"]
    parts = [f"# {source['title']}: commands", _ABOUT]
    return "\n\n".join([*parts, *(_table(each, measured, only) for each in shown)]) + "\n"


def _table(shown: Filled, measured: bool, only: int | None) -> str:
    table = shown.table
    varying = tables_markdown.varying(table)
    parts = [f"## {tables.title(table)}: {table.caption}"]
    for index, row in enumerate(table.rows):
        if only not in (None, index):
            continue
        said = [f"{key} {text}" for key in varying if (text := tables_markdown.plain(row.get(key)))]
        printed = [key for key in table.attacked() if row.get(key) is not None]
        if measured and printed:
            done = sum((index, key) in shown.cells for key in printed)
            said.append(f"{done} of {len(printed)} measured")
        parts.append(", ".join([f"- Row {index + 1}: {tables.named(row)}", *said]))
        line = lines.of_row(table, row)
        parts += ["\n".join(f"      {text}" for text in line.texts())] * bool(line.texts())
        parts += [f"  {said}" for said in (line.start(), line.why) if said]
    return "\n\n".join(parts)
