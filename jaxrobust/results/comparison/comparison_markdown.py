"""A comparison as Markdown: sentences first, then the numbers."""

from collections.abc import Iterator, Sequence

import numpy as np

from jaxrobust.evaluation.records import comparisons, records
from jaxrobust.evaluation.records.comparisons import Paired
from jaxrobust.evaluation.records.record import AccuracyRecord
from jaxrobust.results.comparison.comparison_findings import (
    INTERVAL,
    LEVEL,
    SEQUENCE,
    ComparisonFindings,
    Difference,
    Pair,
)
from jaxrobust.results.comparison.evaluations import letter
from jaxrobust.results.comparison.group_tests import Over

CLASSES = 20  # rows of a table: the classes that differ most; JSON has all
_FIXED = (
    "p: McNemar's exact test, two-sided. Intervals: Tango's score interval for paired proportions "
    "(1998)."
)
_LOOKED = (
    "An evaluation was stopped by a rule, so p-values and intervals for a fixed number of images "
    "do not hold. Here p is the inverse of the largest e-value of a Beta mixture (Lindon and Malek "
    "2022), and confidence sequences are from betting (Waudby-Smith and Ramdas 2023): both hold "
    "however often one looks, and are therefore wider."
)


def about(record: AccuracyRecord, images: int) -> str:
    """Describe the images and the attack of a comparison."""
    return (
        f"{images:,} images of {record.dataset}, split {record.split}, preprocessing "
        f"{record.preprocessing}; attack: {records.attack_line(record)}."
    )


def document(findings: ComparisonFindings, picture: str | None = None) -> str:
    """Return the comparison as Markdown; `picture` is the figure's file next to it."""
    compared, evaluations = findings.pairs, findings.evaluations
    names = [letter(at) for at in range(len(evaluations))]
    words = [words for pair in compared for words in in_words(pair, len(compared))]
    rows = [["", "network", "clean, %", "robust, %", "evaluation"]]
    rows += [[name, *one.cells] for name, one in zip(names, evaluations, strict=True)]
    parts = [
        f"# {', '.join(names[:-1])} and {names[-1]}, image by image",
        findings.left_out,
        about(evaluations[0].record, findings.images),
        grid(rows),
        "\n".join(f"- {sentence}" for sentence in (*words, *findings.remarks)),
        f"![Differences]({picture})" if picture else "",
        "## Differences",
        grid(_differences(compared)),
    ]
    if findings.removed:
        wrong = [f"{(~one.verdicts.clean).sum():,}" for one in evaluations]
        rows = [["", *names], ["wrong without an attack", *wrong]]
        rows += [[name, *map("{:,}".format, counts)] for name, counts in findings.removed.items()]
        parts += ["## Images that each attack removed", grid(rows)]
    has_classes = any(len(pair.classes) for pair in compared)
    if len(compared) == 1 and has_classes:
        pair = compared[0]
        rows = [["class", "images", *_head(pair.first, pair.other, pair), "p, corrected"]]
        order = np.lexsort((-np.abs(pair.by_class.difference), pair.by_class.p))
        for at in order[:CLASSES]:
            one, last = row(pair, at), p_value(pair.p_by_class[at])
            rows.append([str(pair.classes[at]), str(one.n), *_numbers(one), last])
        parts += ["## Classes that differ most", grid(rows)]
    correction = "Neither p nor the intervals are corrected for multiple comparisons."
    if len(compared) > 1:
        of_classes = ", and the classes of one pair" * has_classes
        correction = (
            f"Holm's correction (1979) covers the {len(compared)} pairs of one accuracy"
            f"{of_classes}; intervals are not corrected."
        )
    elif has_classes:
        correction = (
            "Holm's correction (1979) covers the classes; clean and robust accuracy, accuracies "
            "after single attacks, and all intervals are not corrected."
        )
    computed = (
        "Both networks saw the same images, so only images on which they disagree matter. "
        f"{_LOOKED if any(pair.sequence for pair in compared) else _FIXED} {correction} These "
        "results are for these weights on images like these: no test of two networks can show how "
        "much training runs of one recipe differ between seeds."
    )
    parts += ["## How this was computed", computed]
    return "\n\n".join(part for part in parts if part) + "\n"


def title(findings: ComparisonFindings) -> str:
    """Return the title of a picture: both networks, or the first of several."""
    shown = [f"{letter(at)}: {one.label}" for at, one in enumerate(findings.evaluations)]
    shown = shown if len(findings.pairs) == 1 else shown[:1]
    return "\n".join([*shown, images_line(findings.evaluations[0].record, findings.images)])


def images_line(record: AccuracyRecord, images: int) -> str:
    """Return the line of a picture that names the images and the attack."""
    attack = records.attack_line(record)
    return f"{images:,} images of {record.dataset}, {record.split}; attack: {attack}"


def in_words(pair: Pair, count: int) -> Iterator[str]:
    """Yield sentences on whether two networks can be told apart; `count` is the number of pairs."""
    if pair.robust:
        yield _verdict(pair, pair.robust, "robust accuracy", count)
    yield _verdict(pair, pair.clean, "clean accuracy", count)
    if len(pair.classes):
        yield _of_classes(pair)


def _verdict(pair: Pair, one: Difference, accuracy: str, count: int) -> str:
    a, b, both = pair.first, pair.other, one.paired
    first, second = _share(both)
    if not both.gained + both.lost:
        return (
            f"**{a} and {b} have the same {accuracy}, image by image.** Both have {second}%."
            f" Their difference on all such images lies within {interval(both)} points."
        )
    winner, loser = (b, a) if both.gained > both.lost else (a, b)
    corrected = f", {said_p(one.p)} corrected for {count} pairs" if count > 1 else ""
    kind, test = (SEQUENCE, "at any look") if pair.sequence else (INTERVAL, "exact McNemar test")
    figures = (
        f"{a} has {first}%, {b} {second}% of the same {both.n:,} images: {points(both)} points"
        f", {kind} {interval(both)}, {test} {said_p(both.p)}{corrected}. "
        f"{a} alone is right on {both.lost:,} images, {b} alone on {both.gained:,}."
    )
    if one.apart:
        return f"**The {accuracy} of {winner} is higher than that of {loser}.** {figures}"
    sentence = f"**{a} and {b} cannot be told apart in {accuracy}.** {figures}"
    if pair.sequence:
        return sentence
    if both.low > 0 or both.high < 0:
        sentence += " The interval barely excludes 0; the exact test is stricter and decides here."
    if needed := comparisons.images_needed(both):
        rounded = float(f"{needed:.2g}")  # two digits count: 41,000
        sentence += (
            f" A true difference of that size would show on about {rounded:,.0f} such images "
            "(in 80% of cases)."
        )
    return sentence


def _of_classes(pair: Pair) -> str:
    count, names = len(pair.classes), f"{pair.first} and {pair.other}"
    apart = np.flatnonzero(pair.p_by_class < 1 - LEVEL)
    if len(apart):
        apart = apart[np.argsort(pair.p_by_class[apart], kind="stable")]
        shown = [f"{pair.classes[at]} ({points(row(pair, at))})" for at in apart[:CLASSES]]
        more = f", and {len(apart) - CLASSES} more" if len(apart) > CLASSES else ""
        return (
            f"{names} can be told apart on {len(apart)} of {count:,} classes (corrected for all of "
            f"them; points of {pair.other} minus {pair.first}): {', '.join(shown)}{more}."
        )
    most = int(np.max(pair.by_class.n))
    if 2 * 0.5**most * count >= 1 - LEVEL:
        return (
            f"{names} could not be told apart on any class, whatever their predictions: at most "
            f"{most} images per class are too few for {count:,} tests."
        )
    return (
        f"{names} cannot be told apart on any single one of {count:,} classes (corrected for all "
        "of them)."
    )


def row(pair: Pair, at: int) -> Paired:
    """Return the comparison of one class."""
    return Paired(*(column[at] for column in pair.by_class))


def _differences(compared: Sequence[Pair]) -> list[list[str]]:
    if len(compared) == 1:
        a, b = compared[0].first, compared[0].other
        steps = compared[0].steps.items()
        head = ["accuracy", *_head(a, b, compared[0])]
        return [head, *([step, *_numbers(one)] for step, one in steps)]
    head = _head("first", "second", compared[0])
    rows = [["pair", "accuracy", *head, "p, corrected"]]
    for pair in compared:
        names = f"{pair.first}, {pair.other}"
        for accuracy, one in (("clean", pair.clean), ("robust", pair.robust)):
            if one:
                rows.append([names, accuracy, *_numbers(one.paired), p_value(one.p)])
    return rows


def _head(a: str, b: str, pair: Pair) -> list[str]:
    counts = [f"only {a} right", f"only {b} right"]
    interval = SEQUENCE if pair.sequence else INTERVAL
    return [f"{a}, %", f"{b}, %", *counts, f"{b} - {a}, points", interval, "p"]


def _numbers(one: Paired) -> list[str]:
    counts = [f"{one.lost:,}", f"{one.gained:,}"]
    return [*_share(one), *counts, points(one), interval(one), p_value(one.p)]


def _share(one: Paired) -> tuple[str, str]:
    return f"{100 * one.first / one.n:.2f}", f"{100 * one.second / one.n:.2f}"


def points(one: Paired | Over) -> str:
    """Format a difference in points."""
    return f"{100 * one.difference:+.2f}"


def interval(one: Paired | Over) -> str:
    """Format the interval of a difference in points."""
    return f"{100 * one.low:+.2f} to {100 * one.high:+.2f}"


def grid(rows: list[list[str]]) -> str:
    """Format rows of cells as a table; the first row is its head."""
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    safe = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in safe)


def p_value(value: float) -> str:
    """Format a p-value with two digits."""
    return f"{value:.2g}" if value >= 1e-4 else "< 0.0001"


def said_p(value: float) -> str:
    """Format a p-value for a sentence."""
    return f"p = {p_value(value)}".replace("= <", "<")
