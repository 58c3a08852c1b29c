"""The file of verdicts next to a record: there and back, and what is refused."""

import json
from pathlib import Path

import numpy as np
from absl.testing import parameterized

from jaxrobust.evaluation.records import verdicts
from jaxrobust.evaluation.records.verdicts import Verdicts
from tests.support import sweeps

FOUND = Verdicts(
    image_ids=np.array([0, 5, 4_294_967_295], np.uint32),
    labels=np.array([3, 0, 999], np.int32),
    clean=np.array([True, False, True]),
    fooled_by=np.array(["apgd-ce", "clean", ""]),
    norms=np.array([0.015686274, 0.0, 0.0]),
    reached=np.array([7, -1, -1], np.int32),
)


class FileTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.path = Path(self.create_tempdir()) / verdicts.file_of("abc")
        verdicts.write(self.path, "abc", FOUND)
        self.whole = json.loads(self.path.read_text())

    def test_there_and_back(self):
        read = verdicts.read(self.path)
        for name, one, other in zip(FOUND._fields, FOUND, read, strict=True):
            np.testing.assert_array_equal(one, other, name)
        self.assertEqual(read.robust.tolist(), [False, False, True])
        self.assertEqual([p.name for p in self.path.parent.iterdir()], ["verdicts-abc.json"])

    @sweeps.rows(
        ({"schema": 3}, "has schema 3, but this version only reads up to 2; install a newer"),
        ({"labels": [1, 2]}, "columns have different lengths; restore the orig"),
        ({"labels": None}, "is damaged"),
        ({"labels": [[1, 2, 3]]}, "columns have different lengths"),
        ({"clean": [True, True, True]}, "clean and fooled_by disagree"),
        ({"clean": [False, False, True]}, "clean and fooled_by disagree"),
        ({"image_ids": [-1, 2, 3]}, "is damaged"),
        ({"norms": ["a", 0, 0]}, "is damaged"),
        ({"reached": [1.5, "x", None]}, "is damaged"),
        ({"reached": [7]}, "columns have different lengths"),
    )
    def test_damaged(self, changes, message):
        self.path.write_text(json.dumps(self.whole | changes))
        with self.assertRaisesRegex(ValueError, message):
            verdicts.read(self.path)

    def test_an_older_file_knows_no_class_that_was_reached(self):
        there = json.loads(self.path.read_text())
        del there["reached"]
        self.path.write_text(json.dumps(there))
        read = verdicts.read(self.path)
        self.assertEqual(read.reached.tolist(), [-1, -1, -1])
        np.testing.assert_array_equal(read.norms, FOUND.norms)

    def test_cut_off(self):
        self.path.write_text(self.path.read_text()[:-20])
        with self.assertRaisesRegex(ValueError, "is damaged"):
            verdicts.read(self.path)

    def test_missing(self):
        with self.assertRaisesRegex(ValueError, "is missing; copy it with its record"):
            verdicts.read(self.path.with_name("other.json"))

    def test_is_small(self):
        many = Verdicts(*(np.resize(column, 5000) for column in FOUND))
        verdicts.write(self.path, "abc", many)
        self.assertLess(self.path.stat().st_size, 250_000)
