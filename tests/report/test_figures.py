"""Where values lie in a figure, which numbers stand at its axes, and where a curve has a gap."""

import math

from absl.testing import parameterized

from jaxrobust.report.drawing import figures
from jaxrobust.report.drawing.figures import Axis, Bar, Line

NAN = math.nan


class FrameTest(parameterized.TestCase):
    def test_a_logarithm_has_equal_steps_for_equal_factors(self):
        frame = figures._frame(Axis("x", log=True), [1.0, 100.0], 0, 200)
        self.assertAlmostEqual(frame(10), 100)

    def test_ticks(self):
        for low, high, log, ticks in (
            (0, 1, False, [0, 0.25, 0.5, 0.75, 1]),
            (0, 10, False, [0, 2.5, 5, 7.5, 10]),
            (3, 17, False, [5, 10, 15]),
            (-1, 1, False, [-1, -0.5, 0, 0.5, 1]),
            (0.5, 2000, True, [1, 10, 100, 1000]),
            (1e-6, 1e6, True, [1e-6, 1e-3, 1, 1e3, 1e6]),
        ):
            with self.subTest(row=(low, high, log, ticks)):
                found = figures._ticks(figures._Frame(low, high, 0, 1, log), 4)
                self.assertEqual([round(tick, 9) for tick in found], ticks)

    def test_numbers(self):
        for value, percent, text in (
            (0, False, "0"),
            (0.5, True, "50 %"),
            (999, False, "999"),
            (1000, False, "1k"),
            (1_281_167, False, "1.281M"),
            (-2.5e9, False, "-2.5G"),
            (0.001, False, "0.001"),
            (0.00025, False, "2.5e-4"),
            (0.00002, False, "2e-5"),
        ):
            with self.subTest(row=(value, percent, text)):
                self.assertEqual(figures._short(value, percent), text)


class DrawnTest(parameterized.TestCase):
    def path(self, log=False, **of_line) -> list[str]:
        """The paths of a curve on axes from 1 to 4 and 1 to 10 that are 30 and 90 long."""
        x, y = figures._Frame(1, 4, 0, 30, False), figures._Frame(1, 10, 0, 90, log)
        parts = figures._drawn(Line("a", **of_line), "line c1", x, y)
        return [str(part).partition('d="')[2].partition('"')[0] for part in parts]

    def test_what_is_not_finite_is_a_gap(self):
        line, dots = self.path(x=[1, 2, 3, 4], y=[1, 10, NAN, 5.5])
        self.assertEqual(line, "M0.0 0.0L10.0 90.0M30.0 45.0")
        self.assertEqual(dots, "M0.0 0.0h0M10.0 90.0h0M30.0 45.0h0")

    def test_on_a_logarithm_0_is_a_gap(self):
        line, _ = self.path(log=True, x=[1, 2, 3], y=[1, 0, 10])
        self.assertEqual(line, "M0.0 0.0M20.0 90.0")

    def test_intervals_are_upright(self):
        ends, *_ = self.path(x=[1, 2], y=[2, 3], low=[1, NAN], high=[10, 4])
        self.assertEqual(ends, "M0.0 0.0V90.0")

    def test_many_points_have_no_dots(self):
        for count, paths in ((30, 2), (31, 1)):
            self.assertLen(self.path(x=[1] * count, y=[1] * count), paths)

    def test_a_row_is_named(self):
        for letters, shown in ((18, "n" * 18), (19, "n" * 17 + "…")):
            with self.subTest(row=(letters, shown)):
                frame = figures._Frame(0, 1, 0, 100, False)
                row = Bar("n" * letters, 0.5, 0.25, 0.75, second=0.9, strong=True)
                text, interval, ring, dot = map(str, figures._row(row, 7, frame))
                self.assertIn(f">{shown}<", text)
                self.assertIn("M25.0 7H75.0", interval)
                self.assertIn('cx="90.0"', ring)
                self.assertIn('cx="50.0"', dot)
                self.assertIn("dot c2", dot)
