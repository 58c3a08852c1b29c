"""A comparison as Markdown: sentences first, then the numbers."""

from collections.abc import Iterator, Sequence

import numpy as np

from jaxrobust.evaluation.records import pairs, records
from jaxrobust.evaluation.records.pairs import Paired
from jaxrobust.results.comparison.comparison_findings import (
    INTERVAL,
    LEVEL,
    SEQUENCE,
    ComparisonFindings,
    Difference,
    Pair,
)
from jaxrobust.results.comparison.evaluations import letter

CLASSES = 20  # rows of a table: the classes that differ most; JSON has all


def document(findings: ComparisonFindings, picture: str | None = None) -> str:
    """Return the comparison; `picture` is the name of the figure's file beside it."""
    record = findings.evaluations[0].record
    names = [letter(at) for at in range(len(findings.evaluations))]
    about = (
        f"{findings.images:,} images of {record.dataset}, split {record.split}, preprocessing "
        f"{record.preprocessing}; attack: {records.attack_line(record)}."
    )
    words = [words for pair in findings.pairs for words in in_words(pair, len(findings.pairs))]
    parts = [
        f"# {', '.join(names[:-1])} and {names[-1]}, image by image",
        findings.left_out,
        about,
        grid(_evaluations(findings)),
        "\n".join(f"- {sentence}" for sentence in (*words, *findings.remarks)),
        f"![Differences]({picture})" if picture else "",
        "## Differences",
        grid(_differences(findings.pairs)),
    ]
    if findings.removed:
        wrong = [f"{(~one.verdicts.clean).sum():,}" for one in findings.evaluations]
        rows = [["", *names], ["wrong without an attack", *wrong]]
        rows += [[name, *map("{:,}".format, each)] for name, each in findings.removed.items()]
        parts += ["## Images that each attack removed", grid(rows)]
    if len(findings.pairs) == 1:
        parts += ["## Classes that differ most", grid(_classes(findings.pairs[0]))]
    how = _how(len(findings.pairs), any(pair.sequence for pair in findings.pairs))
    parts += ["## How this was computed", how]
    return "\n\n".join(part for part in parts if part) + "\n"


def title(findings: ComparisonFindings) -> str:
    """Write the title of a picture: both networks, or the first of several."""
    shown = [f"{letter(at)}: {one.label}" for at, one in enumerate(findings.evaluations)]
    record = findings.evaluations[0].record
    about = f"{findings.images:,} images of {record.dataset}, {record.split}; attack: "
    named = shown if len(findings.pairs) == 1 else shown[:1]
    return "\n".join([*named, about + records.attack_line(record)])


def in_words(pair: Pair, count: int) -> Iterator[str]:
    """Yield whether two networks can be told apart; `count` is the number of pairs."""
    if pair.robust:
        yield _verdict(pair, pair.robust, "robust accuracy", count)
    yield _verdict(pair, pair.clean, "clean accuracy", count)
    yield _of_classes(pair)


def _verdict(pair: Pair, one: Difference, what: str, count: int) -> str:
    a, b, both = pair.first, pair.other, one.paired
    first, second = _share(both)
    if not both.gained + both.lost:
        return (
            f"**{a} and {b} have the same {what}, image by image.** Both have {second} %."
            f" Their difference on all such images lies within {_interval(both)} points."
        )
    winner, loser = (b, a) if both.gained > both.lost else (a, b)
    corrected = f", {said_p(one.p)} corrected for {count} pairs" if count > 1 else ""
    figures = (
        f"{a} has {first} %, {b} {second} % of the same {both.n:,} images: {_points(both)} points"
        f", {_said_interval(pair)} {_interval(both)}, {_test(pair)} {said_p(both.p)}{corrected}. "
        f"{a} alone is right on {both.lost:,} images, {b} alone on {both.gained:,}."
    )
    if one.apart:
        return f"**The {what} of {winner} is higher than that of {loser}.** {figures}"
    sentence = f"**{a} and {b} cannot be told apart in {what}.** {figures}"
    if pair.sequence:
        return sentence
    if both.low > 0 or both.high < 0:
        sentence += (
            " The interval leaves 0 out by a hair; the exact test is the stricter judge here."
        )
    if needed := pairs.images_needed(both):
        rounded = float(f"{needed:.2g}")  # two digits count: 41,000
        sentence += (
            f" A true difference of that size would show on about {rounded:,.0f} such images "
            "(in 80 % of cases)."
        )
    return sentence


def _said_interval(pair: Pair) -> str:
    return SEQUENCE if pair.sequence else INTERVAL


def _test(pair: Pair) -> str:
    return "at any look" if pair.sequence else "exact McNemar test"


def _of_classes(pair: Pair) -> str:
    count, names = len(pair.classes), f"{pair.first} and {pair.other}"
    apart = np.flatnonzero(pair.p_by_class < 1 - LEVEL)
    if len(apart):
        apart = apart[np.argsort(pair.p_by_class[apart], kind="stable")]
        shown = [f"{pair.classes[at]} ({_points(row(pair, at))})" for at in apart[:CLASSES]]
        more = f", and {len(apart) - CLASSES} more" if len(apart) > CLASSES else ""
        return (
            f"{names} can be told apart on {len(apart)} of {count:,} classes (corrected for all of "
            f"them; points of {pair.other} minus {pair.first}): {', '.join(shown)}{more}."
        )
    most = int(np.max(pair.by_class.n))
    if 2 * 0.5**most * count >= 1 - LEVEL:
        return (
            f"{names} could not be told apart on a single class, whatever they did: {most} images "
            f"a class at most are too few for {count:,} tests."
        )
    return (
        f"{names} cannot be told apart on any single one of {count:,} classes (corrected for all "
        "of them)."
    )


def row(pair: Pair, at: int) -> Paired:
    """Return the comparison of one class."""
    return Paired(*(column[at] for column in pair.by_class))


def _evaluations(findings: ComparisonFindings) -> list[list[str]]:
    rows = [["", "network", "clean, %", "robust, %", "evaluation"]]
    for at, one in enumerate(findings.evaluations):
        clean, robust = (f"{100 * v.mean():.2f}" for v in (one.verdicts.clean, one.verdicts.robust))
        where = f"{one.record.evaluation} in {one.ours.file}"
        rows.append([letter(at), one.label, clean, robust if one.record.attacks else "", where])
    return rows


def _differences(compared: Sequence[Pair]) -> list[list[str]]:
    if len(compared) == 1:
        a, b = compared[0].first, compared[0].other
        steps = compared[0].steps.items()
        head = _head(a, b, _said_interval(compared[0]))
        return [["accuracy", *head], *([what, *_numbers(one)] for what, one in steps)]
    head = _head("first", "second", _said_interval(compared[0]))
    rows = [["pair", "accuracy", *head, "p, corrected"]]
    for pair in compared:
        names = f"{pair.first}, {pair.other}"
        for what, one in (("clean", pair.clean), ("robust", pair.robust)):
            if one:
                rows.append([names, what, *_numbers(one.paired), p_value(one.p)])
    return rows


def _head(a: str, b: str, interval: str) -> list[str]:
    counts = [f"only {a} right", f"only {b} right"]
    return [f"{a}, %", f"{b}, %", *counts, f"{b} - {a}, points", interval, "p"]


def _numbers(one: Paired) -> list[str]:
    counts = [f"{one.lost:,}", f"{one.gained:,}"]
    return [*_share(one), *counts, _points(one), _interval(one), p_value(one.p)]


def _classes(pair: Pair) -> list[list[str]]:
    head = _head(pair.first, pair.other, _said_interval(pair))
    rows = [["class", "images", *head, "p, corrected"]]
    order = np.lexsort((-np.abs(pair.by_class.difference), pair.by_class.p))
    for at in order[:CLASSES]:
        one, last = row(pair, at), p_value(pair.p_by_class[at])
        rows.append([str(pair.classes[at]), str(one.n), *_numbers(one), last])
    return rows


_FIXED = (
    "p: McNemar's exact test, two-sided. Intervals: Tango's score interval of paired proportions "
    "(1998)."
)
_LOOKED = (
    "An evaluation stopped when its numbers said so, where p-values and intervals of a fixed "
    "number of images do not hold. p here is the inverse of the largest e-value of a Beta mixture "
    "(Lindon and Malek 2022), sequences are by betting (Waudby-Smith and Ramdas 2023): both hold "
    "whenever one looks, and are wider for that."
)


def _how(count: int, sequence: bool) -> str:
    correction = (
        f"Holm's correction (1979) holds for the {count} pairs of one accuracy, and for the classes"
        " of one pair; intervals are each for itself."
        if count > 1
        else "Holm's correction (1979) holds for the classes; clean and robust accuracy, and what "
        "each attack leaves, are each a question for itself, as are all intervals."
    )
    return (
        "Both networks saw the same images, so what counts is on which of them they disagree. "
        f"{_LOOKED if sequence else _FIXED} {correction} All of it is about these weights on "
        "images like these: how much two trainings of one recipe differ by their seeds, no test of "
        "two networks knows."
    )


def _share(one: Paired) -> tuple[str, str]:
    return f"{100 * one.first / one.n:.2f}", f"{100 * one.second / one.n:.2f}"


def _points(one: Paired) -> str:
    return f"{100 * one.difference:+.2f}"


def _interval(one: Paired) -> str:
    return f"{100 * one.low:+.2f} to {100 * one.high:+.2f}"


def grid(rows: list[list[str]]) -> str:
    """Write rows of cells as a table, the first of them as its head."""
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    safe = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in safe)


def p_value(value: float) -> str:
    """Write a p-value with two digits."""
    return f"{value:.2g}" if value >= 1e-4 else "< 0.0001"


def said_p(value: float) -> str:
    """Write a p-value as a sentence has it."""
    return f"p = {p_value(value)}".replace("= <", "<")
