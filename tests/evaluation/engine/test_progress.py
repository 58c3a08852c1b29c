"""What an evaluation says of its own progress."""

import contextlib
import io
from unittest import mock

import numpy as np
from absl.testing import parameterized

from jaxrobust.evaluation.engine import evaluation_progress
from jaxrobust.evaluation.network import checks
from jaxrobust.runtime.text import panel
from tests.support import sweeps

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


PLANNED = {"attacks": "apgd-ce now, fab-t, square,"}
BOUND = {"robust": "at most 100.0% (96.4% to 100.0%)"}


def rows_of(shown: mock.Mock) -> tuple[dict[str, str], float, float]:
    """What a panel was told last: its rows by their labels, what is done and of how much."""
    rows, done, total = shown.show.call_args.args
    return {row.label: " ".join(part.text for part in row.parts) for row in rows}, done, total


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
            left, _ = counts.passes_left(slots=slots, most=MOST, later=0, standing=500)
            told.append((counts.passes, left))
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
        self.assertEqual(first, "apgd-ce: compiling (seconds to minutes)")
        self.assertEqual(compiled, "apgd-ce: compiled in 3.0 s")
        self.assertLen(set(lines), len(lines))
        self.assertGreater(len(lines), 50)
        self.assertBetween(max(map(len, lines)), 60, 79)
        self.assertRegex(lines[-1], r"^apgd-ce ETA \d+:\d\d:\d\d, .*\d+/1000 decided")

    def test_a_terminal_has_one_panel_and_no_lines(self):
        shown = mock.create_autospec(panel.LivePanel, instance=True)
        with (
            mock.patch.object(evaluation_progress, "watched", return_value=True),
            mock.patch.object(panel, "watched", return_value=True),
            mock.patch.object(panel, "LivePanel", return_value=shown) as made,
            evaluation_progress.Decisions(
                100,
                interval=checks.binomial_interval,
                enabled=True,
                attacks=("apgd-ce", "fab-t", "square"),
            ) as meter,
        ):
            made.assert_called_once_with("AutoAttack", keep=False)
            meter.begin("apgd-ce", 100, 0, 100, 8)
            self.assertEqual(rows_of(shown), (PLANNED | BOUND, 0, 1))
            shown.waits.assert_called_once_with("compiling (seconds to minutes)")
            meter.decided(99, 40, fooled=True)
            meter.advance(2000, 5.0, False, MOST, 0)
            rows, done, total = rows_of(shown)
            self.assertEqual((done, rows["decided"]), (2000, "1 of 100 images"))
            self.assertEqual(rows["robust"], "at most 99.0% (94.6% to 100.0%)")
            self.assertEqual(rows["passes"], f"2,000 of {total:,}")
            meter.begin("fab-t", 99, 0, 99, 8)
            self.assertEqual(rows_of(shown)[0]["attacks"], "apgd-ce done, fab-t now, square,")
            meter.advance(2000, 5.0, False, MOST, 0)
            self.assertEqual(rows_of(shown)[0]["left"], "at most 0:44")  # 17,800 * 5 / 2,000 s
            self.assertEqual(rows_of(shown)[0]["passes"], "2,000 of at most 19,800")
            # What may follow is not counted in before an image is fooled.
            meter.advance(2000, 5.0, False, MOST, 4500)
            self.assertEqual(rows_of(shown)[0]["left"], "at most 0:39 for fab-t")  # 15,800 passes
            meter.decided(98, 40, fooled=True)
            meter.advance(2000, 5.0, False, MOST, 4500)
            self.assertRegex(rows_of(shown)[0]["left"], r"^\d+:\d\d$")
            shown.close.assert_not_called()
        shown.close.assert_called_once_with()
        self.assertEqual(self.said.getvalue(), "")

    def test_nothing_compiles_where_all_images_are_decided(self):
        meter = meter_of(100)
        meter.begin("square", 46, 46, 46, 8)
        self.assertEqual(self.said.getvalue(), "square: 46 of 46 images are in the ledger\n")
        meter.begin("fab-t", 0, 0, 0, 8)
        self.assertNotIn("compiling", self.said.getvalue())

    @sweeps.rows((4.9, False), (5.0, True))
    def test_a_first_call_that_lasts_tells_the_pace(self, seconds, told):
        meter = meter_of(100)
        meter.begin("apgd-ce", 100, 0, 100, 8)
        meter.advance(16, seconds, False, MOST, 0)
        self.assertEqual("ETA at most 1:44:05," in self.said.getvalue(), told)  # 19,984 * 5 / 16 s

    def test_the_end_of_a_short_compilation_is_told(self):
        meter = meter_of(100)
        meter.begin("fab-t", 100, 0, 100, 8, "took 3 s last time")
        meter.advance(0, 0.1, True, MOST, 0)
        expected = "fab-t: compiling (took 3 s last time)\nfab-t: compiled in 0.1 s\n"
        self.assertEqual(self.said.getvalue(), expected)

    def test_each_attack_begins_anew(self):
        meter = meter_of(100)
        for name, standing in (("apgd-ce", 100), ("apgd-t", 60)):
            meter.begin(name, standing, 0, standing, 8)
            meter.advance(16, 0.9, False, MOST, 0)
            self.assertNotIn(f"{name} ETA", self.said.getvalue())
        with mock.patch.object(evaluation_progress, "_INTERVAL", -1.0):
            meter.advance(2000, 1.0, False, MOST, 0)
        said = "apgd-t ETA at most 0:04, 2,016 of at most 12,000 passes, 0/60 decided"
        self.assertIn(said, self.said.getvalue())  # (12,000 - 2,016) / 2,000 s

    def test_a_line_in_a_log_every_eight_seconds(self):
        meter, now = meter_of(100), mock.Mock(return_value=100.0)
        with mock.patch("time.perf_counter", now):
            meter.begin("square", 100, 0, 100, 8)
            for second, lines in ((0, 1), (8, 1), (8.1, 2), (16, 2), (17, 3)):
                now.return_value = 100 + second
                meter.advance(2000, 6.0, False, MOST, 0)
                told = [row for row in self.said.getvalue().splitlines() if "ETA" in row]
                self.assertLen(told, lines, second)

    @sweeps.rows((True, 0, True), (True, 1, False), (False, 0, False))
    def test_who_speaks(self, enabled, process, speaks):
        with mock.patch.object(evaluation_progress.jax, "process_index", return_value=process):
            how = {"interval": checks.binomial_interval, "enabled": enabled}
            made = evaluation_progress.Decisions(8, **how)
        made.begin(f"square {process}", 4, 0, 6, 2)
        self.assertEqual(f"square {process}: compiling" in self.said.getvalue(), speaks)
        self.said.truncate(0)

    def test_an_equal_line_is_not_said_again(self):
        meter, now = meter_of(100), mock.Mock(return_value=100.0)
        with mock.patch("time.perf_counter", now):
            meter.begin("square", 100, 0, 100, 8)
            for second in (0, 20):
                now.return_value = 100 + second
                meter.advance(0, 6.0, False, MOST, 0)
        self.assertEqual(self.said.getvalue().count("0 of at most 20,000 passes"), 1)


class LeftTest(parameterized.TestCase):
    """Attacks of at most 100 passes an image on 4 slots, and 50 passes of later ones."""

    @sweeps.rows(
        # Nothing is fooled yet: all 10 take 100, and the 12 that stand are attacked later.
        ({"undecided": 10}, 12, (1000, 600, True)),
        ({"undecided": 10, "passes": 30}, 12, (970, 600, True)),
        # A fooled image took 10. Two have been attacked as long as twice that, 40 passes in all, so
        # half of the four others are fooled: 2 * 100 + 4 * (100 + 10) / 2 - 40 are left.
        (
            {"undecided": 6, "passes": 170, "fooled": 3, "of_fooled": 30}
            | {"survived": 1, "of_survived": 100},
            9,
            (380, 350, False),
        ),
        # As many as there are slots, however long they take: 4 * 100 + 2 * 66.25 - 200.
        (
            {"undecided": 6, "passes": 330, "fooled": 3, "of_fooled": 30}
            | {"survived": 1, "of_survived": 100},
            9,
            (332.5, 412.5, False),
        ),
        # A fooled image takes no more than one that is not: 2 * 100 are left.
        ({"undecided": 2, "passes": 900, "fooled": 3, "of_fooled": 900}, 2, (200, 50 * 0, False)),
        ({"undecided": 0, "passes": 30, "fooled": 3, "of_fooled": 30}, 0, (0, 0, False)),
    )
    def test_by_hand(self, counts, standing, expected):
        made = evaluation_progress.Counts(**counts)
        found = made.passes_left(slots=4, most=100, later=50, standing=standing)
        self.assertEqual((*found, not made.fooled), expected)
