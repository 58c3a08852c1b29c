"""The papers' tables beside our records as Markdown: one text, or a file a paper with pictures."""

from collections.abc import Sequence
from pathlib import Path

from jaxrobust.papers.tables import lines, matching, tables, tables_markdown
from jaxrobust.papers.tables.pictures import resolutions, scatter


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
    """Show tables of papers beside the records of some places, or write them to `out`.

    `commands`: instead of the numbers, what measures them; of one `row` of a table, or of all.
    """
    if table and not paper:
        raise ValueError("--table needs --paper, whose table it is")
    if row and not (table and commands):
        raise ValueError("--row is one of --table, and is shown by --commands; give both")
    names = [paper] if paper else list(tables.PAPERS)
    wanted = {name: tables.tables(name, table) for name in names}
    records = matching.collect_checked(list(places))
    texts = []
    for name, of_paper in wanted.items():
        shown = [tables_markdown.filled(each, records, alike=alike) for each in of_paper]
        if commands:
            only = None if row is None else tables.row(shown[0].table, row)
            text = lines.document(name, shown, measured=bool(records), only=only)
            texts += _commands(out, name, text)
            continue
        text = tables_markdown.document(name, shown, records)
        texts += _written(out, name, shown, records, text) if out else [text]
    return "\n".join(texts) + ("\n" if out else "")


def _commands(out: Path | None, name: str, text: str) -> list[str]:
    if out is None:
        return [text]
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{name}-commands.md"
    path.write_text(text)
    return [str(path)]


def _written(out: Path, name, shown, records, text: str) -> list[str]:
    scatter.plotting()  # refuses before anything is written
    out.mkdir(parents=True, exist_ok=True)
    made = []
    for each in shown:
        pictures = [*scatter.draw(each, records, out), *resolutions.draw(each, out)]
        title = f"## {tables.title(each.table)}:"
        links = "".join(f"![{each.table.caption}]({p.name})\n\n" for p in pictures)
        text = text.replace(title, links + title, 1)
        made += pictures
    path = out / f"{name}.md"
    path.write_text(text)
    return [str(p) for p in (path, *made)]
