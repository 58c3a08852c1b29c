"""Two groups of evaluations, such as the seeds of two recipes: what is said of their means."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxrobust.results.comparison import evaluations, group_tests
from jaxrobust.results.comparison.comparison_findings import LEVEL, plain_evaluation
from jaxrobust.results.comparison.evaluations import ComparedEvaluation
from jaxrobust.results.comparison.group_tests import Over

AGAINST = "against"  # the word between two groups
_SIDES = ("A", "B")


class GroupDifference(NamedTuple):
    """One accuracy, clean or robust, of all networks of two groups."""

    first: np.ndarray  # f64[S], of each network of A
    second: np.ndarray  # f64[T], of each of B
    images: Over
    seeds: Over | None  # None: they say nothing

    @property
    def means(self) -> tuple[float, float]:
        """Return the mean of each group."""
        return float(self.first.mean()), float(self.second.mean())

    @property
    def spreads(self) -> tuple[float | None, float | None]:
        """Return the standard deviation over the networks of each group; None: it has one."""
        a, b = (
            float(own.std(ddof=1)) if len(own) > 1 else None for own in (self.first, self.second)
        )
        return a, b


class GroupFindings(NamedTuple):
    """All that a comparison of two groups finds."""

    names: list[str]  # A1, A2, B1
    evaluations: list[ComparedEvaluation]
    sizes: tuple[int, int]
    clean: GroupDifference
    robust: GroupDifference | None  # None: no attack
    remarks: list[str]
    left_out: str  # which images are not compared, and why; to be said first

    @property
    def images(self) -> int:
        """Return the number of images that are compared."""
        return len(self.evaluations[0].verdicts.labels)


def parted(words: Sequence[str]) -> list[list[str]]:
    """Part words at `against`: one group, or two; `ValueError`: a side is empty, or there are more.

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
            f"{AGAINST} stands {len(groups) - 1} times, and parts two groups; write it once, and a "
            f"folder of that name as ./{AGAINST}"
        )
    if not all(groups):
        raise ValueError(
            f"a side of {AGAINST} is empty; name one or more evaluations before it and behind it"
        )
    return groups


def find(first: Sequence[str], second: Sequence[str], threat: str | None = None) -> GroupFindings:
    """Read two groups of `PLACE[#NUMBER]`s and compare them; `ValueError`: they cannot be."""
    loaded = evaluations.load([*first, *second], threat)
    _check_each_once(loaded)
    for one in loaded:
        if one.record.stopped:
            raise ValueError(
                f"{one.place} stopped after {one.record.stopped['stopped_after']:,} images, and "
                "bounds of groups are of a fixed number; the same command without --against and "
                "--until_width finishes it"
            )
    sizes = len(first), len(second)
    names = [f"{side}{at + 1}" for side, size in zip(_SIDES, sizes, strict=True)
             for at in range(size)]  # fmt: skip
    notes = evaluations.remarks(loaded, names) + _other_networks(loaded, sizes)
    loaded, left_out = evaluations.without_replayed(loaded, names)
    seen = [one.verdicts for one in loaded]
    if len(seen[0].labels) < 2:
        raise ValueError("one image alone compares no groups; evaluate on more images")
    clean = _difference([v.clean for v in seen], sizes[0])
    attacked = bool(loaded[0].record.attacks)
    robust = _difference([v.robust for v in seen], sizes[0]) if attacked else None
    return GroupFindings(names, loaded, sizes, clean, robust, notes, left_out)


def _difference(verdicts: list[np.ndarray], size: int) -> GroupDifference:
    a, b = np.stack(verdicts[:size]), np.stack(verdicts[size:])
    accuracies = a.mean(1), b.mean(1)
    over = group_tests.over_images(a, b, LEVEL), group_tests.over_seeds(*accuracies, LEVEL)
    return GroupDifference(*accuracies, *over)


def _check_each_once(loaded: Sequence[ComparedEvaluation]) -> None:
    """Refuse a network that stands twice: copies of it would count as seeds."""
    seen: dict[str, str] = {}
    for one in loaded:
        own = one.record.weights_sha256
        if own is not None and own in seen:
            raise ValueError(
                f"{one.place} has the same weights as {seen[own]}, and a network counts once in "
                "groups; name another seed in its place, or leave it out"
            )
        seen[str(own)] = one.place


def _other_networks(loaded: Sequence[ComparedEvaluation], sizes: tuple[int, int]) -> list[str]:
    """Say where one group has networks of several architectures, which are no seeds of one."""
    sentences = []
    for side, own in zip(_SIDES, (loaded[: sizes[0]], loaded[sizes[0] :]), strict=True):
        found = sorted({str((one.record.model or {}).get("name")) for one in own})
        if len(found) > 1:
            listed = ", ".join(found)
            sentences.append(f"{side} has networks of several architectures: {listed}.")
    return sentences


def plain(findings: GroupFindings) -> dict[str, Any]:
    """Return findings as JSON has them; accuracies and their differences are fractions."""
    own = zip(findings.names, findings.evaluations, strict=True)
    return {
        "schema": 1,
        "level": LEVEL,
        "images": findings.images,
        "evaluations": [plain_evaluation(name, one) | {"group": name[0]} for name, one in own],
        "clean": _plain(findings.clean),
        "robust": findings.robust and _plain(findings.robust),
        "left_out": findings.left_out,
        "remarks": findings.remarks,
    }


def _plain(one: GroupDifference) -> dict[str, Any]:
    own = zip(_SIDES, (one.first, one.second), one.means, one.spreads, strict=True)
    groups = {
        side: {"mean": mean, "spread": spread, "each": values.tolist()}
        for side, values, mean, spread in own
    }
    seeds = one.seeds and one.seeds._asdict()
    return {"groups": groups, "over_images": one.images._asdict(), "over_seeds": seeds}
