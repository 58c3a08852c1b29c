"""Which images of several evaluations can be compared."""

import numpy as np
from absl.testing import absltest

from jaxrobust.evaluation.records import comparable
from jaxrobust.evaluation.records.record import AccuracyRecord
from jaxrobust.evaluation.records.verdicts import REPLAY, Verdicts


def verdicts(*fooled_by: str) -> Verdicts:
    n = len(fooled_by)
    names = np.array(fooled_by)
    known = np.arange(n, dtype=np.uint32), np.zeros(n, np.int32), names != "clean", names
    return Verdicts(*known, np.zeros(n), np.full(n, -1, np.int32))


def record(*radii: float, met: tuple[float, ...] = ()) -> AccuracyRecord:
    """A record of a ladder of radii, to which points found at the radii `met` were replayed."""
    ladder = {"radii": list(radii)} if radii else None
    return AccuracyRecord(ladder=ladder, replayed=[{"epsilon": radius} for radius in met])


class LeftOutTest(absltest.TestCase):
    def setUp(self):
        super().setUp()
        self.several = [
            verdicts("", REPLAY, "clean", "square"),
            verdicts("", "", f"l2 1: {REPLAY}", ""),
        ]

    def left_out(self, *records: AccuracyRecord) -> list[bool]:
        return comparable.left_out(records, self.several).tolist()

    def test_what_a_replayed_point_decided(self):
        decided = [False, True, True, False]
        self.assertEqual(self.left_out(record(), record()), decided)
        self.assertEqual(self.left_out(record(1, 2), record(1, 3)), decided)
        self.assertEqual(self.left_out(record(1, 2), record()), decided)

    def test_on_equal_ladders_all_met_the_same_points(self):
        self.assertEqual(
            self.left_out(record(1, 2, met=(1,)), record(1, 2, met=(1, 2))), [False] * 4
        )

    def test_points_from_elsewhere_only_one_has_met(self):
        given = record(1, 2, met=(1,)), record(1, 2, met=(1, 1.5))
        self.assertEqual(self.left_out(*given), [False, True, True, False])


if __name__ == "__main__":
    absltest.main()
