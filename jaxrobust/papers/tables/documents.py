"""The papers' tables next to our records as Markdown: one text, or a file per paper with pictures.

With `--commands`, the text lists the commands for each row, or why there are none.
"""

from collections.abc import Sequence
from pathlib import Path

from jaxrobust.papers.tables import lines, matching, tables, tables_markdown
from jaxrobust.papers.tables.pictures import resolutions, scatter
from jaxrobust.papers.tables.tables_markdown import Filled, plain, varying
from jaxrobust.results.run_records import RunRecord

_ABOUT = (
    "Commands that measure each row: by training here or, if a second way is listed below it, with "
    "downloaded weights. `jaxrobust reproduce RUN ... weights/ID ...` shows the records of runs, "
    "of their `evaluation` folders and of downloaded weights (`runs/evaluation-...`, next to "
    "`weights/ID`) in the tables. A run that several rows share is trained once."
)


def answer(
    places: Sequence[Path],
    *,
    paper: str | None = None,
    table: str | None = None,
    row: str | None = None,
    out: Path | None = None,
    alike: bool = False,
    commands: bool = False,
) -> str:
    """Show the papers' tables next to records, or write them to `out`.

    `commands`: show commands instead of numbers, for one `row` of a table or for all.
    """
    if table and not paper:
        raise ValueError("--table needs --paper, to say which paper the table is from")
    if row and not (table and commands):
        raise ValueError("--row needs --table and --commands; give both")
    if table == tables.FIGURES and not commands:
        raise ValueError(f"--table {table} has no numbers to compare; add --commands")
    names = [paper] if paper else list(tables.PAPERS)
    wanted = {name: tables.tables(name, table) for name in names}
    if commands and table is None:
        wanted = {name: [*of_paper, tables.figures(name)] for name, of_paper in wanted.items()}
    records = matching.collect_checked(list(places))
    texts = []
    for name, of_paper in wanted.items():
        shown = [tables_markdown.filled(table, records, alike=alike) for table in of_paper]
        if commands:
            only = None if row is None else tables.row(shown[0].table, row)
            text, file = (
                command_document(name, shown, measured=bool(records), only=only),
                "-commands",
            )
        else:
            text, file = tables_markdown.document(name, shown, records), ""
        if out is None:
            texts.append(text)
            continue
        drawn: list[Path] = []
        if not commands:
            scatter.plotting()  # refuses before anything is written
        out.mkdir(parents=True, exist_ok=True)
        if not commands:
            text, drawn = with_pictures(text, shown, records, out)
        path = out / f"{name}{file}.md"
        path.write_text(text)
        texts += [str(path), *map(str, drawn)]
    return "\n".join(texts) + ("\n" if out else "")


def with_pictures(
    text: str, shown: list[Filled], records: list[RunRecord], out: Path
) -> tuple[str, list[Path]]:
    """Draw the pictures of tables into `out`; return their text with links, and the files."""
    drawn: list[Path] = []
    for filled in shown:
        pictures = [*scatter.draw(filled, records, out), *resolutions.draw(filled, out)]
        title = f"## {tables.title(filled.table)}:"
        links = "".join(f"![{filled.table.caption}]({p.name})\n\n" for p in pictures)
        text = text.replace(title, links + title, 1)
        drawn += pictures
    return text, drawn


def command_document(
    name: str, shown: list[Filled], *, measured: bool, only: int | None = None
) -> str:
    """Return the commands for a paper's tables; `measured`: with the number of filled cells.

    `only`: index of a single row to show.
    """
    parts = [f"# {tables.paper(name)['source']['title']}: commands", _ABOUT]
    for table, cells in shown:
        settings, curve = varying(table), table.curve
        parts.append(f"## {tables.title(table)}: {table.caption}")
        for index, row in enumerate(table.rows):
            if only not in (None, index):
                continue
            words = [f"{key} {text}" for key in settings if (text := plain(row.get(key)))]
            printed = [key for key in table.attacked() if row.get(key) is not None]
            if measured and printed:
                done = sum((index, key) in cells for key in printed)
                words.append(f"{done} of {len(printed)} measured")
            first = f"- Row {index + 1}: {tables.named(row)}"
            if table.kind == tables.FIGURES:
                first, words = f"- {row['name']}: {row['caption']}", []
            parts.append(", ".join([first, *words]))
            line = lines.of_row(row)
            parts += [_block(line.texts())] * bool(line.texts())
            if line.start:
                parts.append(
                    f"  The training starts from {line.start.workdir}, which is trained first "
                    "if it is not finished."
                )
            parts += [f"  {line.why}"] * bool(line.why)
            if curve and line.run:
                sizes = " ".join(f"--image_size {size}" for size in curve["sizes"])
                place, flags = line.run.workdir, f"--attack {curve['attack']} {sizes}"
                drawing = f"--kind resolution --out {place}/resolution.pdf"
                parts += [
                    f"  How its size was chosen ({curve['figure']}), and a figure of this:",
                    _block(
                        [
                            f"jaxrobust evaluate --workdir {place} {flags}",
                            f"jaxrobust figure {place}/evaluation {drawing}",
                        ]
                    ),
                ]
    return "\n\n".join(parts) + "\n"


def _block(texts: list[str]) -> str:
    return "\n".join(f"      {text}" for text in texts)
