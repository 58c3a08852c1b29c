"""Images that are prepared when they are asked for: the same pixels as a pass in order gives."""

import contextlib
import dataclasses

import numpy as np
from absl.testing import parameterized

from jaxrobust import data
from jaxrobust.data.stream import pipeline
from tests.support import sweeps


class PreparedTest(parameterized.TestCase):
    @sweeps.rows(
        ("digits", "test", 8, None),
        ("digits", "test", 12, "bicubic-14-crop-12"),
        ("fake:20x24x3:5", "train[:50]", 16, "bicubic-0.8"),
    )
    def test_the_same_as_in_order(self, name, split, size, preprocessing):
        source = data.open_source(name, split)
        preprocessing = pipeline.preprocessing_id(source, size, preprocessing)
        how = {"image_size": size, "preprocessing": preprocessing}
        parts = data.evaluation_batches(source, batch_size=30, limit=30, **how)
        with contextlib.closing(parts):
            (batch,) = parts
        images = data.Prepared(source, images=30, **how)
        self.assertEqual(images.shape, (30, size, size, source.channels))
        self.assertLen(images, 30)
        np.testing.assert_array_equal(images.labels(), batch.labels)
        expected = batch.images.astype(np.float32) / np.float32(255)
        order = np.array([29, 3, 3, 0])
        found = images[order]
        self.assertEqual(found.dtype, np.float32)
        np.testing.assert_array_equal(found, expected[order])
        np.testing.assert_array_equal(images[:], expected)
        self.assertEqual(images[np.zeros(0, int)].shape, (0, size, size, source.channels))

    def test_labels_and_contents_of_some_images_alone(self):
        source = data.open_source("fake:20x24x3:5", "train[:300]")
        how = {"image_size": 16, "preprocessing": "bicubic-20-crop-16"}
        source = dataclasses.replace(source, labels=None)  # which are read then, 256 at a time
        images = data.Prepared(source, places=range(290), **how)
        self.assertEqual(images.labels().tolist(), [record.label for record in source][:290])
        self.assertEqual(images.labels().dtype, np.int32)
        known = dataclasses.replace(source, labels=np.arange(300) % 7)
        found = data.Prepared(known, places=range(9), **how).labels()
        self.assertEqual((found.tolist(), found.dtype), ([*range(7), 0, 1], np.int32))
        found = data.Prepared(known, images=7, **how).labels()
        self.assertCountEqual(found.tolist(), range(7))
        hashes = [data.Prepared(source, images=n, **how).content_sha256() for n in (9, 9, 10)]
        self.assertEqual(hashes[0], hashes[1])
        other = how | {"preprocessing": "bilinear-20-crop-16"}
        hashes += [data.Prepared(source, images=9, **other).content_sha256()]
        self.assertLen({*hashes}, 3)

    def test_a_preprocessing_of_another_size(self):
        source = data.open_source("fake:20x24x3:5", "train[:50]")
        images = data.Prepared(source, image_size=16, preprocessing="bicubic-24-crop-20")
        with self.assertRaisesRegex(
            data.DataError, r"gives record 2 the shape \(20, 20, 3\), not \(16, 16"
        ):
            images[np.array([2])]
