"""The table of a loss landscape: its points, what is computed of them, and where it continues."""

import csv
from pathlib import Path

import numpy as np
from absl.testing import parameterized

from jaxrobust.papers.networks import landscape

ABOUT = {"images": 3, "split": "digits train", "seed": 0, "weights_sha256": "abc"}
POINTS = landscape.grid(3, 1.0)


def at(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A loss and an accuracy that say where they are of."""
    return 10 * points[:, 0] + points[:, 1], points[:, 1] / 4


def read(table: Path) -> list[dict[str, str]]:
    with table.open(newline="") as file:
        return list(csv.DictReader(file))


class TableTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.table = Path(self.create_tempdir(), "landscape.csv")
        self.calls = []

    def compute(self, done: int = 0, step: int = 4, until: int = 9, about=ABOUT):
        def called(points):
            self.calls.append(points)
            return at(points)

        landscape._computed(self.table, called, POINTS[:until], done, step, about)

    def test_points_are_row_by_row(self):
        self.assertEqual(landscape.grid(3, 2.0)[:4].tolist(), [[-2, -2], [-2, 0], [-2, 2], [0, -2]])
        self.assertEqual(landscape.grid(51, 1.0)[51 * 51 // 2].tolist(), [0, 0])

    def test_each_point_once_and_all_calls_of_one_length(self):
        self.compute()
        self.assertEqual([len(points) for points in self.calls], [4, 4, 4])
        rows = read(self.table)
        loss, accuracy = at(POINTS)
        for key, values in (("a", POINTS[:, 0]), ("b", POINTS[:, 1]), ("loss", loss)):
            np.testing.assert_array_equal([float(row[key]) for row in rows], values)
        np.testing.assert_array_equal([float(row["accuracy"]) for row in rows], accuracy)
        for row in rows:
            self.assertEqual(
                {key: row[key] for key in ABOUT}, {k: str(v) for k, v in ABOUT.items()}
            )

    def test_it_goes_on_behind_the_last_whole_line(self):
        self.assertEqual(landscape._done(self.table, POINTS, ABOUT), 0)
        self.compute(until=5)
        with self.table.open("a") as file:
            file.write("0.0,1.")  # a kill
        self.assertEqual(landscape._done(self.table, POINTS, ABOUT), 5)
        self.compute(done=5)
        self.assertLen(read(self.table), 9)
        np.testing.assert_array_equal([float(row["a"]) for row in read(self.table)], POINTS[:, 0])
        self.assertEqual(landscape._done(self.table, POINTS, ABOUT), 9)
        self.assertEqual(self.table.read_text().count("loss"), 1)

    def test_another_table_is_refused(self):
        for key in ABOUT:
            with self.subTest(key=key):
                self.compute()
                other = ABOUT | {key: 4 if isinstance(ABOUT[key], int) else "other"}
                with self.assertRaisesRegex(ValueError, "name another --out, or remove it"):
                    landscape._done(self.table, POINTS, other)

    def test_other_points_are_refused(self):
        for side, reach in ((3, 2.0), (3, 1 + 1e-9), (5, 1.0), (1, 1.0)):
            with self.subTest(row=(side, reach)):
                self.compute()
                points = landscape.grid(side, reach)
                with self.assertRaisesRegex(ValueError, "belongs to other weights, images"):
                    landscape._done(self.table, points, ABOUT)

    def test_more_points_than_there_are(self):
        self.compute()
        with self.assertRaisesRegex(ValueError, "belongs to other weights, images"):
            landscape._done(self.table, POINTS[:8], ABOUT)
