"""Show the papers' tables beside our records: paper, ours or `not measured`.

`jaxrobust reproduce RUN_OR_RECORDS... --paper revisiting_at --table 2 --out FOLDER`. Records
are those of `python -m jaxrobust.main` and `python -m jaxrobust.evaluate`; without any, the tables
are the paper's alone. A record stands in a cell only if it measures just that: the same network,
trained or downloaded, the same attack, radius and images. Others are listed with what differs.
"""

from pathlib import Path

from jaxrobust.analysis.papers import markdown, matching, scatter, tables
from jaxrobust.runtime.commandline.arguments import Arguments, stop


def main(argv: list[str] | None = None) -> None:
    """Read the command line, print or write."""
    parser = Arguments(__doc__ or "")
    parser.add_argument(
        "records",
        nargs="*",
        type=Path,
        help="Runs, folders with results.jsonl, such files, imported folders of weights.",
    )
    parser.flag("paper", help=f"Only one: {', '.join(tables.PAPERS)}; default: all.")
    parser.flag("table", help="Only one table of --paper: its number, or an id such as text_1.")
    parser.flag(
        "out", type=Path, help="Folder for one Markdown file a paper and its pictures; else stdout."
    )
    parser.flag(
        "alike",
        action="store_true",
        help="Show records of another training or of other images too, in italics.",
    )
    args = parser.parse_args(argv)
    try:
        print(_answer(args), end="")
    except ValueError as error:
        stop(error, 2)
    except OSError as error:
        stop(error, 3)


def _answer(args) -> str:
    if args.table and not args.paper:
        raise ValueError("--table needs --paper, whose table it is")
    names = [args.paper] if args.paper else list(tables.PAPERS)
    wanted = {name: tables.tables(name, args.table) for name in names}
    records = matching.collect(args.records)
    said = []
    for name, found in wanted.items():
        shown = [markdown.filled(table, records, alike=args.alike) for table in found]
        text = markdown.document(name, shown, records)
        said += _written(args.out, name, shown, records, text) if args.out else [text]
    return "\n".join(said) + ("\n" if args.out else "")


def _written(out: Path, name, shown, records, text: str) -> list[str]:
    """Write the Markdown and the pictures of a paper; return their paths."""
    scatter.plotting()  # refuses before anything is written
    out.mkdir(parents=True, exist_ok=True)
    made = []
    for each in shown:
        pictures = scatter.draw(each, records, out)
        title = f"## {tables.title(each.table)}:"
        links = "".join(f"![{each.table.caption}]({p.name})\n\n" for p in pictures)
        text = text.replace(title, links + title, 1)
        made += pictures
    path = out / f"{name}.md"
    path.write_text(text)
    return [str(p) for p in (path, *made)]


if __name__ == "__main__":
    main()
