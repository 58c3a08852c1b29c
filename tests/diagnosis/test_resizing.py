"""Images resized as arrays, against JAX's resize without antialiasing."""

import jax
import numpy as np
from absl.testing import absltest, parameterized

from jaxrobust import data
from jaxrobust.diagnosis import resizing


class ResizingTest(parameterized.TestCase):
    @parameterized.parameters((40, 60, 20, 30, 16), (33, 21, 45, 28, 28), (16, 16, 16, 16, 16))
    def test_bilinear(self, height, width, rows, columns, crop):
        image = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
        ours = resizing.bilinear(image, rows, columns, crop)
        whole = jax.image.resize(
            image.astype(np.float32), (rows, columns, 3), "linear", antialias=False
        )
        top, left = round((rows - crop) / 2), round((columns - crop) / 2)
        theirs = whole[top : top + crop, left : left + crop]
        np.testing.assert_allclose(ours, theirs, atol=1e-3)  # of 255, float32

    def test_of_a_source(self):
        source = data.open_source("fake:40x40x3", "train")
        find = lambda how: resizing.resized(  # noqa: E731
            source, np.arange(3), preprocessing=how, image_size=16
        )
        self.assertIsNone(find("none"))
        self.assertIsNone(find("Crop288"))
        found = find("bicubic-20-crop-16")
        self.assertEqual((found.shape, found.dtype), ((3, 16, 16, 3), np.float32))
        self.assertBetween(found.min(), 0, 1)
        prepared = data.Prepared(
            source, image_size=16, preprocessing="bicubic-20-crop-16", images=3
        )[np.arange(3)]
        self.assertBetween(np.abs(found - prepared).mean(), 1e-3, 0.3)  # aliased


if __name__ == "__main__":
    absltest.main()
