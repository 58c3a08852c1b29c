"""Figures of records as files: a picture, by its suffix, and a LaTeX table."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxrobust.papers.figures import contents, drawing, latex, resolution_contents
from jaxrobust.results.plotting import MARK, SUFFIXES, plotting
from jaxrobust.runtime.files import jsonl, whole

KINDS = {
    "attacks": contents.attacks,
    "radius": contents.radius,
    "compare": contents.compare,
    "certified": contents.certified,
    "resolution": resolution_contents.resolution,
}


def make(
    places: Sequence[str], kind: str, out: Path, *, names: Sequence[str] = (), threat: str | None
) -> dict[str, Any]:
    """Make a figure and its table, and return their names and numbers as plain values.

    Args:
      places: folders of evaluations, runs, or files of records, as `PLACE[#NUMBER]`.
      kind: a key of `KINDS`.
      out: the picture, whose suffix selects the format; the table has the suffix `.tex`.
      names: names of the networks, in the order of `places`; empty: derived from differences.
      threat: only evaluations under this threat, `NORM:RADIUS`.
    Raises:
      ValueError: the records do not belong together, the kind is not in them, or a file there was
        not written by this; nothing is written then.
    """
    table = _table_of(out)
    plotting()  # refuses before anything is read
    content = KINDS[kind](places, names, threat)
    picture = drawing.rendered(content, out.suffix[1:])
    comments = [f"{out.name}, kind {kind}", *content.sources, *content.notes]
    text = latex.table(out.stem, content.caption, content.rows, comments)
    out.parent.mkdir(parents=True, exist_ok=True)
    with whole.writing(out, len(picture)) as part:
        part.write_bytes(picture)
    jsonl.replace(table, text)
    return {"schema": 1, "figure": str(out), "table": str(table)} | content.plain()


def lines(written: dict[str, Any]) -> list[str]:
    """Describe the written files in a few lines."""
    shown = ", ".join(one["name"] for one in written["series"])
    first = f"{written['figure']} and {written['table']}: {written['kind']} of {shown}"
    return [first, *(f"note: {note}" for note in written["notes"])]


def _table_of(out: Path) -> Path:
    """Name the table of a picture; refuse unknown suffixes and files of other origin."""
    suffixes = [f".{suffix}" for suffix in SUFFIXES]
    if out.suffix not in suffixes:
        raise ValueError(
            f"--out={out} does not end with one of {', '.join(suffixes)}; name a file such as "
            "figure.pdf"
        )
    if out.is_dir():
        raise ValueError(f"--out={out} is a folder; name a file, such as {out / 'figure.pdf'}")
    table = out.with_suffix(".tex")
    is_our_table = table.is_file() and table.read_bytes()[: len(MARK)] == MARK.encode()
    for path in (table, out):
        if path.exists() and not is_our_table:
            raise ValueError(
                f"{path} exists, and {table.name} was not written by jaxrobust figure, so it may "
                "be yours; name another file with --out"
            )
    return table
