"""Comparison of two groups of evaluations, such as seeds of two recipes, as text and JSON."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxrobust.results.comparison import evaluations, group_tests
from jaxrobust.results.comparison.comparison_findings import INTERVAL, LEVEL, plain_evaluation
from jaxrobust.results.comparison.comparison_markdown import (
    about,
    grid,
    interval,
    p_value,
    points,
    said_p,
)
from jaxrobust.results.comparison.evaluations import ComparedEvaluation
from jaxrobust.results.comparison.group_tests import Over
from jaxrobust.runtime.text.spelling import counted

AGAINST = "against"  # the word between two groups
_SIDES = ("A", "B")
_HOW = (
    "There are two questions. *These networks*: if other images had been drawn, would they still "
    "differ? Each image counts by the share of each group's networks that classify it correctly; p "
    "is from the exact sign-flip test over images (Fisher 1935), which for one network per side is "
    "McNemar's, and the interval is a Student's t interval over images. *Networks trained like "
    "these*: if other seeds had been drawn, would networks from these recipes still differ on "
    "these images? Each network counts once, by its accuracy; the test and the interval are "
    "Welch's (1947). The spread is the standard deviation over the networks of a group. Clean and "
    "robust accuracy, images and seeds are tested separately, without correction for multiple "
    "tests."
)


class GroupDifference(NamedTuple):
    """One accuracy, clean or robust, of all networks of two groups."""

    first: np.ndarray  # f64[S], of each network of A
    second: np.ndarray  # f64[T], of each of B
    images: Over
    seeds: Over | None  # None: nothing is known over seeds

    @property
    def means(self) -> tuple[float, float]:
        """The mean of each group."""
        return float(self.first.mean()), float(self.second.mean())

    @property
    def spreads(self) -> tuple[float | None, float | None]:
        """The standard deviation over the networks of each group; None if it has only one."""
        a, b = (float(v.std(ddof=1)) if len(v) > 1 else None for v in (self.first, self.second))
        return a, b


class GroupFindings(NamedTuple):
    """The findings of a comparison of two groups."""

    names: list[str]  # A1, A2, B1
    evaluations: list[ComparedEvaluation]
    sizes: tuple[int, int]
    clean: GroupDifference
    robust: GroupDifference | None  # None: no attack
    remarks: list[str]
    left_out: str  # which images are not compared, and why; reported first

    @property
    def images(self) -> int:
        """The number of images compared."""
        return len(self.evaluations[0].verdicts.labels)


def parted(words: Sequence[str]) -> list[list[str]]:
    """Split words at `against` into one group or two; `ValueError` if one is empty, or with more.

    >>> parted(["a", "b", "against", "c"])
    [['a', 'b'], ['c']]
    """
    groups: list[list[str]] = [[]]
    for word in words:
        if word == AGAINST:
            groups.append([])
        else:
            groups[-1].append(word)
    if len(groups) > 2:
        raise ValueError(
            f"{AGAINST} appears {len(groups) - 1} times; write it once, between two groups, and a "
            f"folder of that name as ./{AGAINST}"
        )
    if not all(groups):
        raise ValueError(
            f"a side of {AGAINST} is empty; name one or more evaluations before it and after it"
        )
    return groups


def find(first: Sequence[str], second: Sequence[str], threat: str | None = None) -> GroupFindings:
    """Read and compare two groups of `PLACE[#NUMBER]`s; `ValueError` if they are not comparable."""
    loaded = evaluations.load([*first, *second], threat)
    places: dict[str, str] = {}  # by weights, so that copies of a network do not count as seeds
    for one in loaded:
        sha256, stopped = one.record.weights_sha256, one.record.stopped
        if sha256 is not None and sha256 in places:
            raise ValueError(
                f"{one.place} has the same weights as {places[sha256]}, but each network counts "
                "only once; name another seed instead, or leave it out"
            )
        places[str(sha256)] = one.place
        if stopped:
            raise ValueError(
                f"{one.place} stopped after {stopped['stopped_after']:,} images, but bounds for "
                "groups need a number of images fixed in advance; repeat the command without "
                "--against and --until_width to finish it"
            )
    size = len(first)
    names = [f"A{at + 1}" for at in range(size)] + [f"B{at + 1}" for at in range(len(second))]
    notes = evaluations.remarks(loaded, names)
    for side, group in zip(_SIDES, (loaded[:size], loaded[size:]), strict=True):
        models = sorted({str((one.record.model or {}).get("name")) for one in group})
        if len(models) > 1:  # not only different seeds
            notes.append(f"{side} has networks of several architectures: {', '.join(models)}.")
    loaded, left_out = evaluations.without_replayed(loaded, names)
    images = [one.verdicts for one in loaded]
    if len(images[0].labels) < 2:
        raise ValueError("one image is not enough to compare groups; evaluate more images")
    clean = _difference([v.clean for v in images], size)
    attacked = bool(loaded[0].record.attacks)
    robust = _difference([v.robust for v in images], size) if attacked else None
    return GroupFindings(names, loaded, (size, len(second)), clean, robust, notes, left_out)


def _difference(verdicts: list[np.ndarray], size: int) -> GroupDifference:
    a, b = np.stack(verdicts[:size]), np.stack(verdicts[size:])
    accuracies = a.mean(1), b.mean(1)
    over = group_tests.over_images(a, b, LEVEL), group_tests.over_seeds(*accuracies, LEVEL)
    return GroupDifference(*accuracies, *over)


def plain(findings: GroupFindings) -> dict[str, Any]:
    """Return findings for JSON; accuracies and their differences are fractions."""
    rows = zip(findings.names, findings.evaluations, strict=True)
    return {
        "schema": 1,
        "level": LEVEL,
        "images": findings.images,
        "evaluations": [plain_evaluation(name, one) | {"group": name[0]} for name, one in rows],
        "clean": _plain(findings.clean),
        "robust": findings.robust and _plain(findings.robust),
        "left_out": findings.left_out,
        "remarks": findings.remarks,
    }


def _plain(one: GroupDifference) -> dict[str, Any]:
    sides = zip(_SIDES, (one.first, one.second), one.means, one.spreads, strict=True)
    groups = {
        side: {"mean": mean, "spread": spread, "each": values.tolist()}
        for side, values, mean, spread in sides
    }
    seeds = one.seeds and one.seeds._asdict()
    return {"groups": groups, "over_images": one.images._asdict(), "over_seeds": seeds}


def document(findings: GroupFindings, picture: str | None = None) -> str:
    """Return the comparison as Markdown; `picture` is the figure's file next to it."""
    questions = {"robust accuracy": findings.robust, "clean accuracy": findings.clean}
    asked = {accuracy: one for accuracy, one in questions.items() if one is not None}
    lines = [text for name, one in asked.items() for text in sentences(one, name, findings.images)]
    rows = [["", "network", "clean, %", "robust, %", "evaluation"]]
    for name, one in zip(findings.names, findings.evaluations, strict=True):
        rows.append([name, *one.cells])
    head = ["accuracy", "A, mean %", "spread", "B, mean %", "spread", "B - A, points"]
    table = [[*head, f"{INTERVAL} over images", "p", f"{INTERVAL} over seeds", "p"]]
    for name, difference in reversed(asked.items()):
        spreads = ["" if spread is None else f"{100 * spread:.2f}" for spread in difference.spreads]
        a, b = (f"{100 * mean:.2f}" for mean in difference.means)
        images, seeds = difference.images, difference.seeds
        over = [points(images), interval(images), p_value(images.p)]
        over += ["", ""] if seeds is None else [interval(seeds), p_value(seeds.p)]
        table.append([name.split()[0], a, spreads[0], b, spreads[1], *over])
    parts = [
        f"# A ({counted(findings.sizes[0], 'network')}) against B "
        f"({counted(findings.sizes[1], 'network')}), over images and seeds",
        findings.left_out,
        about(findings.evaluations[0].record, findings.images),
        grid(rows),
        "\n".join(f"- {sentence}" for sentence in (*lines, *findings.remarks)),
        f"![Groups]({picture})" if picture else "",
        "## Means and differences",
        grid(table),
        "## How this was computed",
        _HOW,
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def sentences(one: GroupDifference, accuracy: str, images: int) -> Iterator[str]:
    """Yield an answer for these networks, and one for networks trained in the same way."""
    a, b = (f"{100 * mean:.2f}" for mean in one.means)
    means = (
        f"A has a mean of {a}% over {counted(len(one.first), 'network')}, B {b}% over "
        f"{counted(len(one.second), 'network')}"
    )
    if (one.images.low, one.images.high) == (0, 0):
        yield (
            f"**These networks: A and B have the same {accuracy}, image by image.** {means}; each "
            "image is classified correctly by the same share of both groups."
        )
    else:
        yield _verdict(
            *("These networks", accuracy, one.images),
            f"{means}: {points(one.images)} points, {INTERVAL} over {images:,} images"
            f" {interval(one.images)}, exact sign-flip test {said_p(one.images.p)}.",
        )
    if one.seeds is None:
        few = min(len(one.first), len(one.second)) < 2
        why = "one network" if few else "networks that do not differ"
        more = "two networks or more on both sides" if few else "more seeds"
        yield (
            f"**Networks trained like these: nothing is known about their {accuracy}.** A group of "
            f"{why} does not show how much seeds vary; {more} would."
        )
        return
    shown = ["one network" if s is None else f"{100 * s:.2f}" for s in one.spreads]
    yield _verdict(
        *("Networks trained like these", accuracy, one.seeds),
        f"Over seeds: {points(one.seeds)} points, Welch's {INTERVAL} {interval(one.seeds)}, "
        f"{said_p(one.seeds.p)}; spread (standard deviation) A {shown[0]}, B {shown[1]} points.",
    )


def _verdict(of: str, accuracy: str, over: Over, figures: str) -> str:
    if over.p >= 1 - LEVEL:
        close = over.low > 0 or over.high < 0
        hair = " The interval barely excludes 0; the test decides here." if close else ""
        return f"**{of}: A and B cannot be told apart in {accuracy}.** {figures}{hair}"
    winner, loser = ("B", "A") if over.difference > 0 else ("A", "B")
    return f"**{of}: the {accuracy} of {winner} is higher than that of {loser}.** {figures}"
