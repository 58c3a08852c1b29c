"""Where an analysis is written, and its table."""

import csv
from pathlib import Path
from unittest import mock

import numpy as np
from absl.testing import parameterized

from jaxrobust.papers.networks import picture_parts


class PicturePartsTest(parameterized.TestCase):
    def test_folder(self):
        for out, workdir, expected in (
            (None, None, "analyses"),
            (None, "runs/1", "runs/1/analyses"),
            ("mine", "runs/1", "mine"),
            ("mine", None, "mine"),
        ):
            with self.subTest(row=(out, workdir, expected)):
                given = None if out is None else Path(out)
                self.assertEqual(picture_parts.folder(given, workdir), Path(expected))

    def test_a_table_of_plain_numbers(self):
        columns = {"n": np.int32([1, 2]), "x": np.array([0.1, 1 / 3]), "name": ("a", "b")}
        rows = picture_parts.rows(columns)
        self.assertEqual(rows[1], {"n": 2, "x": 1 / 3, "name": "b"})
        self.assertIs(type(rows[0]["n"]), int)
        folder, figure = Path(self.create_tempdir(), "new"), mock.Mock()
        table, picture = picture_parts.save(folder, "mine", figure, rows)
        self.assertEqual((table, picture), (folder / "mine.csv", folder / "mine.png"))
        self.assertEqual(figure.savefig.call_args.args, (picture,))
        with table.open(newline="") as file:
            written = list(csv.DictReader(file))
        self.assertEqual([float(row["x"]) for row in written], [0.1, 1 / 3])  # all digits
