"""Compare evaluations image by image: can two networks, or two epochs, be told apart?

`jaxrobust compare A B [C ...] --out FOLDER`. A, B and the others are folders of evaluations,
runs, or results.jsonl files, with `#NUMBER` behind them where they hold several evaluations. The
verdicts on the images that all have are compared, every network with the first: differences with
McNemar's exact test and 95 % intervals, attack by attack and class by class. Evaluations of other
images, preprocessing, radius or attacks, and a ladder, a union or another version of AutoAttack
beside what is none, are refused, with all that differs. Images that a replayed point decided are
left out, which the first sentence says.
"""

import argparse
import io
import json
from pathlib import Path
from typing import Any

from jaxrobust.analysis.comparison import evaluations, findings, markdown, picture
from jaxrobust.analysis.networks import pictures
from jaxrobust.runtime.commandline.arguments import Arguments, answer
from jaxrobust.runtime.files import jsonl, whole

NAME = "comparison"  # of the files of --out


def main(argv: list[str] | None = None) -> None:
    """Read the command line, print, write."""
    parser = Arguments(__doc__ or "")
    parser.add_argument(
        "evaluations",
        nargs="+",
        help="Two or more: folders of evaluations, runs, or results.jsonl files; FOLDER#NUMBER "
        "names one of several evaluations that a folder holds.",
    )
    parser.flag("threat", help="Only evaluations under it: NORM:RADIUS, as linf:4/255, or clean.")
    parser.flag("out", type=Path, help=f"Folder for {NAME}.md, {NAME}.json and {NAME}.png.")
    parser.flag("json", action="store_true", help="Print one JSON object on the last line.")
    answer(_compared, parser.parse_args(argv), "the same command starts again")


def _compared(args: argparse.Namespace) -> dict[str, Any]:
    if args.out:
        pictures.plotting()  # refuses before anything is computed
    found = findings.find(evaluations.load(args.evaluations, args.threat))
    plain = findings.plain(found)
    if args.out:
        _write(args.out, found, plain)
    print(markdown.document(found), end="\n" if args.json else "")
    return plain


def _write(out: Path, found: findings.Findings, plain: dict[str, Any]) -> None:
    """Write the three files, each of them whole.

    Raises:
      ValueError: the folder has a comparison of something else, or is none.
    """
    text, table, drawn = (out / f"{NAME}.{kind}" for kind in ("md", "json", "png"))
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; name a folder")
    if table.exists() and _compares(table) != _files(plain):
        raise ValueError(f"{table} compares other evaluations; name another folder with --out")
    image = io.BytesIO()
    picture.draw(found).savefig(image, dpi=130, format="png")
    out.mkdir(parents=True, exist_ok=True)
    with whole.writing(drawn) as part:
        part.write_bytes(image.getvalue())
    jsonl.replace(table, json.dumps(plain, indent=1) + "\n")
    jsonl.replace(text, markdown.document(found, drawn.name))


def _compares(table: Path) -> list[tuple[str, str]] | None:
    """Return which evaluations a file compares; None: it is not of this tool, or damaged."""
    try:
        return _files(json.loads(table.read_text()))
    except (ValueError, KeyError, TypeError):
        return None


def _files(plain: dict[str, Any]) -> list[tuple[str, str]]:
    return [(one["file"], one["evaluation"]) for one in plain["evaluations"]]


if __name__ == "__main__":
    main()
