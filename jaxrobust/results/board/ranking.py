"""Boards: the ranked networks for a data set under a threat.

A network shares the rank of the first of its group if the paired test cannot tell the two apart.
An attacked network counts by its accuracy under the board's attacks on a sample of its standing
images: images that may fall count as fallen.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from jaxrobust.evaluation.records import comparisons
from jaxrobust.report.parts import sentences
from jaxrobust.results.board import entries
from jaxrobust.results.board.entries import BoardEntry
from jaxrobust.types import NORMS

ALPHA = 0.05  # level of the tests that tell networks apart


class Standing(NamedTuple):
    """A network's rank on a board."""

    entry: BoardEntry
    rank: int
    common: int  # number of images compared with the first of its rank
    p: float  # corrected p-value of that comparison; 1 for the first itself


class AttackTable(NamedTuple):
    """The networks of a board under the same attack, best first."""

    attack: str
    rows: list[Standing]

    @property
    def corrupted(self) -> bool:
        """Whether accuracies are under common corruptions."""
        return bool(self.rows[0].entry.corruptions)

    @property
    def standard(self) -> bool:
        """Whether bundles are from standard AutoAttack, or needed no attack."""
        return self.corrupted or self.attack.partition(",")[0] == sentences.STANDARD


class Board(NamedTuple):
    """A data set under a threat, or under common corruptions."""

    data: str
    threat: str
    tables: list[AttackTable]


def boards(entries_of_bundles: Sequence[BoardEntry]) -> list[Board]:
    """Sort entries into boards, adding the union of three norms for networks that have all."""
    every = [*entries_of_bundles, *_unions(entries_of_bundles)]
    sorted_boards = []

    def key(one: BoardEntry) -> tuple[object, ...]:
        return one.data, bool(one.corruptions), len(one.threats), one.threats, _threat(one)

    for group in _grouped(every, key):
        tables = [
            AttackTable(rows[0].attack, ranked(rows))
            for rows in _grouped(group, lambda one: (one.attack, one.settings))
        ]
        tables.sort(key=lambda table: (not table.standard, table.attack))
        sorted_boards.append(Board(group[0].data, _threat(group[0]), tables))
    return sorted_boards


def _threat(one: BoardEntry) -> str:
    """Describe the threats or corruptions of an entry."""
    if one.corruptions:
        return entries.corruptions_of(one)
    balls = ", ".join(entries.ball(*threat) for threat in one.threats)
    return f"union of {balls}" if len(one.threats) > 1 else balls


def _grouped(
    rows: Sequence[BoardEntry], key: Callable[[BoardEntry], tuple[object, ...]]
) -> list[list[BoardEntry]]:
    order = sorted(rows, key=key)  # type: ignore[arg-type]  # tuples of texts and numbers
    return [list(group) for _, group in itertools.groupby(order, key)]


def _unions(rows: Sequence[BoardEntry]) -> list[BoardEntry]:
    """Make the entries of the union of three norms, one per combination of radii."""
    unions = []
    for group in _grouped(rows, lambda one: (one.network, one.images, one.data, one.attack)):
        by_norm: dict[str, list[BoardEntry]] = {}
        for one in group:
            if len(one.threats) == 1 and one.threats[0][0] in NORMS:
                by_norm.setdefault(one.threats[0][0], []).append(one)
        if len(by_norm) == 3:
            several = itertools.product(*(by_norm[norm] for norm in sorted(by_norm)))
            unions += [both for entry in several if (both := entries.union(entry))]
    return unions


def ranked(rows: Sequence[BoardEntry]) -> list[Standing]:
    """Order networks by the lower bound on robust accuracy, and rank them.

    A group is the best remaining network and the next ones, up to the first that the paired test
    can tell from it. The test is McNemar's exact test on surviving images, or the paired t test on
    shares of corruptions. p-values are corrected by Holm's method for all pairs, as any pair may be
    tested.
    """
    best = lambda one: (-one.at_least, -one.robust, -(one.clean or 0), one.name, one.numbers)  # noqa: E731
    order = sorted(rows, key=best)
    asked = list(itertools.combinations(range(len(order)), 2))
    tested = _shares_apart if order[0].corruptions else _verdicts_apart
    numbers, plain = tested([(order[a], order[b]) for a, b in asked])
    p = dict(zip(asked, comparisons.holm(plain).tolist(), strict=True))
    common = dict(zip(asked, numbers, strict=True))
    standings: list[Standing] = []
    leader = 0
    for at, one in enumerate(order):
        if at and p[leader, at] < ALPHA:
            leader = at
        first = at == leader
        compared = (one.n, 1.0) if first else (common[leader, at], p[leader, at])
        standings.append(Standing(one, leader + 1, *compared))
    return standings


_Pairs = Sequence[tuple[BoardEntry, BoardEntry]]


def _verdicts_apart(asked: _Pairs) -> tuple[list[int], np.ndarray]:
    """Count the common images of each pair, and test their verdicts."""
    # Images are matched by their place in the same split, otherwise by the hash of the network's
    # input. Images fooled by a replayed point count: the point was confirmed, and the author of the
    # bundle could label any point as replayed. Images that the board's attacks might fool do not
    # count as kept by one network alone, as far as that could change the outcome.
    numbers, only = [], []
    for one, other in asked:
        places = one.images == other.images
        keys = [e.verdicts.image_ids if places else e.sha256 for e in (one, other)]
        _, first, second = np.intersect1d(keys[0], keys[1], return_indices=True)
        same = one.verdicts.labels[first] == other.verdicts.labels[second]
        a, b = one.verdicts.robust[first][same], other.verdicts.robust[second][same]
        counts = np.array([(b & ~a).sum(), (a & ~b).sum()])
        numbers.append(len(a))
        only.append(np.maximum(counts - [other.falling[1], one.falling[1]], counts.min()))
    gained, lost = np.array(only, int).reshape(-1, 2).T
    return numbers, comparisons.mcnemar(gained, lost)


def _shares_apart(asked: _Pairs) -> tuple[list[int], np.ndarray]:
    """Count the common images of each pair, and test the shares of corruptions they withstand."""
    # Images are matched by hashes that cover all corrupted versions of an image.
    numbers, plain = [], []
    for one, other in asked:
        assert one.withstood is not None and other.withstood is not None
        _, first, second = np.intersect1d(one.sha256, other.sha256, return_indices=True)
        same = one.verdicts.labels[first] == other.verdicts.labels[second]
        numbers.append(int(same.sum()))
        plain.append(
            comparisons.paired_t(one.withstood[first[same]] - other.withstood[second[same]])
        )
    return numbers, np.array(plain)
