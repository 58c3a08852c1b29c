"""Bytes to pixels, and the refusal of what is no image."""

import io

import numpy as np
from absl.testing import absltest, parameterized
from PIL import Image

from jaxrobust.data import decoding
from tests.images import encoded, pattern


class DecodeTest(parameterized.TestCase):
    @parameterized.parameters(1, 3)
    def test_channels_stay(self, channels):
        image = pattern(20, 30, channels)
        np.testing.assert_array_equal(decoding.decode(encoded(image, "PNG")), image)

    def test_channels_are_converted_when_asked(self):
        grey, colour = pattern(6, 9, 1), pattern(6, 9, 3)
        np.testing.assert_array_equal(
            decoding.decode(encoded(grey, "PNG"), channels=3), np.repeat(grey, 3, axis=2)
        )
        self.assertEqual(decoding.decode(encoded(colour, "PNG"), channels=1).shape, (6, 9, 1))

    def test_cmyk_and_palette_become_rgb(self):
        for mode, kind in (("CMYK", "JPEG"), ("P", "PNG"), ("RGBA", "PNG")):
            buffer = io.BytesIO()
            Image.fromarray(pattern(8, 8)).convert(mode).save(buffer, kind)
            self.assertEqual(decoding.decode(buffer.getvalue()).shape, (8, 8, 3), mode)

    @parameterized.parameters("JPEG", "PNG")
    def test_a_cut_or_foreign_file_is_refused(self, kind):
        data = encoded(pattern(64, 64), kind)
        for bad in (b"", b"not an image", data[: len(data) // 2], data[:30]):
            with self.assertRaisesRegex(ValueError, "not a whole image file: "):
                decoding.decode(bad)


if __name__ == "__main__":
    absltest.main()
