"""A comparison of two groups as Markdown: sentences first, then the numbers."""

from collections.abc import Iterator

from jaxrobust.evaluation.records import records
from jaxrobust.results.comparison.comparison_findings import INTERVAL, LEVEL
from jaxrobust.results.comparison.comparison_markdown import grid, p_value, said_p
from jaxrobust.results.comparison.group_tests import Over
from jaxrobust.results.comparison.groups import GroupDifference, GroupFindings
from jaxrobust.runtime.text.spelling import counted

_HOW = (
    "Two questions, with two answers. *These networks*: if other images had been drawn, would they "
    "still differ? Of each image counts the share of the networks of each group that "
    "are right on it; p is the exact sign-flip test over images (Fisher 1935), with one network a "
    "side McNemar's, and the interval is Student's over images. *Networks trained so*: if other "
    "seeds had been drawn, would networks of these recipes still differ on these images? Each "
    "network counts once, by its accuracy; test and interval are Welch's (1947). The spread is the "
    "standard deviation over the networks of a group. Clean and robust accuracy, images and seeds "
    "are each a question for itself, without a correction for several."
)


def document(findings: GroupFindings, picture: str | None = None) -> str:
    """Return the comparison; `picture` is the name of the figure's file beside it."""
    record = findings.evaluations[0].record
    about = (
        f"{findings.images:,} images of {record.dataset}, split {record.split}, preprocessing "
        f"{record.preprocessing}; attack: {records.attack_line(record)}."
    )
    questions = {"robust accuracy": findings.robust, "clean accuracy": findings.clean}
    own = {what: one for what, one in questions.items() if one is not None}
    said = [text for what, one in own.items() for text in sentences(one, what, findings.images)]
    parts = [
        f"# A ({counted(findings.sizes[0], 'network')}) against B "
        f"({counted(findings.sizes[1], 'network')}), over images and seeds",
        findings.left_out,
        about,
        grid(_evaluations(findings)),
        "\n".join(f"- {sentence}" for sentence in (*said, *findings.remarks)),
        f"![Groups]({picture})" if picture else "",
        "## Means and differences",
        grid(_differences(own)),
        "## How this was computed",
        _HOW,
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def sentences(one: GroupDifference, what: str, images: int) -> Iterator[str]:
    """Yield an answer for these networks, and one for networks that are trained as they were."""
    a, b = (f"{100 * mean:.2f}" for mean in one.means)
    means = (
        f"A has {a} % in the mean of {counted(len(one.first), 'network')}, B {b} % of "
        f"{counted(len(one.second), 'network')}"
    )
    if (one.images.low, one.images.high) == (0, 0):
        yield (
            f"**These networks: A and B have the same {what}, image by image.** {means}; each "
            "image is right in the same share of both groups."
        )
    else:
        yield _verdict(
            *("These networks", what, one.images),
            f"{means}: {_points(one.images)} points, {INTERVAL} over {images:,} images"
            f" {_interval(one.images)}, exact sign-flip test {said_p(one.images.p)}.",
        )
    if one.seeds is None:
        few = min(len(one.first), len(one.second)) < 2
        why = "one network" if few else "networks that do not differ"
        more = "two networks or more on both sides" if few else "more seeds"
        yield (
            f"**Networks trained so: nothing is known of their {what}.** A group of {why} does not "
            f"show how far seeds scatter; {more} would."
        )
        return
    shown = ["one network" if s is None else f"{100 * s:.2f}" for s in one.spreads]
    yield _verdict(
        *("Networks trained so", what, one.seeds),
        f"Over seeds: {_points(one.seeds)} points, Welch's {INTERVAL} {_interval(one.seeds)}, "
        f"{said_p(one.seeds.p)}; spread (standard deviation) A {shown[0]}, B {shown[1]} points.",
    )


def _verdict(of: str, what: str, over: Over, figures: str) -> str:
    if over.p >= 1 - LEVEL:
        close = over.low > 0 or over.high < 0
        hair = " The interval leaves 0 out by a hair; the test is the judge here." if close else ""
        return f"**{of}: A and B cannot be told apart in {what}.** {figures}{hair}"
    winner, loser = ("B", "A") if over.difference > 0 else ("A", "B")
    return f"**{of}: the {what} of {winner} is higher than that of {loser}.** {figures}"


def _evaluations(findings: GroupFindings) -> list[list[str]]:
    rows = [["", "network", "clean, %", "robust, %", "evaluation"]]
    for name, one in zip(findings.names, findings.evaluations, strict=True):
        clean, robust = (f"{100 * v.mean():.2f}" for v in (one.verdicts.clean, one.verdicts.robust))
        where = f"{one.record.evaluation} in {one.ours.file}"
        rows.append([name, one.label, clean, robust if findings.robust else "", where])
    return rows


def _differences(own: dict[str, GroupDifference]) -> list[list[str]]:
    head = ["accuracy", "A, mean %", "spread", "B, mean %", "spread", "B - A, points"]
    rows = [[*head, f"{INTERVAL} over images", "p", f"{INTERVAL} over seeds", "p"]]
    for what, one in reversed(own.items()):
        spreads = ["" if spread is None else f"{100 * spread:.2f}" for spread in one.spreads]
        a, b = (f"{100 * mean:.2f}" for mean in one.means)
        seeds = ["", ""] if one.seeds is None else [_interval(one.seeds), p_value(one.seeds.p)]
        images = [_points(one.images), _interval(one.images), p_value(one.images.p)]
        rows.append([what.split()[0], a, spreads[0], b, spreads[1], *images, *seeds])
    return rows


def _points(over: Over) -> str:
    return f"{100 * over.difference:+.2f}"


def _interval(over: Over) -> str:
    return f"{100 * over.low:+.2f} to {100 * over.high:+.2f}"
