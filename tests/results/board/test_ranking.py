"""Order, shared ranks and boards, of entries with known verdicts."""

import itertools

import numpy as np
from absl.testing import parameterized

from jaxrobust.evaluation.records.verdicts import Verdicts
from jaxrobust.results.board import entries, ranking
from jaxrobust.results.board.entries import BoardEntry

N = 200
_NUMBERS = itertools.count()


def verdicts_of(fooled_by) -> Verdicts:
    fooled_by = np.array(fooled_by)
    n = len(fooled_by)
    ids, labels = np.arange(n), np.zeros(n, int)
    return Verdicts(ids, labels, fooled_by != "clean", fooled_by, np.zeros(n), np.full(n, -1))


def made(name, fooled, *, n=N, by="apgd-ce", **changes) -> BoardEntry:
    """An entry whose images `fooled` fall."""
    fooled_by = np.full(n, "", object)
    fooled_by[list(fooled)] = by
    entry = BoardEntry(
        name=name, weights="", network=name, data="noise, test", images="the same",
        threats=(("linf", 0.1),), attack="apgd-ce", settings="", verdicts=verdicts_of(fooled_by),
        sha256=np.array([f"{i:064x}" for i in range(n)]), split_images=n, flags={}, passes=1.0,
        seconds=1.0, device="cpu", numbers=(f"{next(_NUMBERS):04}",), commands=("verify it",),
    )  # fmt: skip
    return entry._replace(**changes)


def ranks(*found) -> list[tuple[str, int]]:
    return [(row.entry.name, row.rank) for row in ranking.ranked(found)]


class RanksTest(parameterized.TestCase):
    def test_one_network_alone(self):
        self.assertEqual(ranks(made("a", [1])), [("a", 1)])

    def test_networks_that_cannot_be_told_apart_share_a_rank(self):
        """20 images only a keeps: p = 2e-6; 5 of them: p = 0.06; 12: p = 5e-4."""
        a, near, far = made("a", []), made("near", range(5)), made("far", range(20))
        self.assertEqual(ranks(far, near, a), [("a", 1), ("near", 1), ("far", 3)])
        worst = made("worst", range(100))
        farther = made("farther", range(22))
        expected = [("a", 1), ("near", 1), ("far", 3), ("farther", 3), ("worst", 5)]
        self.assertEqual(ranks(worst, farther, far, near, a), expected)

    def test_the_first_of_the_group_is_asked_and_not_the_neighbour(self):
        """Each is near its neighbor, and c, 18 images below a, is far from a."""
        a, b, c = made("a", []), made("b", range(5)), made("c", range(18))
        near_b = made("c", range(10))
        self.assertEqual(ranks(a, b, c), [("a", 1), ("b", 1), ("c", 3)])
        self.assertEqual([rank for _, rank in ranks(b, near_b)], [1, 1])
        self.assertEqual([rank for _, rank in ranks(a, b, near_b)], [1, 1, 3])

    def test_which_images_counts_and_not_how_many(self):
        """The same accuracies on discordant images, 30 against 45 (p = 0.1), are not difference."""
        a, b = made("a", range(30)), made("b", range(30, 75))
        inside = made("b", range(45))  # 15 images that only a keeps: p = 6e-5
        self.assertEqual([rank for _, rank in ranks(a, b)], [1, 1])
        self.assertEqual([rank for _, rank in ranks(a, inside)], [1, 2])

    def test_p_values_are_corrected_for_all_pairs(self):
        """7 images (p = 0.016) part two networks alone, and not among the six pairs of four."""
        a, b = made("a", []), made("b", range(7))
        self.assertEqual([rank for _, rank in ranks(a, b)], [1, 2])
        others = made("c", range(6)), made("d", range(7))
        self.assertEqual([rank for _, rank in ranks(a, b, *others)], [1, 1, 1, 1])

    def test_only_images_that_both_have_are_compared(self):
        a = made("a", [])
        few = made("few", range(20), n=40)
        (_, row) = ranking.ranked([a, few])
        self.assertEqual((row.entry.name, row.common, row.rank), ("few", 40, 2))
        other = np.array([f"{i:064x}" for i in range(1000, 1000 + N)])
        b = made("b", range(50), images="another list", sha256=other)
        (_, row) = ranking.ranked([a, b])
        self.assertEqual((row.common, row.p, row.rank), (0, 1, 1))
        b = b._replace(sha256=np.roll(a.sha256, 3))  # the same images in another order
        self.assertEqual(ranking.ranked([a, b])[1].common, N)

    def test_images_that_a_replayed_point_decided_count(self):
        """Whoever called all points replayed shared the first rank, as none of them counted."""
        a, b = made("a", []), made("b", range(20), by="replay")
        (_, row) = ranking.ranked([a, b])
        self.assertEqual((row.common, row.rank), (N, 2))

    def test_images_that_may_fall_are_no_lead(self):
        """30 images only a keeps: 25 of them may fall; b is sorted by what it keeps at least."""
        a, b = made("a", [], falling=(0, 25)), made("b", range(30))
        self.assertEqual(ranks(b, a), [("a", 1), ("b", 1)])
        self.assertEqual(ranks(b, a._replace(falling=(0, 9))), [("a", 1), ("b", 2)])
        self.assertEqual(ranks(b, a._replace(falling=(0, 40))), [("b", 1), ("a", 1)])
        unsure = made("c", range(100), falling=(3, 10))
        self.assertAlmostEqual(unsure.robust, 97 / N)
        self.assertAlmostEqual(unsure.at_least, 90 / N)

    def test_images_with_another_label_are_left_out(self):
        a, b = made("a", []), made("b", range(20))
        b = b._replace(verdicts=b.verdicts._replace(labels=np.arange(N) < 50))
        self.assertEqual(ranking.ranked([a, b])[1].common, N - 50)


class BoardsTest(parameterized.TestCase):
    def test_a_board_for_each_data_set_and_threat(self):
        a, b = made("a", []), made("b", [1])
        l2, cifar = made("a", [], threats=(("l2", 0.5),)), made("a", [], data="cifar10, test")
        found = ranking.boards([a, l2, cifar, b])
        shown = [(board.data, board.threat, len(board.tables[0].rows)) for board in found]
        expected = [("cifar10, test", "L∞ 0.1", 1), ("noise, test", "L2 0.5", 1)]
        self.assertEqual(shown, [*expected, ("noise, test", "L∞ 0.1", 2)])

    def test_attacks_are_not_mixed_and_the_standard_one_is_first(self):
        weak = made("weak", [])
        strong = made("strong", range(90), attack="autoattack standard")
        steps = made("steps", [], settings="5 steps")
        (board,) = ranking.boards([weak, strong, steps])
        tables = [(table.attack, table.standard, len(table.rows)) for table in board.tables]
        weaker = ("apgd-ce", False, 1)
        self.assertEqual(tables, [("autoattack standard", True, 1), weaker, weaker])
        self.assertTrue(all(row.rank == 1 for table in board.tables for row in table.rows))

    def test_the_union_of_three_norms(self):
        flags = {"l1": {"x": "1"}, "l2": {"x": "1", "y": "2"}, "linf": {"x": "1"}}
        three = [
            made("a", fooled, threats=((norm, 1.0),), flags=flags[norm])
            for norm, fooled in (("l2", [1, 2]), ("linf", [2, 3]), ("l1", [50]))
        ]
        self.assertLen(ranking.boards(three[:2]), 2)
        other = made("b", [], threats=(("l1", 1.0),))
        self.assertLen(ranking.boards([*three[:2], other]), 3)  # of another network
        pixels = made("a", [3], threats=(("l0", 9.0),))
        self.assertLen(ranking.boards([*three[:2], pixels]), 3)
        self.assertLen(ranking.boards([*three, pixels]), 5)
        *_, board = ranking.boards(three)
        self.assertEqual(board.threat, "union of L1 1, L2 1, L∞ 1")
        (row,) = board.tables[0].rows
        self.assertEqual(board.tables[0].attack, "apgd-ce, each threat alone")
        one = row.entry
        self.assertEqual(np.flatnonzero(~one.verdicts.robust).tolist(), [1, 2, 3, 50])
        self.assertEqual(one.verdicts.fooled_by[[0, 2, 50]].tolist()[1:], [
            "L2 1: apgd-ce", "L1 1: apgd-ce",
        ])  # fmt: skip
        self.assertEqual((one.robust, one.clean), (1 - 4 / N, 1))
        self.assertEqual((one.passes, one.seconds), (3, 3))
        self.assertEqual(one.flags, {"x": "1", "y (L2 1)": "2"})
        self.assertEqual(set(one.numbers), {e.numbers[0] for e in three})
        self.assertLen(one.commands, 3)

    def test_a_union_is_of_the_images_that_all_three_have(self):
        norms = ("l1", "l2", "linf")
        three = [made("a", [0], threats=((norm, 1.0),)) for norm in norms]
        three[1] = made("a", [5], n=100, threats=(("l2", 1.0),), passes=None)
        three[2] = made("a", [], by="clean", threats=(("linf", 1.0),))
        three[2] = three[2]._replace(
            verdicts=verdicts_of(["clean"] * 2 + [""] * (N - 2)),
            sha256=np.where(np.arange(N) == 7, "f" * 64, three[2].sha256),
        )
        union = entries.union(three)
        self.assertEqual(union.n, 99)  # image 7 is another one in one of them
        self.assertNotIn(7, union.verdicts.image_ids)
        self.assertEqual(union.verdicts.fooled_by[:2].tolist(), ["clean", "clean"])
        self.assertEqual((union.clean, union.robust), (97 / 99, 96 / 99))
        self.assertIsNone(union.passes)
        three[0] = three[0]._replace(sha256=np.full(N, "e" * 64))
        self.assertIsNone(entries.union(three))
