"""What an accuracy takes by the law of others' runs."""

import contextlib
import io
import json
import sys
from unittest import mock

import jax
import numpy as np
from absl.testing import parameterized

from jaxrobust import models
from jaxrobust.commands import estimate
from jaxrobust.papers import law
from tools.generate import law_table


def optimum(flops, fid):
    """The law's lowest loss at so many FLOPs, by looking at 100,000 sizes."""
    params = np.logspace(5, 16, 100_001)
    return min(law.loss(params, flops / law.SCALE / params, fid=fid))


class LawTest(parameterized.TestCase):
    def test_limits_are_those_that_the_authors_print(self):
        """Of Scaling_law_fitting_and_plots.ipynb, at 1e30 FLOPs."""
        for fid, share in (
            (6.7908, 0.7531463613146835),
            (1.65, 0.8285778530148242),
            (0, 0.8863254780257899),
        ):
            with self.subTest(row=(fid, share)):
                self.assertAlmostEqual(law.accuracy(optimum(1e30, fid)) / 100, share, delta=1e-8)

    def test_parameters_are_those_that_the_authors_print(self):
        for depth, width, millions in (
            (58, 12, 122.22),
            (82, 12, 177.98),
            (82, 16, 316.36),
            (94, 16, 365.92),
        ):
            with self.subTest(row=(depth, width, millions)):
                self.assertAlmostEqual(law.parameters(depth, width) / 1e6, millions, delta=0.006)

    def test_parameters_are_those_of_the_network(self):
        net = models.create("dm_wrn_28_10", num_classes=10, image_size=32)
        params, _ = jax.eval_shape(net.init, jax.random.key(0))
        self.assertEqual(law.parameters(28, 10), sum(x.size for x in params.values()))

    def test_published_runs_are_near(self):
        mean, half = law.calibration()
        self.assertBetween(half, 0.5, 1.5)
        for run in law.PUBLISHED_RUNS:
            value = law.loss(law.parameters(run.depth, run.width), 1e6 * run.images, fid=run.fid)
            self.assertAlmostEqual(law.accuracy(value) + mean, run.robust, delta=half)

    def test_reaches_the_target_about_as_cheaply_as_can_be(self):
        for target in (60, 65, 70, 73, 78):
            with self.subTest(target=target):
                point = law.cheapest(target)
                mean, _ = law.calibration()
                value = law.loss(point.parameters, point.images)
                self.assertAlmostEqual(law.accuracy(value) + mean, target, delta=1e-6)
                self.assertEqual(point.parameters, law.parameters(point.depth, point.width))
                least = optimum(point.flops, law.FID)
                self.assertLessEqual(least, value)
                self.assertLess(law.accuracy(least) - law.accuracy(value), 0.02)  # points
                self.assertAlmostEqual(
                    point.flops, 7822 * point.parameters * point.images, delta=1e6
                )

    def test_the_page_has_the_table_of_today(self):
        """After a change: `python tools/generate/law_table.py`."""
        text = law_table.PAGE.read_text()
        self.assertEqual(law_table.page(text), text)
        self.assertIn(law_table.HEAD, text)

    def test_more_is_dearer(self):
        flops = [law.cheapest(target).flops for target in range(56, 83)]
        self.assertEqual(flops, sorted(flops))

    def test_depths_grow_with_the_network(self):
        depths = [law.nearest(millions * 1e6)[0] for millions in (9, 36, 75, 120, 250, 700)]
        self.assertEqual(depths, [28, 28, 34, 58, 70, 94])
        self.assertEqual(law.nearest(36_479_194), (28, 10))


class CommandTest(parameterized.TestCase):
    def run_on(self, *words, code=0):
        printed, said, ended = io.StringIO(), io.StringIO(), 0
        with (
            contextlib.redirect_stdout(printed),
            contextlib.redirect_stderr(said),
            mock.patch.object(sys, "argv", ["jaxrobust estimate", *words]),
        ):
            try:
                estimate.main()
            except SystemExit as stopped:
                ended = stopped.code
        self.assertEqual(ended, code, said.getvalue())
        return printed.getvalue() if not code else said.getvalue()

    def test_says_what_it_is(self):
        words = "--target 65 --dataset CIFAR-10 --on h100:8 --utilisation 0.4 --price 2 --json"
        printed = self.run_on(*words.split())
        about = json.loads(printed.splitlines()[-1])
        told = " ".join(printed.split())
        self.assertIn("This law is fitted to others' runs (Bartoldson et al. 2024, arXiv", told)
        self.assertIn("nothing was trained or measured here", told)
        self.assertIn("the 95% interval for a new run, given 7 published ones", told)
        self.assertIn("65% is outside the range of those runs, so the law is extrapolated", told)
        expected, least, most = (about[key] for key in ("expected", "least", "most"))
        self.assertLess(least["chip_hours"], expected["chip_hours"])
        self.assertLess(expected["chip_hours"], most["chip_hours"])
        self.assertAlmostEqual(
            expected["chip_hours"], expected["flops"] / (989e12 * 0.4 * 3600), delta=1e-9
        )
        self.assertAlmostEqual(expected["cost"], 2 * expected["chip_hours"])
        self.assertEqual(expected["epochs"], round(expected["images"] / 50_000))

    def test_a_data_set_is_of_a_target(self):
        said = self.run_on("quickstart", "--on", "cpu", "--dataset", "cifar10", code=2)
        self.assertIn(
            "--dataset is only for --target; a config names its data set, so leave --dataset out",
            said,
        )

    def test_help_of_both(self):
        for words, flag in ((["--help"], "--target"), (["--target", "65", "--help"], "--dataset")):
            self.assertIn(flag, self.run_on(*words))

    def test_near_its_end_no_length_is_enough(self):
        near = round(law.limit() - 0.9, 1)
        printed = self.run_on("--target", str(near))
        self.assertIn("unlimited", printed)

    def test_refuses(self):
        for words, message in (
            (
                "--target 85",
                "--target 85: the law of the published runs covers 55 to .*; choose a target",
            ),
            ("--target 40", "--target 40: the law of the published runs covers 55"),
            ("--target much", "--target=much is not a number"),
            (
                "--target 65 --dataset cifar100",
                "--dataset cifar100: the law of published runs only covers cifar10 under Linf 8",
            ),
            ("--target 65 --on cpu", "--on cpu: the law counts operations, .* for example, h100:8"),
            ("--target 65 --on v5q:4", "not a known device"),
            ("--target 65 --utilisation 2", "--utilisation=2.0 must be above 0 and at most 1"),
            ("--target 65 --price 0", "--price=0.0 must be above 0"),
            ("--target 65 quickstart", "quickstart is not a flag"),
        ):
            with self.subTest(row=(words, message)):
                self.assertRegex(" ".join(self.run_on(*words.split(), code=2).split()), message)
