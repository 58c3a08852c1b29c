"""Paired comparison: against SciPy, statsmodels' and R's values, and whether intervals cover."""

import numpy as np
from absl.testing import absltest, parameterized
from scipy import optimize, stats

from jaxrobust.evaluation.records import comparisons
from tests.support import sweeps

_TIMES = 2000


def verdicts(n: int, of: tuple[float, float, float], seed: int) -> list[np.ndarray]:
    """Two networks on n images, many times over: bool[_TIMES * n] each, with their groups.

    `of`: the probabilities that only the second, only the first and both are right.
    """
    drawn = np.random.default_rng(seed).random(_TIMES * n)
    second, first, both = np.cumsum(of)
    gained, lost = drawn < second, (second <= drawn) & (drawn < first)
    agreed = (first <= drawn) & (drawn < both)
    return [lost | agreed, gained | agreed, np.repeat(np.arange(_TIMES), n)]


class TestOfTwo(parameterized.TestCase):
    @sweeps.rows((0, 0), (0, 1), (6, 16), (16, 6), (9, 9), (480, 515), (0, 80))
    def test_mcnemar_is_the_exact_binomial_test(self, gained, lost):
        found = comparisons.mcnemar(np.array([gained]), np.array([lost]))[0]
        both = gained + lost
        expected = stats.binomtest(gained, both).pvalue if both else 1.0
        self.assertAlmostEqual(found, expected, places=12)

    def test_mcnemar_as_printed_elsewhere(self):
        # R's contingencytables 3.0 of Cavo et al. 2012, and statsmodels 0.15.
        found = comparisons.mcnemar(np.array([6, 480]), np.array([16, 515]))
        np.testing.assert_allclose(found, [0.052479, 0.28108420568839], atol=5e-7)

    @sweeps.rows((3, 0), (40, 1), (1000, 2))
    def test_paired_t(self, n, seed):
        one, other = np.random.default_rng(seed).integers(0, 71, (2, n)) / 70
        expected = stats.ttest_rel(one, other).pvalue
        self.assertAlmostEqual(comparisons.paired_t(one - other), expected, delta=1e-12)
        self.assertAlmostEqual(
            comparisons.paired_t(one - other + 0.2),
            stats.ttest_1samp(one - other + 0.2, 0).pvalue,
            delta=1e-12,
        )

    def test_paired_t_of_equal_networks_and_of_one_that_is_better_everywhere(self):
        self.assertEqual(comparisons.paired_t(np.zeros(9)), 1.0)
        self.assertEqual(comparisons.paired_t(np.ones(1)), 1.0)
        self.assertEqual(comparisons.paired_t(np.full(9, 0.25)), 0.0)

    def test_holm(self):
        # statsmodels 0.15, multipletests(p, method="holm")
        given = np.array([0.01, 0.04, 0.03, 0.005, 0.2, 1.0])
        expected = [0.05, 0.12, 0.12, 0.03, 0.4, 1.0]
        np.testing.assert_allclose(comparisons.holm(given), expected, rtol=1e-12)
        np.testing.assert_allclose(comparisons.holm(np.array([0.6, 0.5, 0.01])), [1.0, 1.0, 0.03])
        self.assertEqual(comparisons.holm(np.array([0.3])), [0.3])
        self.assertEqual(comparisons.holm(np.zeros(0)).shape, (0,))


class IntervalTest(parameterized.TestCase):
    @sweeps.rows(
        (6, 16, 161, 0.95, -0.1240, -0.0054),  # R's contingencytables 3.0, of Cavo et al. 2012
        (28, 25, 618, 0.90, -0.0148, 0.0247),  # R's PropCIs, as two repositories print it
    )
    def test_as_printed_elsewhere(self, gained, lost, n, level, low, high):
        found = comparisons.difference_interval(*(np.array([k]) for k in (gained, lost, n)), level)
        np.testing.assert_allclose(np.ravel(found), [low, high], atol=5e-5)  # printed digits

    @sweeps.rows((6, 16, 161), (3, 0, 40), (0, 9, 500), (60, 60, 200), (1, 2, 10))
    def test_inverts_the_score_test(self, gained, lost, n):
        """By another way: the likelihood is maximised under each supposed difference."""

        def score(difference: float) -> float:
            def unlikely(q: float) -> float:
                p, agree = q + difference, 1 - 2 * q - difference
                terms = ((gained, p), (lost, q), (n - gained - lost, agree))
                return -sum(k * np.log(v) for k, v in terms if k)

            ends = max(0, -difference) + 1e-12, (1 - difference) / 2 - 1e-12
            q = optimize.minimize_scalar(
                unlikely, bounds=ends, method="bounded", options={"xatol": 1e-13}
            ).x
            variance = (2 * q + difference - difference**2) / n
            return ((gained - lost) / n - difference) / np.sqrt(variance)

        found, z = (gained - lost) / n, stats.norm.ppf(0.975)
        low = optimize.brentq(lambda d: score(d) - z, -0.99, found)
        high = optimize.brentq(lambda d: score(d) + z, found, 0.99)
        ours = comparisons.difference_interval(*(np.array([k]) for k in (gained, lost, n)))
        np.testing.assert_allclose(np.ravel(ours), [low, high], atol=2e-6)  # of the maximiser

    def test_edges(self):
        gained, lost = np.array([0, 10, 0, 4]), np.array([0, 0, 10, 1])
        low, high = comparisons.difference_interval(gained, lost, np.full(4, 10))
        z2 = stats.norm.ppf(0.975) ** 2
        self.assertAlmostEqual(high[0], z2 / (10 + z2))  # closed form where nothing differs
        np.testing.assert_allclose(low[[0, 2]], [-high[0], -1])
        np.testing.assert_allclose([high[1], low[1]], [1, -high[2]])
        self.assertTrue(
            (low <= (gained - lost) / 10).all() and (high >= (gained - lost) / 10).all()
        )

    @parameterized.parameters(
        # n, and the probabilities that only the second, only the first and both are right
        (2000, (0.057, 0.050, 0.44)),  # 49.0 and 49.7%
        (128, (0.08, 0.08, 0.50)),
    )
    def test_covers_the_difference_as_often_as_it_says(self, n, of):
        found = comparisons.compare_groups(*verdicts(n, of, seed=n))[1]
        true = of[0] - of[1]
        covered = ((found.low <= true) & (true <= found.high)).mean()
        self.assertBetween(covered, 0.93, 0.97)
        self.assertBetween(found.difference.mean(), true - 0.005, true + 0.005)

    def test_the_test_errs_in_five_percent_at_most(self):
        found = comparisons.compare_groups(*verdicts(300, (0.1, 0.1, 0.4), seed=0))[1]
        self.assertLess((found.p < 0.05).mean(), 0.065)  # 0.05 and three standard errors of 2,000

    def test_refuses(self):
        one, two = np.array([1]), np.array([2])
        with self.assertRaisesRegex(ValueError, r"gained \+ lost <= n and n > 0"):
            comparisons.difference_interval(one, two, two)
        for level in (95, 0.0, 1.0):
            with self.assertRaisesRegex(ValueError, "is not a probability; .*95% is 0.95"):
                comparisons.difference_interval(one, one, two, level)


class CompareTest(absltest.TestCase):
    def test_images_needed_have_the_power(self):
        drawn = np.array([True] * 20), np.array([True] * 12 + [False] * 8)
        few = comparisons.compare(
            *(np.concatenate([v, ~w, [True] * 160]) for v, w in (drawn, drawn[::-1]))
        )
        needed = comparisons.images_needed(few)
        assert needed is not None
        of = few.gained / few.n, few.lost / few.n, 0.5
        found = comparisons.compare_groups(*verdicts(needed, of, seed=1))[1]
        # The exact test is somewhat weaker than the one of the formula.
        self.assertBetween((found.p < 0.05).mean(), 0.74, 0.83)
        same = comparisons.compare(np.array([True, False]), np.array([False, True]))
        self.assertIsNone(comparisons.images_needed(same))

    def test_images_needed_by_hand(self):
        """35 of 100 differ, by 25: ((1.95996 sqrt(.35) + .84162 sqrt(.35 - .0625)) / .25) ^ 2."""
        first = np.array([False] * 30 + [True] * 5 + [True] * 65)
        second = np.array([True] * 30 + [False] * 5 + [True] * 65)
        self.assertEqual(
            comparisons.images_needed(comparisons.compare(first, second)), 42
        )  # from 41.5

    def test_counts(self):
        first = np.array([True, True, False, False, True, False])
        second = np.array([True, False, True, True, True, True])
        found = comparisons.compare(first, second)
        self.assertEqual(found[:5], (6, 3, 5, 3, 1))
        self.assertAlmostEqual(found.difference, 1 / 3)
        self.assertEqual(found.p, 0.625)  # 2 (1 + 4) / 2^4
        self.assertIsInstance(found.n, int)

    def test_groups_are_what_each_is_alone(self):
        rng = np.random.default_rng(0)
        first, second = rng.random((2, 400)) < 0.5
        groups = rng.integers(0, 7, 400) * 3
        names, found = comparisons.compare_groups(first, second, groups)
        self.assertEqual(names.tolist(), list(range(0, 21, 3)))
        for index, name in enumerate(names):
            alone = comparisons.compare(first[groups == name], second[groups == name])
            np.testing.assert_allclose([column[index] for column in found], alone)

    def test_an_empty_group_is_none(self):
        first, second = np.array([True, False, True]), np.array([True, True, False])
        names, found = comparisons.compare_groups(first, second, np.array([7, 3, 7]))
        self.assertEqual(names.tolist(), [3, 7])
        self.assertEqual((found.n.tolist(), found.first.tolist()), ([1, 2], [0, 2]))
        self.assertEqual((found.gained.tolist(), found.lost.tolist()), ([1, 0], [0, 1]))
