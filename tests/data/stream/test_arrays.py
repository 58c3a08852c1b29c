"""A split comes as arrays: those of the batches that evaluation makes."""

import inspect
import io
import types
from pathlib import Path

import numpy as np
from absl.testing import parameterized
from PIL import Image

from jaxrobust import data
from jaxrobust.data.splits import spread
from jaxrobust.data.stream import arrays, loading
from tests.support import sweeps
from tests.support.datasets import write_tree


class LoadTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.root = Path(self.create_tempdir())

    def test_digits(self):
        loaded = data.load("digits", split="test", n=300)
        self.assertEqual((loaded.images.shape, loaded.images.dtype), ((300, 8, 8, 1), np.float32))
        self.assertEqual((loaded.labels.dtype, loaded.ids.dtype), (np.int32, np.int32))
        self.assertEqual((loaded.images.min(), loaded.images.max()), (0, 1))
        source = data.open_source("digits", "test")
        np.testing.assert_array_equal(loaded.ids, spread.places(source, 300))
        for i in (0, 255, 256, 299):
            image, label = source[int(loaded.ids[i])]
            expected = loading.decoded(source, image) / np.float32(255)
            np.testing.assert_array_equal(loaded.images[i], expected)
            self.assertEqual(loaded.labels[i], label)
        self.assertLen(data.load("digits", n=10_000).ids, 397)

    def test_photographs(self):
        for number, name in enumerate(("val/a/1.png", "val/b/2.png")):
            (self.root / name).parent.mkdir(parents=True)
            pixels = np.random.default_rng(number).integers(0, 256, (300, 400, 3), np.uint8)
            Image.fromarray(pixels).save(self.root / name)
        name = f"folder:{self.root}"
        for more, size, used in (
            ({}, 224, "bicubic-256-crop-224"),
            ({"preprocessing": "Res256Crop224"}, 224, "Res256Crop224"),
            ({"preprocessing": "Crop288"}, 288, "Crop288"),
            ({"preprocessing": "bilinear-40-crop-32"}, 32, "bilinear-40-crop-32"),
            ({"image_size": 64}, 64, "bicubic-73-crop-64"),
            ({"image_size": 64, "preprocessing": "bilinear-1.0"}, 64, "bilinear-64-crop-64"),
        ):
            loaded = data.load(name, split="val", **more)
            self.assertEqual(loaded.images.shape, (2, size, size, 3))
            self.assertEqual((loaded.classes, loaded.labels.tolist()), (("a", "b"), [0, 1]))
            content = (self.root / "val" / "b" / "2.png").read_bytes()
            expected = data.evaluation_transform(used)(content) / np.float32(255)
            np.testing.assert_array_equal(loaded.images[1], expected)

    def test_damaged_images(self):
        write_tree(self.root, ["all/a/1.png", "all/a/2.png", "all/b/3.png"])
        (self.root / "all" / "a" / "2.png").write_bytes(b"x")
        name = f"folder:{self.root}/all"
        with self.assertRaisesRegex(data.DataError, "2.png is damaged: not a complete image file"):
            data.load(name, split="all", image_size=8)
        loaded = data.load(name, split="all", image_size=8, strict=False)
        self.assertEqual((loaded.ids.tolist(), loaded.labels.tolist()), ([0, 2], [0, 1]))
        self.assertEqual(loaded.images.shape, (2, 8, 8, 3))

    @sweeps.rows(
        ({"split": "val"}, r"no split 'val': it has train \(1400\), test \(397\)"),
        ({"n": 0}, "limit=0 must be at least 1"),
        ({"preprocessing": "Res255"}, "unknown preprocessing 'Res255'; use none, Res256"),
        ({"preprocessing": "Crop288", "image_size": 8}, "set image_size to its output size"),
        ({"classes": "/nowhere"}, "data.classes=/nowhere is neither imagenet100 nor"),
        ({"name": "cifar1000"}, "unknown data set 'cifar1000'|does not exist"),
        ({"name": "digitz"}, "did you mean digits\\? "),
    )
    def test_refused(self, how, pattern):
        how = {"name": "digits"} | how
        with self.assertRaisesRegex(ValueError, pattern):
            data.load(how.pop("name"), **how)

    def test_is_documented(self):
        self.assertContainsSubset(["ImageArrays", "load"], data.__all__)
        described = inspect.getdoc(data.load)
        for name in inspect.signature(data.load).parameters:
            self.assertRegex(described, rf"\n  {name}: ")


class DecodedTest(parameterized.TestCase):
    """A record becomes an image with the channels of its data set."""

    @sweeps.rows(("L", 3), ("L", 1), ("RGB", 1), ("RGB", 3), ("P", 3), ("RGBA", 3))
    def test_channels(self, mode, channels):
        image = Image.fromarray(np.arange(60, dtype=np.uint8).reshape(4, 5, 3)).convert(mode)
        file = io.BytesIO()
        image.save(file, "PNG")
        source = types.SimpleNamespace(channels=channels, image_shape=None)
        expected = np.asarray(image.convert("L" if channels == 1 else "RGB")).reshape(4, 5, -1)
        found = loading.decoded(source, file.getvalue())
        self.assertEqual(found.shape, (4, 5, channels))
        np.testing.assert_array_equal(found, expected)
        source.image_shape = (4, 5, channels)
        self.assertEqual(loading.decoded(source, file.getvalue()).shape, source.image_shape)
        source.image_shape = (5, 4, channels)
        with self.assertRaisesRegex(ValueError, rf"its shape is \(4, 5, {channels}\), not \(5, 4"):
            loading.decoded(source, file.getvalue())

    @sweeps.rows(
        (None, None, 224),
        ((7, 7, 1), None, 7),
        ((8, 5, 3), None, 8),
        ((40, 40, 3), "bicubic-24-crop-16", 16),
        (None, "bicubic-24-crop-16", 16),
        ((20, 20, 3), "bilinear-0.5", 20),
        ((20, 20, 3), "none", 20),
    )
    def test_the_side_of_the_images(self, shape, preprocessing, side):
        source = types.SimpleNamespace(channels=3, image_shape=shape)
        self.assertEqual(arrays._size(source, preprocessing), side)
