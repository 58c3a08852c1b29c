"""Sequences that may be looked at after every image: exact on small sets, simulated on large ones.

Where all orders of a small set are walked through, the errors are computed, not sampled.
"""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from absl.testing import parameterized
from scipy import integrate, stats

from jaxrobust.evaluation.network import checks
from jaxrobust.evaluation.records import sequences
from tests.support import sweeps

ALPHA = 0.05
ENOUGH = math.log(1 / ALPHA)
IMAGES = 5000


def pairs(discordant: float, ahead: float, times: int, seed: int = 0) -> np.ndarray:
    """Differences of two verdicts on 5,000 images in random orders, i8[times, 5000]."""
    counts = [round(IMAGES * (discordant + sign * ahead) / 2) for sign in (1, -1)]
    values = np.zeros(IMAGES, np.int8)
    values[: counts[0]], values[counts[0] : sum(counts)] = 1, -1
    return np.random.default_rng(seed).permuted(np.tile(values, (times, 1)), axis=1)


def first(hits: np.ndarray) -> np.ndarray:
    """After how many images a sequence decides, i[times]; one more than all: never."""
    return np.where(hits.any(axis=1), hits.argmax(axis=1) + 1, hits.shape[1] + 1)


def decided(differences: np.ndarray) -> np.ndarray:
    gained, lost = (np.cumsum(differences == sign, axis=1) for sign in (1, -1))
    return first(sequences.evidence(gained, lost) >= ENOUGH)


def tied(differences: np.ndarray, tie: float) -> np.ndarray:
    """After how many images a tie is established, of a few sequences at a time."""
    found, total = [], round(IMAGES * tie)
    for part in np.array_split(differences, max(len(differences) // 100, 1)):
        below = sequences.difference_evidence(part, total, IMAGES, ALPHA, tie)[1]
        above = sequences.difference_evidence(part, -total, IMAGES, ALPHA, tie)[0]
        found.append(first(np.minimum(below, above) >= math.log(2 / ALPHA)))
    return np.concatenate(found)


def missed(right: int, times: int, width: float | None, seed: int = 0) -> float:
    """The share of orders in which the interval of an accuracy lacks the true one at some look."""
    values, looks = np.arange(IMAGES) < right, np.array(sequences.lots(IMAGES))
    orders = np.random.default_rng(seed).permuted(np.tile(values, (times, 1)), axis=1)
    count = orders.cumsum(axis=1)[:, looks - 1]
    against = sequences.accuracy_evidence(count, looks[None], right, IMAGES, ALPHA, width)
    return float((against >= ENOUGH).any(axis=1).mean())


def chance_to_miss(right: int, of: int, width: float | None) -> float:
    """The same after every image, computed from all orders: how likely each count is, step by step.

    `counts[k]` is the probability of k right images so far in an order that has missed nothing.
    """
    counts, chance = np.eye(1, right + 1)[0], 0.0
    known = np.arange(right + 1.0)
    for seen in range(1, of + 1):
        next_right = (right - known) / (of - seen + 1)
        counts, grown = counts * (1 - next_right), counts * next_right
        counts[1:] += grown[:-1]
        there = (known <= seen) & (seen - known <= of - right)
        about = (known[there], np.array(float(seen)), right, of, ALPHA, width)
        out = np.flatnonzero(there)[sequences.accuracy_evidence(*about) >= ENOUGH]
        chance += counts[out].sum()
        counts[out] = 0
    return chance


class OrderTest(parameterized.TestCase):
    def test_all_images_once_by_seed_and_id_alone(self):
        ids = np.arange(1000)
        order = sequences.order(3, ids)
        self.assertEqual(sorted(order.tolist()), ids.tolist())
        self.assertLess(abs(np.corrcoef(order, ids)[0, 1]), 0.1)
        self.assertNotEqual(order.tolist(), sequences.order(4, ids).tolist())
        half = ids[::2]
        in_whole = [i for i in order.tolist() if i % 2 == 0]
        self.assertEqual(half[sequences.order(3, half)].tolist(), in_whole)

    def test_an_order_stays_what_it_is(self):
        # Ledgers of stopped evaluations and records name it by its seed alone.
        self.assertEqual(sequences.order(0, range(8)).tolist(), [2, 3, 1, 6, 5, 7, 0, 4])

    @sweeps.rows(0, 1, 59, 60, 61, 999, 5000)
    def test_lots_end_with_the_images(self, of):
        ends = sequences.lots(of)
        self.assertEqual(ends, sorted(set(ends)))
        self.assertEqual(ends[-1:], [of] if of else [])
        for before, end in itertools.pairwise([0, *ends]):
            self.assertLessEqual(end - before, max(60, before / 16))


class PairedTest(parameterized.TestCase):
    @sweeps.rows((0, 0), (3, 0), (0, 7), (12, 5), (40, 41))
    def test_is_the_mixture_of_likelihood_ratios(self, gained, lost):
        def ratio(p):
            coin = 0.5 ** (gained + lost)
            return p**gained * (1 - p) ** lost / coin * stats.beta(2, 2).pdf(p)

        expected = integrate.quad(ratio, 0, 1)[0]
        found = sequences.evidence(np.array(gained), np.array(lost))
        self.assertAlmostEqual(math.exp(found), expected, places=8)

    @sweeps.rows((6, 0.05), (8, 0.2), (10, 0.3))
    def test_false_alarms_over_all_orders(self, each, alpha):
        """Of as many images that the one gains as the other: a share of `alpha` at most."""
        paths, alarms = Counter({(0, 0): 1}), 0
        for left in range(2 * each, 0, -1):
            grown: Counter = Counter()
            for (gained, lost), count in paths.items():
                for to in ((gained + 1, lost), (gained, lost + 1)):
                    if max(to) > each:
                        continue
                    if sequences.evidence(*map(np.array, to)) >= math.log(1 / alpha):
                        # Whatever comes after it, this order is an alarm.
                        alarms += count * math.comb(left - 1, each - to[0])
                    else:
                        grown[to] += count
            paths = grown
        share = alarms / math.comb(2 * each, each)
        self.assertLessEqual(share, alpha)
        if alpha > 0.1:
            self.assertGreater(share, 0)

    def test_false_alarms_and_when_it_decides(self):
        never = IMAGES + 1
        alarms = np.mean(decided(pairs(0.1, 0, 200)) < never)
        self.assertLessEqual(alarms, ALPHA)
        self.assertLess(np.median(decided(pairs(0.1, 0.03, 200))), 950)
        self.assertLess(np.median(decided(pairs(0.1, 0.05, 200))), 330)


class AccuracyTest(parameterized.TestCase):
    @sweeps.rows(*itertools.product((0, 1, 4, 7, 12), (None, 0.3)))
    def test_mean_and_misses_over_all_orders(self, total, width):
        """E-values of the true total have a mean of at most 1, and seldom reach 1 / alpha."""
        of, alpha = 12, 0.25
        orders = itertools.product((0, 1), repeat=of)
        right = np.array([each for each in orders if sum(each) == total])
        count, seen = right.cumsum(axis=1), np.arange(1, of + 1)[None]
        found = sequences.accuracy_evidence(count, seen, total, of, alpha, width)
        self.assertTrue((np.exp(found).mean(axis=0) <= 1 + 1e-9).all())
        misses = (found >= math.log(1 / alpha)).any(axis=1).mean()
        self.assertLessEqual(misses, alpha)

    @sweeps.rows(0, 1, 17, 40)
    def test_after_all_images_it_is_what_was_counted(self, right):
        self.assertEqual(sequences.accuracy_bounds(right, 40, 40, ALPHA), (right / 40, right / 40))

    def test_before_any_image_it_is_everything(self):
        self.assertEqual(sequences.accuracy_bounds(0, 0, 40, ALPHA), (0, 1))
        self.assertEqual(sequences.accuracy_bounds(0, 0, 0, ALPHA), (0, 1))

    @sweeps.rows(0.01, 0.05, 0.2, 0.5, 0.7, 0.95)
    def test_width_at_a_thousand_images(self, share):
        right = round(1000 * share)
        low, high = sequences.accuracy_bounds(right, 1000, IMAGES, ALPHA)
        fixed = np.subtract(*checks.binomial_interval(right, 1000)[::-1])
        self.assertBetween((high - low) / fixed, 1.0, 1.35)
        self.assertBetween(share, low, high)

    def test_an_aimed_width_is_reached_earlier(self):
        def reached(width):
            for seen in sequences.lots(IMAGES):
                low, high = sequences.accuracy_bounds(seen // 2, seen, IMAGES, ALPHA, width)
                if high - low < 0.03:
                    return seen
            return IMAGES + 1

        self.assertLess(reached(0.03), reached(None))

    @sweeps.rows((0.01, None), (0.5, 0.1))
    def test_coverage_over_all_orders(self, share, width):
        chance = chance_to_miss(round(400 * share), 400, width)
        self.assertBetween(chance, 0.005, ALPHA)

    def test_coverage_at_looks(self):
        self.assertLessEqual(missed(2000, 500, None), ALPHA)


class DifferenceTest(parameterized.TestCase):
    @sweeps.rows(*itertools.product(((2, 2), (4, 1), (0, 5)), (None, 0.3)))
    def test_mean_and_misses_over_all_orders(self, counts, tie):
        of, alpha, (gained, lost) = 7, 0.3, counts
        values = [1] * gained + [-1] * lost + [0] * (of - gained - lost)
        orders = np.array(sorted(set(itertools.permutations(values))), np.int8)
        sides = sequences.difference_evidence(orders, gained - lost, of, alpha, tie)
        for found in sides:
            self.assertTrue((np.exp(found).mean(axis=0) <= 1 + 1e-9).all())
        misses = (np.maximum(*sides) >= math.log(2 / alpha)).any(axis=1).mean()
        self.assertLessEqual(misses, alpha)

    def test_after_all_images_it_is_what_was_counted(self):
        values = np.array([1, 0, 0, -1, 1, 0, 1, 0], np.int8)
        self.assertEqual(sequences.difference_bounds(values, 8, ALPHA), (0.25, 0.25))
        self.assertEqual(sequences.difference_bounds(values[:0], 8, ALPHA), (-1, 1))

    def test_what_the_other_images_cannot_make_up_for_is_out(self):
        low, high = sequences.difference_bounds(np.ones(6, np.int8), 8, 1e-9)
        self.assertEqual((low, high), (0.5, 1))

    def test_bounds_hold_what_was_found_and_shrink(self):
        values = pairs(0.1, 0.03, 1)[0]
        widths = []
        for seen in (200, 1000, 3000):
            low, high = sequences.difference_bounds(values[:seen], IMAGES, ALPHA)
            self.assertBetween(values[:seen].mean(), low, high)
            widths.append(high - low)
        self.assertEqual(widths, sorted(widths, reverse=True))
        low, high = sequences.difference_bounds(values[:3000], IMAGES, ALPHA)
        self.assertGreater(low, 0)  # of a difference of 3 points
        more, less = sequences.difference_evidence(values[:3000], 0, IMAGES, ALPHA)
        self.assertGreater(more[-1], ENOUGH)
        self.assertLess(less[-1], 0)

    def test_ties(self):
        never = IMAGES + 1
        self.assertLess(np.median(tied(pairs(0.1, 0, 40), 0.02)), 2200)
        self.assertLessEqual(np.mean(tied(pairs(0.1, 0.02, 100), 0.02) < never), ALPHA)


@pytest.mark.slow
class SimulationTest(parameterized.TestCase):
    """The bars of a stop: 2,000 pairs of networks on 5,000 images in each setting."""

    @sweeps.rows((0.01, 0.01), *itertools.product((0.05, 0.1, 0.3), (0.01, 0.02)))
    def test_false_ties(self, discordant, tie):
        """Of networks that just do not tie."""
        false = np.mean(tied(pairs(discordant, tie, 2000, seed=3), tie) <= IMAGES)
        self.assertLessEqual(false, ALPHA)
