"""Comparison of evaluations: each against the first, on the common images."""

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from jaxrobust.evaluation.records import checked, comparisons
from jaxrobust.evaluation.records.comparisons import Paired
from jaxrobust.evaluation.records.verdicts import REPLAY
from jaxrobust.results.comparison.evaluations import (
    ComparedEvaluation,
    letter,
    remarks,
    without_replayed,
)

LEVEL = 0.95  # of intervals; networks with p below 1 - LEVEL can be told apart
INTERVAL = f"{100 * LEVEL:.0f}% interval"
SEQUENCE = f"{100 * LEVEL:.0f}% sequence"  # if a rule stopped one of the evaluations
_OF_RECORD = (
    *("evaluation", "weights", "weights_sha256", "dataset", "split", "preprocessing"),
    *("attacks", "seed", "commit", "flags"),
)


class Difference(NamedTuple):
    """The comparison of one accuracy, clean or robust, of two networks."""

    paired: Paired
    p: float  # of the exact test, corrected for the number of pairs

    @property
    def apart(self) -> bool:
        """Whether the two can be told apart."""
        return self.p < 1 - LEVEL


class Pair(NamedTuple):
    """One evaluation against the first."""

    first: str  # letters
    other: str
    clean: Difference
    robust: Difference | None  # None: no attack
    after: dict[str, Paired]  # attack -> accuracies after it
    classes: np.ndarray  # labels [G]
    by_class: Paired  # [G], robust accuracy if there was an attack, else clean
    p_by_class: np.ndarray  # f64[G], corrected for the number of classes
    sequence: bool = False  # an evaluation was stopped: intervals and p-values hold at all looks

    @property
    def steps(self) -> dict[str, Paired]:
        """The comparisons from clean to robust accuracy, attack by attack."""
        between = {f"after {name}": one for name, one in [*self.after.items()][:-1]}
        last = {"robust": self.robust.paired} if self.robust else {}
        return {"clean": self.clean.paired} | between | last


class ComparisonFindings(NamedTuple):
    """The findings of a comparison."""

    evaluations: list[ComparedEvaluation]
    pairs: list[Pair]
    removed: dict[str, list[int]]  # attack -> number of images fooled in each evaluation
    remarks: list[str]
    left_out: str = ""  # which images are not compared, and why; reported first

    @property
    def interval(self) -> str:
        """The kind of bounds on differences: intervals, or sequences that hold at all looks."""
        return SEQUENCE if any(pair.sequence for pair in self.pairs) else INTERVAL

    @property
    def images(self) -> int:
        """The number of images compared."""
        return len(self.evaluations[0].verdicts.labels)


def find(evaluations: list[ComparedEvaluation]) -> ComparisonFindings:
    """Compare evaluations of the same question and images with the first."""
    notes = remarks(evaluations)
    evaluations, left_out = without_replayed(evaluations)
    order = _attacks(evaluations)
    images = [one.verdicts for one in evaluations]
    records = [one.record for one in evaluations]
    compare = partial(checked.paired, records, images[0].image_ids)
    clean = _differences(compare, [v.clean for v in images])
    attacked = bool(evaluations[0].record.attacks)
    robust = _differences(compare, [v.robust for v in images]) if attacked else [None] * len(clean)
    stopped = checked.stop_order(records) is not None
    compared = []
    for at, other in enumerate(images[1:]):
        two = (images[0], other)
        after = {
            name: compare(*(v.clean & ~np.isin(v.fooled_by, order[:end]) for v in two))
            for end, name in enumerate(order, 1)
        }
        first, last = (v.robust if attacked else v.clean for v in two)
        labels = images[0].labels
        if records[0].task:  # it has no classes
            first, last, labels = first[:0], last[:0], labels[:0]
        classes, per_class = comparisons.compare_groups(first, last, labels)
        if stopped:  # class by class, by their sequences
            masks = [labels == label for label in classes]
            rows = [
                checked.paired(records, images[0].image_ids[m], first[m], last[m]) for m in masks
            ]
            per_class = Paired(*(np.array(column) for column in zip(*rows, strict=True)))
        by_class: Any = (classes, per_class, comparisons.holm(per_class.p), stopped)
        compared.append(Pair("A", letter(at + 1), clean[at], robust[at], after, *by_class))
    removed = {name: [int((v.fooled_by == name).sum()) for v in images] for name in order}
    return ComparisonFindings(evaluations, compared, removed, notes, left_out)


def _attacks(evaluations: Sequence[ComparedEvaluation]) -> list[str]:
    """List the attacks that may have fooled images, in the order in which they were tried."""
    # With several balls, verdicts name the ball and the attack: "l2 0.5: apgd-ce". Names that
    # records do not list, such as replayed points, were tried before all attacks or those of their
    # ball.
    record = evaluations[0].record
    fooling = {n for one in evaluations for n in one.verdicts.fooled_by.tolist()} - {"", "clean"}
    listed: dict[str, None] = {}
    for attack, threat in zip(record.attacks, record.threats, strict=True):
        ball = f"{threat}: " * record.is_union
        of_ball = [name for name in listed if ball and name.startswith(ball)]
        if not of_ball:
            listed |= dict.fromkeys(sorted(n for n in fooling if n == f"{ball}{REPLAY}"))
        plain = f"{ball}{attack['name']}"
        fixed = f"{plain}-{attack.get('steps')}"  # name of attacks with fixed steps in verdicts
        listed[fixed if fixed in fooling else plain] = None
    again = [f"{name} (full)" for name in listed if f"{name} (full)" in fooling]
    replays = sorted(fooling - {*listed, *again})
    return [*replays, *listed, *again]


def _differences(
    compare: Callable[..., Paired], verdicts: Sequence[np.ndarray]
) -> list[Difference]:
    compared = [compare(verdicts[0], other) for other in verdicts[1:]]
    corrected = comparisons.holm(np.array([one.p for one in compared]))
    return [Difference(one, float(p)) for one, p in zip(compared, corrected, strict=True)]


def compare_all(verdicts: Sequence[np.ndarray]) -> dict[tuple[int, int], Difference]:
    """Compare every pair of verdicts bool[N] on the same images, corrected for all pairs."""
    places = list(itertools.combinations(range(len(verdicts)), 2))
    compared = [comparisons.compare(verdicts[one], verdicts[other]) for one, other in places]
    corrected = comparisons.holm(np.array([one.p for one in compared]))
    differences = (Difference(one, float(p)) for one, p in zip(compared, corrected, strict=True))
    return dict(zip(places, differences, strict=True))


def plain(findings: ComparisonFindings) -> dict[str, Any]:
    """Return findings for JSON; accuracies and their differences are fractions."""
    return {
        "schema": 1,
        "level": LEVEL,
        **({"sequence": True} if findings.interval == SEQUENCE else {}),
        "images": findings.images,
        "evaluations": [
            plain_evaluation(letter(at), one) for at, one in enumerate(findings.evaluations)
        ],
        "pairs": [_plain_pair(pair) for pair in findings.pairs],
        "left_out": findings.left_out,
        "remarks": findings.remarks,
    }


def plain_evaluation(name: str, one: ComparedEvaluation) -> dict[str, Any]:
    """Return a compared evaluation for JSON, under its short name."""
    record, verdicts = one.record, one.verdicts
    return {
        "name": name,
        "network": one.label,
        "file": str(one.ours.file),
        **{key: getattr(record, key) for key in _OF_RECORD},
        "evaluated": one.images,
        "clean": float(verdicts.clean.mean()),
        "robust": float(verdicts.robust.mean()) if record.attacks else None,
        "removed": dict(sorted(Counter(filter(None, verdicts.fooled_by.tolist())).items())),
    }


def _plain_pair(pair: Pair) -> dict[str, Any]:
    def difference(one: Difference | None) -> dict[str, Any] | None:
        return one and one.paired._asdict() | {"p_corrected": one.p, "apart": one.apart}

    columns = {"label": pair.classes, **pair.by_class._asdict(), "p_corrected": pair.p_by_class}
    rows = zip(*(np.asarray(column).tolist() for column in columns.values()), strict=True)
    return {
        "first": pair.first,
        "second": pair.other,
        "clean": difference(pair.clean),
        "robust": difference(pair.robust),
        "after": {name: one._asdict() for name, one in pair.after.items()},
        "classes": [dict(zip(columns, row, strict=True)) for row in rows],
    }
