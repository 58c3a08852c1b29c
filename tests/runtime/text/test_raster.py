import struct
from unittest import mock

import numpy as np
from absl.testing import absltest
from PIL import Image

from jaxrobust.runtime.text import raster
from tests.support.modules import hidden, needs


class RasterTest(absltest.TestCase):
    @needs("resvg_py", "pip install resvg-py")
    def test_two_pixels_to_a_unit_on_white(self):
        svg = '<svg xmlns="http://www.w3.org/2000/svg" width="30" height="20">{}</svg>'
        made = raster.png(svg.format('<rect width="15" height="20" style="fill:#0b5fa5"/>'))
        self.assertEqual(struct.unpack(">II", made[16:24]), (60, 40))
        pixels = np.asarray(Image.open(self.create_tempfile(content=made).full_path).convert("RGB"))
        self.assertEqual(pixels[20, 10].tolist(), [0x0B, 0x5F, 0xA5])
        self.assertEqual(pixels[20, 50].tolist(), [255, 255, 255])

    @needs("resvg_py", "pip install resvg-py")
    def test_a_machine_without_fonts_is_told(self):
        # resvg takes any font that a machine has where it has none of the names.
        with mock.patch.object(raster, "png", lambda svg: b"the same, with letters or without"):
            self.assertIn("install one", raster.lacking())

    def test_says_how_it_is_installed(self):
        with hidden("resvg_py"):
            with self.assertRaisesRegex(ValueError, "pip install resvg-py"):
                raster.lacking()
            with self.assertRaisesRegex(ValueError, "pip install resvg-py"):
                raster.png("<svg/>")
