"""The figures of a training: which are drawn, on which axis, and what is noted below them."""

from types import SimpleNamespace

import numpy as np
from absl.testing import absltest, parameterized

from jaxrobust.report.drawing.curves import Curve, CurveEvent
from jaxrobust.report.parts import training


def curve(*values: float) -> Curve:
    return Curve(np.arange(1.0, len(values) + 1), np.array(values, float))


class AxesTest(parameterized.TestCase):
    @parameterized.parameters(
        ([1, 300], False),
        ([1, 301], True),
        ([0.01, 3.01, np.nan], True),
        ([0, 301], False),  # a logarithm has no 0
        ([-1, 301], False),
        ([np.nan, np.inf], False),
    )
    def test_what_spans_more_than_300_times_is_logarithmic(self, values, logarithmic):
        self.assertIs(training._spans({"loss": curve(*values)}), logarithmic)

    def test_values_that_are_not_finite_are_counted(self):
        said = training._not_finite("loss", curve(1, np.nan, 2, np.inf))
        self.assertEqual(said, "Not finite: loss at 2 of 4 points, steps 2 to 4.")
        self.assertEqual(training._not_finite("loss", curve(1, 2)), "")

    @parameterized.parameters(
        ("loss", {"loss": curve(1)}, True),
        ("loss", {"lr": curve(1)}, False),
        ("skipped", {"skipped": curve(0, 0)}, False),
        ("skipped", {"skipped": curve(0, 1)}, True),
    )
    def test_a_panel_is_worth_drawing(self, name, own, worth):
        self.assertIs(training._worth(name, training.PANELS[name], own), worth)


class EventsTest(parameterized.TestCase):
    @parameterized.parameters(
        (0, "No alarm was raised, no step was skipped"),
        (50, "What happened<"),
        (51, "What happened (and 1 more events)<"),
    )
    def test_the_first_50_are_told(self, count, said):
        events = [CurveEvent("train", 1000 + i, "skipped", "1 step") for i in range(count)]
        run = SimpleNamespace(metrics=SimpleNamespace(events=events))
        told = str(training._events(run))
        self.assertIn(said, told)
        self.assertEqual(told.count("1 step"), min(count, 50))
        self.assertEqual("1,049" in told, count > 49)


if __name__ == "__main__":
    absltest.main()
