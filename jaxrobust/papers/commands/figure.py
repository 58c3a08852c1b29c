"""Draw records as a figure for a paper, with a LaTeX table.

`jaxrobust figure RECORDS [--kind attacks|radius|compare|certified|resolution] [--out FIG.pdf]`.
RECORDS are folders of evaluations, runs, or results.jsonl files; add `#NUMBER` if they hold
several evaluations. FIG.pdf, FIG.svg or FIG.png is as wide as one column of a paper, and FIG.tex is
the table. `attacks` shows the accuracy after each attack of a cascade, `radius` the accuracy of a
ladder as the radius grows, `compare` robust accuracies and which differ by McNemar's test,
`certified` the certified accuracy as the radius grows, next to an L2 ladder of the same folder,
`resolution` clean and robust accuracy at several test resolutions (`evaluate --image_size`). All
have 95% intervals. Records with different images, threats or attacks are refused, and all
differences are listed.

Exit codes: 0 done; 2 a mistake in the command or the data, with one sentence on stderr; 3 a file
cannot be read or written.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxrobust.commands.flags.shared import shared
from jaxrobust.runtime.commandline import fields, threats
from jaxrobust.runtime.commandline.arguments import answer
from jaxrobust.runtime.commandline.fields import flag
from jaxrobust.runtime.text import patience

KINDS = ("attacks", "radius", "compare", "certified", "resolution")


@dataclass(frozen=True, kw_only=True)
class FigureFlags:
    """The records to draw, the kind of figure, and the output files."""

    records: tuple[str, ...] = flag(
        "Folders of evaluations, runs, or results.jsonl files; FOLDER#NUMBER names one of several "
        "evaluations in a folder.",
        word=True,
        required=True,
    )
    kind: str | None = flag(
        f"What to draw: {', '.join(KINDS[:-1])} or {KINDS[-1]}; default: attacks for one "
        "evaluation, compare for several.",
        choices=KINDS,
    )
    out: Path = flag(
        "Picture to write (.pdf, .svg or .png), with the table next to it; default: figure.pdf.",
        Path("figure.pdf"),
    )
    names: tuple[str, ...] = flag("Names of the networks, in order.", ())
    threat: str | None = flag(
        "Only evaluations under this threat: NORM:RADIUS, such as linf:4/255."
    )
    json: bool = shared("json", False)


def main(argv: list[str] | None = None) -> None:
    """Read the command line, draw, write."""
    answer(_drawn, fields.read(FigureFlags, __doc__, argv), "run the same command to start again")


def _drawn(flags: FigureFlags) -> dict[str, Any]:
    if flags.threat not in (None, "clean"):
        threats.parse(flags.threat)  # raises before JAX is imported
    with patience.of(patience.LOADING):
        from jaxrobust.papers.figures import figure

    kind = flags.kind or ("attacks" if len(flags.records) == 1 else "compare")
    result = figure.make(flags.records, kind, flags.out, names=flags.names, threat=flags.threat)
    print("\n".join(figure.lines(result)))
    return result
