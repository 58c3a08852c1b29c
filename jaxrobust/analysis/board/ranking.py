"""Boards: a data set under a threat, and on each the networks in their order and with their ranks.

Networks share a rank with the first of their group where the paired test cannot tell the two apart.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from jaxrobust.analysis.board import entries
from jaxrobust.analysis.board.entries import BoardEntry
from jaxrobust.evaluation.records import comparable, pairs
from jaxrobust.report.parts import sentences

ALPHA = 0.05  # below which two networks are told apart


class Standing(NamedTuple):
    """A network's place."""

    entry: BoardEntry
    rank: int
    common: int  # images on which it was compared with the first of its rank
    p: float  # of that comparison, corrected; 1 of the first itself


class AttackTable(NamedTuple):
    """The networks of a board that were attacked in the same way, best first."""

    attack: str
    rows: list[Standing]

    @property
    def standard(self) -> bool:
        """Tell whether the bundles of this table were made by standard AutoAttack."""
        return self.attack.partition(",")[0] == sentences.STANDARD


class Board(NamedTuple):
    """A data set under a threat."""

    data: str
    threat: str
    tables: list[AttackTable]


def boards(found: Sequence[BoardEntry]) -> list[Board]:
    """Sort entries into boards, with those of the union of three norms where a network has them."""
    known = [*found, *_unions(found)]
    made = []
    for own in _grouped(known, lambda one: (one.data, len(one.threats), one.threats)):
        tables = [
            AttackTable(rows[0].attack, ranked(rows))
            for rows in _grouped(own, lambda one: (one.attack, one.settings))
        ]
        balls = ", ".join(entries.ball(*each) for each in own[0].threats)
        threat = f"union of {balls}" if len(own[0].threats) > 1 else balls
        tables.sort(key=lambda table: (not table.standard, table.attack))
        made.append(Board(own[0].data, threat, tables))
    return made


def _grouped(
    found: Sequence[BoardEntry], key: Callable[[BoardEntry], tuple[object, ...]]
) -> list[list[BoardEntry]]:
    order = sorted(found, key=key)  # type: ignore[arg-type]  # tuples of texts and numbers
    return [list(own) for _, own in itertools.groupby(order, key)]


def _unions(found: Sequence[BoardEntry]) -> list[BoardEntry]:
    """Make the entries of the union of three norms, for each choice of a radius in each."""
    made = []
    for own in _grouped(found, lambda one: (one.network, one.images, one.data, one.attack)):
        by_norm: dict[str, list[BoardEntry]] = {}
        for one in own:
            if len(one.threats) == 1:
                by_norm.setdefault(one.threats[0][0], []).append(one)
        if len(by_norm) == 3:
            several = itertools.product(*(by_norm[norm] for norm in sorted(by_norm)))
            made += [both for each in several if (both := entries.union(each))]
    return made


def ranked(rows: Sequence[BoardEntry]) -> list[Standing]:
    """Order networks by robust accuracy, and give each a rank.

    A group is the best network that is left and those behind it which McNemar's exact test cannot
    tell from it, up to the first which it can. p-values are Holm's of all pairs, as any of them
    may come to be asked.
    """
    order = sorted(rows, key=lambda one: (-one.robust, -one.clean, one.name, one.numbers))
    asked = list(itertools.combinations(range(len(order)), 2))
    decided = [comparable.replayed(one.verdicts) for one in order]
    shared = [_discordant(order[a], order[b], decided[a], decided[b]) for a, b in asked]
    counts = np.array(shared, int).reshape(-1, 3)
    corrected = pairs.holm(pairs.mcnemar(counts[:, 1], counts[:, 2]))
    p = dict(zip(asked, corrected.tolist(), strict=True))
    common = dict(zip(asked, counts[:, 0].tolist(), strict=True))
    standings: list[Standing] = []
    leader = 0
    for at, one in enumerate(order):
        if at and p[leader, at] < ALPHA:
            leader = at
        first = at == leader
        compared = (one.n, 1.0) if first else (common[leader, at], p[leader, at])
        standings.append(Standing(one, leader + 1, *compared))
    return standings


def _discordant(one: BoardEntry, other: BoardEntry, *decided: np.ndarray) -> tuple[int, int, int]:
    """Count the images that both have, and those that only the second, or only the first, keeps.

    Images are the same by their place in the same split, else by the hash of what the network
    sees. Those that a replayed point `decided`, bool[N] of each of the two, are left out, as
    `jaxrobust compare` does.
    """
    places = one.images == other.images
    keys = [e.verdicts.image_ids if places else e.sha256 for e in (one, other)]
    _, first, second = np.intersect1d(keys[0], keys[1], return_indices=True)
    seen, beside = one.verdicts, other.verdicts
    counted = ~(decided[0][first] | decided[1][second])
    counted &= seen.labels[first] == beside.labels[second]
    ours, theirs = seen.robust[first][counted], beside.robust[second][counted]
    return len(ours), int((theirs & ~ours).sum()), int((ours & ~theirs).sum())
