"""A pickle of images with labels becomes .npz, and nothing that it asks for is run."""

import os
import pickle
from pathlib import Path

import numpy as np
from absl.testing import parameterized

from jaxrobust import data
from jaxrobust.commands import prepare
from tests.support import command_calls, sweeps


class Calls:
    """Pickled, it asks for a function to be called."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


class PseudoLabelledTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.folder = Path(self.create_tempdir())
        rng = np.random.default_rng(0)
        self.images = rng.integers(0, 256, (30, 32, 32, 3), np.uint8)
        self.labels = np.arange(30) % 10

    def prepared(self, found, *words, code=0, protocol=4):
        """What the command prints of a pickle of `found`."""
        path = self.folder / "ti_500K_pseudo_labeled.pickle"
        path.write_bytes(found if isinstance(found, bytes) else pickle.dumps(found, protocol))
        ended = command_calls.ended(lambda: prepare.main(["pseudo-labelled", str(path), *words]))
        self.assertEqual(ended.code, code, ended.error)
        return ended.out + ended.error

    @sweeps.rows(2, 3, 4)
    def test_is_read_as_a_second_source(self, protocol):
        given = {"data": self.images, "extrapolated_targets": self.labels}
        printed = self.prepared(given, protocol=protocol)
        self.assertIn("30 images; per class: 3, 3, 3", printed)
        name = f"npz:{self.folder / 'ti_500K_pseudo_labeled.npz'}"
        self.assertIn(f"--config.data.extra={name}", printed)
        found = data.load(name, split="all", preprocessing="none")
        np.testing.assert_array_equal(np.round(255 * found.images), self.images)
        np.testing.assert_array_equal(found.labels, self.labels)

    def test_calls_nothing(self):
        made = self.folder / "made"
        said = self.prepared({"data": Calls(str(made))}, code=2)
        self.assertRegex(
            said, r"holds more than arrays.*asks for posix.mkdir, .*; write its images"
        )
        self.assertFalse(made.exists())
        self.assertEmpty(list(self.folder.glob("*.npz*")))

    @sweeps.rows(
        ({"extrapolated_targets": None}, "holds more than arrays: 'extrapolated_targets' is of"),
        ({"name": "tiny"}, "holds more than arrays: 'name' is of type str; write its images"),
        ({"data": np.array([None] * 30)}, "holds more than arrays: 'data'"),
        ({"data": np.zeros((30, 32, 32), np.uint8)}, "not uint8\\[N,H,W,3\\]; write pixels"),
        ({"extrapolated_targets": np.zeros(29, int)}, "int64\\[29\\], not one integer for each of"),
        (
            {"extrapolated_targets": np.full(30, 10)},
            "labels go from 10 to 10, outside 0 to 9; remove the images",
        ),
    )
    def test_refuses(self, changes, message):
        given = {"data": self.images, "extrapolated_targets": self.labels} | changes
        self.assertRegex(self.prepared(given, code=2), message)

    def test_refuses_what_is_no_such_pickle(self):
        self.assertRegex(
            self.prepared([1, 2], code=2), "holds list; it must hold a dict with 'data'"
        )
        self.assertRegex(self.prepared(b"<html>", code=2), "pickle, or is damaged|more than arrays")
        given = {"data": self.images, "extrapolated_targets": self.labels}
        said = self.prepared(given, "--out", "arrays.npy", code=2)
        self.assertIn("name a file that ends in .npz", said)
