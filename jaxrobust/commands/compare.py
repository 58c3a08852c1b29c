"""Compare evaluations image by image: can two networks, or two epochs, be told apart?

`jaxrobust compare A B [C ...] --out FOLDER`. A, B and the others are folders of evaluations,
runs, or results.jsonl files, followed by `#NUMBER` if they hold several evaluations. Verdicts on
the common images are compared, each network with the first: differences with McNemar's exact test
and 95% intervals, attack by attack and class by class. Evaluations with different images,
preprocessing, radius or attacks are rejected with a list of all differences; so is comparing a
ladder, a union or another version of AutoAttack with a plain evaluation. Images decided by a
replayed point are left out, and the first sentence says so. If an evaluation was stopped by a rule
(`--against`, `--until_width`), p-values and intervals come from confidence sequences, which hold at
every look.

`jaxrobust compare A1 A2 against B1 B2 B3` compares two groups, such as seeds of two recipes: mean
and spread of each, and the difference of the means over the images and over the seeds.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxrobust.commands.flags.shared import shared
from jaxrobust.runtime.commandline import fields, threats
from jaxrobust.runtime.commandline.arguments import answer
from jaxrobust.runtime.commandline.fields import flag
from jaxrobust.runtime.text import patience, terminal

NAME = "comparison"  # of the files of --out


@dataclass(frozen=True, kw_only=True)
class CompareFlags:
    """The evaluations to compare, and the folder for the files."""

    evaluations: tuple[str, ...] = flag(
        "Two or more folders of evaluations, runs or results.jsonl files. FOLDER#NUMBER names one "
        "of several evaluations in a folder; the word against separates two groups.",
        word=True,
        required=True,
    )
    threat: str | None = flag(
        "Only evaluations under this threat: NORM:RADIUS, such as linf:4/255, or clean."
    )
    out: Path | None = flag(f"Folder for {NAME}.md, {NAME}.json and {NAME}.png.")
    json: bool = shared("json", False)


def main(argv: list[str] | None = None) -> None:
    """Read the command line, print the comparison and write the files."""
    answer(
        _compared, fields.read(CompareFlags, __doc__, argv), "run the same command to start again"
    )


def _compared(flags: CompareFlags) -> dict[str, Any]:
    if flags.threat not in (None, "clean"):
        threats.parse(flags.threat)  # raises before JAX is imported
    with patience.of(patience.LOADING):
        from jaxrobust.results.comparison import (
            comparison_findings,
            comparison_markdown,
            evaluations,
            groups,
            picture,
        )
        from jaxrobust.results.plotting import plotting

    if flags.out:
        plotting()  # raises before anything is computed
    sides = groups.parted(flags.evaluations)
    if len(sides) == 2 and max(map(len, sides)) > 1:
        grouped = groups.find(sides[0], sides[1], flags.threat)
        text, plain = groups.document(grouped), groups.plain(grouped)
        written: Any = grouped
    else:
        written = comparison_findings.find(
            evaluations.load([word for side in sides for word in side], flags.threat)
        )
        text, plain = comparison_markdown.document(written), comparison_findings.plain(written)
    if flags.out:
        picture.write(flags.out, NAME, written)
    print(terminal.fitted(text, None), end="\n" if flags.json else "")
    return plain
