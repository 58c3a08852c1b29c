"""Draw records as a figure of a paper, with the LaTeX table next to it.

`jaxrobust figure RECORDS [--kind attacks|radius|compare|certified|resolution] [--out FIG.pdf]`.
RECORDS are folders of evaluations, runs, or results.jsonl files, with `#NUMBER` after them where
they hold several. FIG.pdf, FIG.svg or FIG.png is one column of a paper wide, and FIG.tex is the
table. `attacks` shows the accuracy after each attack of a cascade, `radius` that of a ladder within
rising radii, `compare` robust accuracies and which of them McNemar's test tells apart, `certified`
what smoothing certifies within rising radii, next to a ladder in l2 of the same folder,
`resolution` clean and robust accuracy at several test resolutions (`evaluate --image_size`). All
have 95% intervals. Records of other images, threats or attacks are refused, with all that differs.

Exit codes: 0 done; 2 a mistake in the command or the data, with one sentence on stderr; 3 a file
cannot be read or written.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxrobust.commands.flags.shared import shared
from jaxrobust.runtime.commandline import fields
from jaxrobust.runtime.commandline.arguments import answer
from jaxrobust.runtime.commandline.fields import flag
from jaxrobust.runtime.text import patience

KINDS = ("attacks", "radius", "compare", "certified", "resolution")


@dataclass(frozen=True, kw_only=True)
class FigureFlags:
    """Which records are drawn, how, and where the files go."""

    records: tuple[str, ...] = flag(
        "Folders of evaluations, runs, or results.jsonl files; FOLDER#NUMBER names one of several "
        "evaluations that a folder holds.",
        word=True,
        required=True,
    )
    kind: str | None = flag(
        f"What is drawn: {', '.join(KINDS[:-1])} or {KINDS[-1]}; default: attacks of one "
        "evaluation, compare of several.",
        choices=KINDS,
    )
    out: Path = flag(
        "Picture: a .pdf, .svg or .png; the table is next to it; default: figure.pdf.",
        Path("figure.pdf"),
    )
    names: tuple[str, ...] = flag("What the networks are called, in their order.", ())
    threat: str | None = flag("Only evaluations under it: NORM:RADIUS, as linf:4/255.")
    json: bool = shared("json", False)


def main(argv: list[str] | None = None) -> None:
    """Read the command line, draw, write."""
    answer(_drawn, fields.read(FigureFlags, __doc__, argv), "the same command starts again")


def _drawn(flags: FigureFlags) -> dict[str, Any]:
    with patience.of(patience.LOADING):
        from jaxrobust.papers.figures import figure

    kind = flags.kind or ("attacks" if len(flags.records) == 1 else "compare")
    result = figure.make(flags.records, kind, flags.out, names=flags.names, threat=flags.threat)
    print("\n".join(figure.lines(result)))
    return result
