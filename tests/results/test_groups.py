"""Comparing groups of seeds: the tests, what is said of them, and what is refused."""

import importlib.util
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from absl.testing import absltest, parameterized
from PIL import Image
from scipy import stats

from jaxrobust.commands import compare
from jaxrobust.evaluation.records import comparisons
from jaxrobust.evaluation.records.verdicts import Verdicts
from jaxrobust.results.comparison import group_tests, groups
from tests.support import command_calls
from tests.support.compared import N, attacks, found, write

PLOT = importlib.util.find_spec("matplotlib") is not None


class OverImagesTest(parameterized.TestCase):
    def test_all_choices_of_signs(self):
        """Of 12 images there are 4,096 choices: each is looked at."""
        for many, others in ((1, 1), (2, 1), (2, 3), (3, 3), (4, 6)):
            with self.subTest(row=(many, others)):
                draws = np.random.default_rng(many + others)
                for share in (0.4, 0.55, 0.9):
                    a, b = draws.random((many, 12)) < 0.5, draws.random((others, 12)) < share
                    own = b.mean(0) - a.mean(0)
                    signs = np.array(list(itertools.product((-1, 1), repeat=12)))
                    sums = np.abs(signs @ own)
                    expected = (sums >= abs(own.sum()) - 1e-9).mean()
                    over = group_tests.over_images(a, b)
                    self.assertAlmostEqual(over.p, expected, places=12)
                    self.assertAlmostEqual(over.difference, b.mean() - a.mean(), places=12)

    def test_one_network_a_side_is_mcnemars(self):
        a, b = found(1).robust, found(2, share=0.53).robust
        one = comparisons.compare(a, b)
        over = group_tests.over_images(a[None], b[None])
        self.assertAlmostEqual(over.p, one.p, places=12)
        self.assertAlmostEqual(over.difference, one.difference, places=12)

    def test_against_scipy(self):
        a = np.stack([found(at).robust for at in (1, 2, 3)])
        b = np.stack([found(at, share=0.506).robust for at in (4, 5)])
        own = b.mean(0) - a.mean(0)
        over = group_tests.over_images(a, b)
        drawn = stats.permutation_test(
            (own,), np.mean, permutation_type="samples", n_resamples=4_000, random_state=0
        )
        self.assertBetween(over.p, 0.02, 0.98)
        self.assertAlmostEqual(over.p, drawn.pvalue, delta=0.03)
        ends = stats.t.interval(0.95, N - 1, own.mean(), stats.sem(own))
        np.testing.assert_allclose((over.low, over.high), ends, rtol=1e-9)

    def test_groups_that_agree(self):
        a = found(1).robust[None]
        over = group_tests.over_images(np.concatenate([a, a]), a)
        self.assertEqual(over, group_tests.Over(0.0, 0.0, 0.0, 1.0))

    @pytest.mark.slow  # 4,000 simulated pairs of groups
    def test_false_alarms_and_coverage(self):
        """Of recipes whose networks differ by their draws alone, and on few images or many."""
        for seed, apart in ((0, 0.02), (1, 0.1)):
            draws = np.random.default_rng(seed)
            alarms = covered = 0
            for _ in range(2000):
                base = draws.random(500) < 0.5
                flips = draws.random((5, 500)) < apart
                right = base ^ flips
                over = group_tests.over_images(right[:2], right[2:])
                alarms += over.p < 0.05
                covered += over.low <= 0 <= over.high
            self.assertLessEqual(alarms / 2000, 0.06)
            self.assertBetween(covered / 2000, 0.93, 0.97)


class OverSeedsTest(absltest.TestCase):
    def test_against_scipy(self):
        draws = np.random.default_rng(0)
        for many, others in ((2, 2), (3, 5), (10, 2)):
            a, b = draws.normal(0.5, 0.01, many), draws.normal(0.51, 0.03, others)
            over = group_tests.over_seeds(a, b)
            welch = stats.ttest_ind(b, a, equal_var=False)
            ends = welch.confidence_interval(0.95)
            np.testing.assert_allclose(over.p, welch.pvalue, rtol=1e-9)
            np.testing.assert_allclose((over.low, over.high), (ends.low, ends.high), rtol=1e-9)
            self.assertAlmostEqual(over.difference, b.mean() - a.mean())

    def test_nothing_is_known_of_one_network_or_of_equal_ones(self):
        one, two = np.array([0.5]), np.array([0.4, 0.6])
        self.assertIsNone(group_tests.over_seeds(one, two))
        self.assertIsNone(group_tests.over_seeds(two, one))
        self.assertIsNone(group_tests.over_seeds(np.array([0.5, 0.5]), np.array([0.4, 0.4])))
        self.assertIsNotNone(group_tests.over_seeds(np.array([0.5, 0.5]), two))


class Folders(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.folder = Path(self.create_tempdir())

    def write(self, name: str, at: int, share: float = 0.5, **changes) -> Path:
        own = {"weights_sha256": f"{at:064}"} | changes
        return write(self.folder / name, found(at, share=share), **own)

    def compared(self, *words) -> tuple[dict, str]:
        code, said, error = command_calls.words(compare.main, *words, "--json")
        self.assertEqual(code, 0, error)
        text, _, last = said.rstrip("\n").rpartition("\n")
        return json.loads(last), text

    def refused(self, *words) -> str:
        """Return the one sentence of a mistake, which leaves nothing behind."""
        out = self.folder / "out"
        code, said, error = command_calls.words(compare.main, *words, "--out", out)
        self.assertEqual((code, said, error.count("\n")), (2, "", 1), error)
        self.assertFalse(out.exists())
        return error


class GroupsTest(Folders):
    def test_two_groups(self):
        shares = {1: 0.5, 2: 0.52, 3: 0.58, 4: 0.57, 5: 0.61}
        places = [self.write(f"s{at}", at, share) for at, share in shares.items()]
        plain, text = self.compared(*places[:2], "against", *places[2:])
        seen = [found(at, share=share) for at, share in shares.items()]
        self.assertEqual([e["name"] for e in plain["evaluations"]], ["A1", "A2", "B1", "B2", "B3"])
        self.assertEqual([e["group"] for e in plain["evaluations"]], [*"AABBB"])
        for what in ("clean", "robust"):
            of = [float(getattr(v, what).mean()) for v in seen]
            own = plain[what]
            self.assertEqual(own["groups"]["A"]["each"], of[:2])
            self.assertAlmostEqual(own["groups"]["B"]["mean"], np.mean(of[2:]))
            self.assertAlmostEqual(own["groups"]["B"]["spread"], np.std(of[2:], ddof=1))
            welch = stats.ttest_ind(of[2:], of[:2], equal_var=False)
            self.assertAlmostEqual(own["over_seeds"]["p"], welch.pvalue)
            self.assertAlmostEqual(
                own["over_images"]["difference"], np.mean(of[2:]) - np.mean(of[:2])
            )
        mean = 100 * np.mean([v.robust.mean() for v in seen[2:]])
        for said in (
            "# A (2 networks) against B (3 networks), over images and seeds",
            "- **These networks: the robust accuracy of B is higher than that of A.** A has",
            f"B {mean:.2f}% over 3 networks: ",
            "exact sign-flip test p < 0.0001.",
            "Welch's 95% interval ",
            "; spread (standard deviation) A ",
            "## Means and differences",
        ):
            self.assertIn(said, text)

    def test_one_a_side_is_todays_comparison(self):
        a, b = self.write("a", 1), self.write("b", 2)
        self.assertEqual(self.compared(a, "against", b), self.compared(a, b))

    def test_seeds_scatter_more_than_groups_differ(self):
        """On these networks B is better; of networks trained so one cannot say it."""
        places = [self.write(f"s{at}", at, s) for at, s in enumerate((0.4, 0.56, 0.42, 0.6))]
        _, text = self.compared(*places[:2], "against", *places[2:])
        self.assertIn("**These networks: the robust accuracy of B is higher than that of A", text)
        self.assertIn(
            "**Networks trained like these: A and B cannot be told apart in robust accur", text
        )

    def test_what_is_said_beside(self):
        other = {"model": {"name": "vit_s", "image_size": 32}, "seed": 5}
        places = [self.write("a", 1), self.write("b", 2, **other), self.write("c", 3)]
        _, text = self.compared(*places[:2], "against", places[2])
        self.assertIn("- A has networks of several architectures: resnet18, vit_s.", text)
        self.assertIn("The attacks used different random seeds: A1 0, A2 5, B1 0.", text)

    def test_replayed_images_are_left_out(self):
        seen = found(1)
        fooled = seen.fooled_by.astype(object)
        fooled[np.flatnonzero(seen.robust)[:9]] = "replay"
        places = [self.write("b", 2), self.write("c", 3)]
        replayed: Verdicts = seen._replace(fooled_by=fooled.astype(str))
        places.append(write(self.folder / "a", replayed, "r"))
        plain, text = self.compared(places[2], places[0], "against", places[1])
        self.assertEqual(plain["images"], N - 9)
        self.assertIn("(A1 9, A2 0, B1 0)", text)

    @absltest.skipUnless(PLOT, "needs matplotlib: pip install -e '.[plot]'")
    def test_files(self):
        places = [self.write(f"s{at}", at, 0.5 + at / 50) for at in range(4)]
        out = self.folder / "out"
        words = (*places[:2], "against", *places[2:], "--out", out)
        code, said, error = command_calls.words(compare.main, *words)
        self.assertEqual((code, error), (0, ""))
        names = sorted(path.name for path in out.iterdir())
        self.assertEqual(names, [f"comparison.{kind}" for kind in ("json", "md", "png")])
        text = (out / "comparison.md").read_text()
        self.assertEqual(text.replace("![Groups](comparison.png)\n\n", ""), said)
        with Image.open(out / "comparison.png") as image:
            self.assertGreater(image.width, 1000)
        for other in ((*places[:1], "against", *places[1:]), places):
            code, _, error = command_calls.words(compare.main, *other, "--out", out)
            self.assertEqual(code, 2)
            self.assertIn("comparison.json compares different evaluations; name another", error)


class RefusedTest(Folders):
    def test_a_network_twice(self):
        a, b, c = (self.write(name, at) for at, name in enumerate("abc"))
        said = f"{a} is the same evaluation as {a}; name two different ones"
        self.assertIn(said, self.refused(a, b, "against", c, a))
        copy = self.write("copy", 1)
        said = f"{copy} has the same weights as {b}, but each network counts only once; name anot"
        for words in ((a, b, "against", c, copy), (b, copy, "against", a, c)):
            self.assertIn(said, self.refused(*words))

    def test_sides(self):
        a, b = self.write("a", 1), self.write("b", 2)
        said = "a side of against is empty; name one or more evaluations before it and after it"
        self.assertIn(said, self.refused(a, b, "against"))
        self.assertIn(said, self.refused("against", a, b))
        said = "against appears 2 times; write it once, between two groups, and a folder of that"
        self.assertIn(said, self.refused(a, "against", b, "against", a))

    def test_other_questions(self):
        a, b = self.write("a", 1), self.write("b", 2)
        c = self.write("c", 3, attacks=attacks(epsilon=4 / 255))
        error = self.refused(a, b, "against", c)
        self.assertIn('radius is "0.0313725" there, "0.0156863" here', error)

    def test_one_image(self):
        seen = [found(at, n=1) for at in range(3)]
        places = [write(self.folder / f"{at}", own, f"e{at}") for at, own in enumerate(seen)]
        said = "one image is not enough to compare groups; evaluate more images"
        self.assertIn(said, self.refused(*places[:2], "against", places[2]))


class SentencesTest(absltest.TestCase):
    def test_an_interval_beside_a_stricter_test(self):
        over = group_tests.Over(0.01, 0.001, 0.02, 0.06)
        one = groups.GroupDifference(np.array([0.5, 0.6]), np.array([0.6, 0.5]), over, None)
        first, second = groups.sentences(one, "robust accuracy", 100)
        self.assertIn("barely excludes 0", first)
        self.assertIn("cannot be told apart", first)
        self.assertIn("nothing is known", second)

    def test_who_is_higher(self):
        for sign, winner in ((1, "B"), (-1, "A")):
            over = group_tests.Over(0.1 * sign, 0.05 * sign, 0.15 * sign, 0.001)
            own = np.array([0.5, 0.6])
            one = groups.GroupDifference(own, own, over, over)
            for said in groups.sentences(one, "clean accuracy", 100):
                self.assertIn(f"the clean accuracy of {winner} is higher than that of ", said)
