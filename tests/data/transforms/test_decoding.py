"""Bytes to pixels against Pillow, and the refusal of what is not an image."""

import io
import random
from unittest import mock

import numpy as np
import pytest
from absl.testing import absltest, parameterized
from PIL import Image

from jaxrobust.data.transforms import decoding
from tests.support import sweeps
from tests.support.images import encoded, odd_images, pattern, photographs, pillow
from tests.support.modules import hidden
from tests.support.paths import NO_SHARED

ODD = odd_images()


def ours(data):
    """The pixels, or None for a file that is refused."""
    try:
        return decoding.decode(data, channels=3)
    except ValueError:
        return None


def damaged(data, rng):
    """The file cut, with bits turned, bytes lost, a marker or a tail added."""
    at, kind = rng.randrange(len(data)), rng.randrange(6)
    if kind == 0:
        return data[:at]
    if kind == 1:  # in the header, if it is a photograph
        at = rng.randrange(min(700, len(data)))
    if kind <= 2:
        return data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]
    if kind == 3:
        return data[:at] + data[at + rng.randrange(1, 9) :]
    if kind == 4:
        return data[:at] + b"\xff" + rng.choice(b"\xd0\xd7\xd9\xd8\x00\xda").to_bytes() + data[at:]
    return data[: len(data) - rng.randrange(4)] + rng.randbytes(rng.randrange(40))


class PillowTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        decoding._fast_decoder.cache_clear()
        self.addCleanup(decoding._fast_decoder.cache_clear)

    def check(self, data, name):
        theirs, found = pillow(data), ours(data)
        self.assertEqual(theirs is None, found is None, name)
        if theirs is not None:
            np.testing.assert_array_equal(found, theirs, str(name))
            self.assertFalse(found.flags.writeable, name)
        return found is not None


class DecodeTest(PillowTest):
    @sweeps.rows(*ODD)
    def test_odd_images(self, name):
        self.assertTrue(self.check(ODD[name], name))

    @sweeps.rows(*ODD)
    def test_odd_images_without_simplejpeg(self, name):
        with hidden("simplejpeg"):
            self.check(ODD[name], name)
            self.assertIsNone(decoding._fast_decoder())

    @pytest.mark.slow
    def test_photographs(self):
        if not photographs(1):
            self.skipTest(NO_SHARED)
        for path in photographs(200):
            self.assertTrue(self.check(path.read_bytes(), path))

    @pytest.mark.slow
    def test_damaged_files_have_pillows_verdict(self):
        rng = random.Random(0)
        files = [data for name, data in ODD.items() if "JPEG" in name]
        files += [path.read_bytes() for path in photographs(4)]
        verdicts = [
            self.check(damaged(data, rng), (number, change))
            for number, data in enumerate(files)
            for change in range(25)
        ]
        self.assertBetween(sum(verdicts), 0.3 * len(verdicts), 0.8 * len(verdicts))

    @sweeps.rows(1, 3)
    def test_channels_stay(self, channels):
        image = pattern(20, 30, channels)
        np.testing.assert_array_equal(decoding.decode(encoded(image, "PNG")), image)
        self.assertEqual(decoding.decode(encoded(image, "JPEG")).shape, image.shape)

    @sweeps.rows("PNG", "JPEG")
    def test_channels_are_converted_when_asked(self, kind):
        grey, colour = encoded(pattern(6, 9, 1), kind), encoded(pattern(6, 9, 3), kind)
        self.assertEqual(decoding.decode(grey, channels=3).shape, (6, 9, 3))
        with Image.open(io.BytesIO(colour)) as image:
            expected = np.asarray(image.convert("L"))
        np.testing.assert_array_equal(decoding.decode(colour, channels=1)[:, :, 0], expected)

    @sweeps.rows(bytes, bytearray, memoryview)
    def test_kinds_of_bytes(self, kind):
        for name in ("JPEG 4:2:0", "RGBA PNG"):
            np.testing.assert_array_equal(
                decoding.decode(kind(ODD[name])), decoding.decode(ODD[name])
            )

    @sweeps.rows("JPEG", "PNG")
    def test_a_cut_or_foreign_file_is_refused(self, kind):
        data = encoded(pattern(64, 64), kind)
        for bad in (b"", b"not an image", data[: len(data) // 2], data[:30]):
            with self.assertRaisesRegex(ValueError, "not a complete image file: "):
                decoding.decode(bad)

    @sweeps.rows(
        (b"", "it is empty"),
        (bytearray(), "it is empty"),
        (memoryview(b""), "it is empty"),
        (b"not an image", "Pillow does not recognize its format"),
        (memoryview(b"\0" * 999), "Pillow does not recognize its format"),
        (encoded(pattern(64, 64), "PNG")[:200], "image file is truncated"),
    )
    def test_what_is_wrong_with_a_file(self, data, reason):
        with self.assertRaisesRegex(ValueError, rf"\Anot a complete image file: {reason}[^<>]*\Z"):
            decoding.decode(data, channels=3)

    def test_a_decompression_bomb_is_refused(self):
        data = encoded(pattern(64, 64), "JPEG")
        with (
            mock.patch.object(Image, "MAX_IMAGE_PIXELS", 2000),
            self.assertRaisesRegex(ValueError, "not a complete image file: .*decompression bomb"),
        ):
            decoding.decode(data)


class SimplejpegTest(absltest.TestCase):
    def setUp(self):
        super().setUp()
        try:
            import simplejpeg
        except ImportError:
            self.skipTest("simplejpeg is not installed")
        self.simplejpeg = simplejpeg
        decoding._fast_decoder.cache_clear()
        self.addCleanup(decoding._fast_decoder.cache_clear)

    def test_is_used(self):
        for name in ("JPEG 4:2:0", "progressive JPEG", "gray JPEG", "MPO", "JPEG turned by EXIF"):
            self.assertEqual(decoding.decode(ODD[name], channels=3).base.shape[2:], (4,), name)

    def test_its_exact_ways_are_asked_for(self):
        """Whatever they are where nothing is said."""
        with mock.patch.object(
            self.simplejpeg, "decode_jpeg", wraps=self.simplejpeg.decode_jpeg
        ) as asked:
            decoding.decode(ODD["JPEG 4:2:0"], channels=3)
        how = [call.kwargs for call in asked.call_args_list]
        self.assertEqual(how, [{"fastdct": False, "fastupsample": False}] * len(how))
        self.assertNotEmpty(how)

    def test_one_that_gives_other_pixels_is_not_used(self):
        right = self.simplejpeg.decode_jpeg

        def wrong(data, *args, **kwargs):
            image = right(data, *args, **kwargs)
            image[-1, -1, 1] ^= 1
            return image

        self.refused(wrong, "simplejpeg .* differ .444 141x37")

    def test_one_that_fails_is_not_used(self):
        self.refused(mock.Mock(side_effect=TypeError("no such argument")), "no such argument")

    def test_one_that_upsamples_quickly_is_not_used(self):
        def quick(*args, **kwargs):
            return self.simplejpeg_decode(*args, **kwargs | {"fastupsample": True})

        self.simplejpeg_decode = self.simplejpeg.decode_jpeg
        self.refused(quick, "differ .42")

    def refused(self, decode_jpeg, message):
        with (
            mock.patch.object(self.simplejpeg, "decode_jpeg", decode_jpeg),
            self.assertLogs("jaxrobust.data.transforms.decoding", "WARNING") as logs,
        ):
            for name, data in ODD.items():
                np.testing.assert_array_equal(decoding.decode(data, channels=3), pillow(data), name)
        self.assertLen(logs.output, 1)  # said once
        self.assertRegex(logs.output[0], message)


@pytest.mark.slow
class DamagedPhotographsTest(PillowTest):
    def test_damaged_files_have_pillows_verdict(self):
        if not photographs(1):
            self.skipTest(NO_SHARED)
        rng = random.Random(1)
        for path in photographs(20):
            for change in range(150):
                self.check(damaged(path.read_bytes(), rng), (path, change))
