"""Compressed files of arrays, damaged at every place: a sentence, or the arrays as they were."""

import contextlib
import io
from pathlib import Path

import numpy as np
from absl.testing import absltest

from jaxrobust import data
from jaxrobust.evaluation.network import user_attacks


class DamagedTest(absltest.TestCase):
    def setUp(self):
        super().setUp()
        self.path = Path(self.create_tempdir()) / "file.npz"
        pixels = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), np.uint8)
        self.arrays = {"images": pixels, "labels": np.arange(20) % 4, "ids": np.arange(20)}
        names = {"train_images": "images", "train_labels": "labels"}
        arrays = {new: self.arrays[old] for new, old in names.items()} | self.arrays
        np.savez_compressed(self.path, **arrays)
        self.enter_context(contextlib.redirect_stderr(io.StringIO()))

    def damages(self):
        """Yield places of the file, whose next 40 bytes are zero meanwhile."""
        content = self.path.read_bytes()
        for start in range(0, len(content), len(content) // 60):
            end = start + 40
            self.path.write_bytes(content[:start] + bytes(len(content[start:end])) + content[end:])
            yield start

    def test_a_data_set(self):
        refused = 0
        for place in self.damages():
            with self.subTest(place):
                try:
                    found = data.load(f"npz:{self.path}", split="train")
                except data.DataError as error:
                    refused += 1
                    self.assertIn("is damaged, or not a .npz file", str(error))
                else:
                    np.testing.assert_array_equal(
                        np.rint(255 * np.asarray(found.images)), self.arrays["images"]
                    )
        self.assertGreater(refused, 20)

    def test_points(self):
        refused = 0
        for place in self.damages():
            with self.subTest(place):
                try:
                    points = user_attacks.of_file(str(self.path)).points
                except ValueError as error:
                    refused += 1
                    self.assertRegex(str(error), "is not an .npz file of plain arrays|has no array")
                else:
                    for image, point in points.items():
                        np.testing.assert_allclose(255 * point, self.arrays["images"][image])
        self.assertGreater(refused, 20)

    def test_a_file_of_text(self):
        self.path.write_text("hello")
        with self.assertRaisesRegex(ValueError, "plain arrays .not a zip file.; save it with"):
            user_attacks.of_file(str(self.path))
