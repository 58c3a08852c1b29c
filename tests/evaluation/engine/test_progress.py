"""What an evaluation says of its own progress."""

import contextlib
import io
from unittest import mock

import numpy as np
from absl.testing import absltest, parameterized

from jaxrobust.evaluation.engine import evaluation_progress
from jaxrobust.evaluation.network import checks

MOST, STEP = 200, 2  # passes of an image that is never fooled, and of one step


class Attacked:
    """An attack on `slots` images at a time, of which `share` fall after a few steps."""

    def __init__(self, images: int, slots: int, share: float) -> None:
        rng = np.random.default_rng(0)
        falls = rng.random(images) < share
        self.needs = np.where(falls, STEP * rng.integers(1, 20, images), MOST).tolist()
        self.slots, self.fooled = slots, falls.tolist()

    def calls(self, meter: evaluation_progress.Decisions):
        """Yield the passes of each call of ten steps, while the meter hears of decided images."""
        waiting, at_work, standing = list(range(len(self.needs))), {}, len(self.needs)
        while waiting or at_work:
            while waiting and len(at_work) < self.slots:
                at_work[waiting.pop(0)] = 0
            passes = 0
            for image, done in list(at_work.items()):
                made = min(10 * STEP, self.needs[image] - done)
                passes, at_work[image] = passes + made, done + made
                if at_work[image] == self.needs[image]:
                    del at_work[image]
                    standing -= self.fooled[image]
                    meter.decided(standing, self.needs[image], fooled=self.fooled[image])
            yield passes


def meter_of(images: int) -> evaluation_progress.Decisions:
    return evaluation_progress.Decisions(images, interval=checks.binomial_interval, enabled=True)


class DecisionsTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.said = io.StringIO()
        self.enter_context(contextlib.redirect_stderr(self.said))

    @parameterized.product(slots=(8, 64, 512), share=(0.0, 0.4, 0.9))
    def test_what_is_left_sinks_from_the_bound_to_what_it_takes(self, slots, share):
        meter, attack = meter_of(500), Attacked(500, slots, share)
        meter.begin("apgd-ce", 500, 0, 500, slots)
        told, whole = [], sum(attack.needs)
        for passes in attack.calls(meter):
            meter.advance(passes, 1.0, False, MOST, 0)
            counts = meter._counts
            left = counts.left(slots=slots, most=MOST, later=0, standing=500)
            self.assertEqual(left.bound, counts.fooled == 0)
            told.append((counts.passes, left.attack))
        self.assertEqual(told[-1], (whole, 0))
        for passes, left in told:
            self.assertLess(passes + left, 500 * MOST + 1)
        # After half of them the sum is what it takes; where nine of ten fall, the few that do not
        # stand in the way of the others for a while, and it is too high.
        high = 1.5 if share == 0.9 else 1.1
        for passes, left in (row for row in told if row[0] > whole / 2):
            self.assertBetween((passes + left) / whole, 0.97, high)

    def test_lines_of_a_pipe(self):
        meter, attack, now = meter_of(1000), Attacked(1000, 8, 0.5), iter(range(0, 10**6, 4))
        with mock.patch("time.perf_counter", lambda: float(next(now))):
            meter.begin("apgd-ce", 1000, 0, 1000, 8)
            meter.advance(0, 3.0, True, MOST, 4500)
            for passes in attack.calls(meter):
                meter.advance(passes, 4.0, False, MOST, 4500)
        first, compiled, *lines = self.said.getvalue().splitlines()
        self.assertEqual(first, "apgd-ce: compiling (minutes for a large network)")
        self.assertEqual(compiled, "apgd-ce: compiled in 3.0 s")
        self.assertLen(set(lines), len(lines))
        self.assertGreater(len(lines), 50)
        self.assertBetween(max(map(len, lines)), 60, 79)
        self.assertRegex(lines[-1], r"^apgd-ce ETA \d+:\d\d:\d\d, .*\d+/1000 decided")

    def test_a_first_short_call_tells_no_pace(self):
        meter = meter_of(100)
        meter.begin("apgd-ce", 100, 0, 100, 8)
        meter.advance(16, 0.9, False, MOST, 0)  # 8 steps of a tiny network: overhead
        self.assertNotIn("ETA", self.said.getvalue())
        meter.advance(2000, 1.0, False, MOST, 0)
        self.assertIn(
            "apgd-ce ETA at most 0:08, 2,016 of at most 20,000 passes, 0/100 decided",
            self.said.getvalue(),
        )

    def test_nothing_compiles_where_all_images_are_decided(self):
        meter = meter_of(100)
        meter.begin("square", 46, 46, 46, 8)
        self.assertEqual(self.said.getvalue(), "square: 46 of 46 images are in the ledger\n")
        meter.begin("fab-t", 0, 0, 0, 8)
        self.assertNotIn("compiling", self.said.getvalue())


if __name__ == "__main__":
    absltest.main()
