"""The bound of what a sample did not show: it is exact, holds, and says so in a record."""

import numpy as np
from absl.testing import absltest, parameterized
from scipy import stats

from jaxrobust.evaluation.records import stopping
from jaxrobust.evaluation.records.verdicts import Verdicts
from jaxrobust.report import gathered
from jaxrobust.results.comparison import evaluations
from tests.support import sweeps


class BoundTest(parameterized.TestCase):
    @sweeps.rows(
        (0, 5, 20), (1, 5, 20), (3, 10, 10), (0, 30, 1000), (2, 40, 200), (0, 0, 7), (4, 9, 17)
    )
    def test_is_the_largest_count_that_is_not_refuted(self, fooled, sampled, of):
        for level in (0.95, 0.8):
            bound = stopping.most_fooled(fooled, sampled, of, level)
            possible = range(fooled, of - sampled + fooled + 1)
            left = [m for m in possible if stats.hypergeom.cdf(fooled, of, m, sampled) > 1 - level]
            self.assertEqual(bound, max(left))

    @sweeps.rows((60, 12), (200, 25))
    def test_holds_for_every_true_number(self, of, sampled):
        """By the distribution itself, not by draws: coverage is at least 95% everywhere."""
        counts = np.arange(sampled + 1)
        bounds = np.array([stopping.most_fooled(int(k), sampled, of) for k in counts])
        covered = [
            stats.hypergeom.pmf(counts[bounds >= true], of, true, sampled).sum()
            for true in range(of + 1)
        ]
        self.assertGreaterEqual(min(covered), 0.95 - 1e-9)
        self.assertLess(min(covered), 0.97)  # no more than it must

    def test_a_sample_of_all_leaves_nothing_unknown(self):
        found = stopping.fast_sample(100, 40, 40, [3, 7])
        self.assertEqual((found["at_most"], found["robust_at_least"]), (0, 0.38))
        none = stopping.fast_sample(0, 0, 0, [])
        self.assertEqual((none["at_most"], none["robust_at_least"]), (0, 0.0))

    @sweeps.rows((3, 2, 5), (0, 6, 5), (-1, 2, 5))
    def test_counts_that_cannot_be_meant(self, fooled, sampled, of):
        with self.assertRaisesRegex(ValueError, "pass ascending counts"):
            stopping.most_fooled(fooled, sampled, of)

    def test_a_level_that_is_none(self):
        with self.assertRaisesRegex(ValueError, "level=1 is not a probability; 95% is 0.95"):
            stopping.most_fooled(0, 1, 2, 1.0)


class SampleTest(absltest.TestCase):
    def test_is_of_the_seed_and_the_ids(self):
        ids, standing = np.arange(50, 150), np.ones(100, bool)
        one = stopping.draw_survivors(4, ids, standing, 20)
        order = np.random.default_rng(0).permutation(100)
        np.testing.assert_array_equal(
            stopping.draw_survivors(4, ids[order], standing, 20), one[order]
        )
        self.assertGreater((one != stopping.draw_survivors(5, ids, standing, 20)).sum(), 0)
        more = stopping.draw_survivors(4, ids, standing, 40)
        self.assertTrue((one <= more).all())


class RecordTest(parameterized.TestCase):
    FOUND = stopping.fast_sample(200, 90, 12, [17])

    def test_line(self):
        text = stopping.fast_line(self.FOUND)
        at_most, least = self.FOUND["at_most"], self.FOUND["robust_at_least"]
        self.assertIn("run on 12 of 90 survivors, chosen at random", text)
        self.assertIn(f"at most {at_most} of the others would be fooled too", text)
        self.assertAlmostEqual(least, (89 - at_most) / 200)
        self.assertIn(f"robust accuracy is at least {100 * least:.2f}%", text)
        self.assertIn("not from AutoAttack", text)

    def test_verdicts_of_what_all_met(self):
        names = np.array(["", "square", "apgd-t", "clean"])
        own = Verdicts(
            *(np.array([1, 17, 3, 4]), np.zeros(4, int), names != "clean", names),
            *(np.array([0, 0.1, 0.2, 0]), np.array([-1, 3, 2, -1])),
        )
        seen = evaluations.met_by_all(self.FOUND, own)
        self.assertEqual(seen.fooled_by.tolist(), ["", "", "apgd-t", "clean"])
        self.assertEqual(seen.norms.tolist(), [0, 0, 0.2, 0])
        self.assertEqual(seen.reached.tolist(), [-1, -1, 2, -1])

    @sweeps.rows(
        {}, {"sampled": 91}, {"fooled": 2}, {"at_most": 79}, {"level": 2}, {"fallen": ["17"]},
        {"survivors": None}, {"robust_at_least": "half"}, {"fooled": True},
    )  # fmt: skip
    def test_what_a_page_may_draw(self, **change):
        self.assertEqual(gathered.is_sound(self.FOUND | change), not change)
