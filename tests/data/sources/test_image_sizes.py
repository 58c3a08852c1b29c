"""Images of one size are found out by their headers, and behave as arrays do, wherever they lie."""

import contextlib
import io
import os
import tempfile
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from absl.testing import parameterized
from PIL import Image

from jaxrobust import data
from jaxrobust.data.sources import headers
from jaxrobust.data.stream import pipeline
from tests.support import four_sources, sweeps
from tests.support.datasets import write_tree
from tests.support.four_sources import KINDS, png

RNG = np.random.default_rng(0)


def pixels(count, side=8, channels=3):
    return RNG.integers(0, 256, (count, side, side, channels), np.uint8)


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


class SizesCase(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.root = Path(self.enter_context(tempfile.TemporaryDirectory()))
        environment = {"XDG_CACHE_HOME": str(self.root / "cache")}
        self.enter_context(mock.patch.dict(os.environ, environment))

    def write(self, kind, splits, names=tuple("abcdefghij")):
        if kind == "hf":
            four_sources.cache_hugging_face(self, self.root / "hf_cache")
        return four_sources.write(kind, self.root, splits, names)


class OneSizeTest(SizesCase):
    """`folder:` always said that its images have several sizes, and TFDS where none is declared."""

    @parameterized.product(kind=KINDS, channels=(1, 3))
    def test_loads_the_same_arrays(self, kind, channels):
        """Digits as PNGs were resized by 8/7 and cropped: clean accuracy 64% instead of 94%."""
        images, labels = pixels(40, channels=channels), np.arange(40) * 4 // 40
        given = self.write(kind, {"train": (images, labels)}, "abcd")
        source = data.open_source(given["name"], "train", data_dir=given["data_dir"])
        self.assertEqual(source.image_shape, (8, 8, channels))
        self.assertEqual(pipeline.preprocessing_id(source, 8), "none")
        loaded = data.load(**given, split="train")
        np.testing.assert_array_equal(loaded.images, images / np.float32(255))
        np.testing.assert_array_equal(loaded.labels, labels)

    @sweeps.rows(*KINDS)
    def test_trains_with_crops_that_do_not_resize(self, kind):
        """It was refused: "has differently sized images"."""
        given = self.write(kind, {"train": (pixels(16), np.arange(16) % 2)}, "ab")
        batches = data.train_batches(
            data.open_source(given["name"], "train", data_dir=given["data_dir"]),
            batch_size=8, seed=0, augmentation="crop-flip", image_size=8,
        )  # fmt: skip
        with contextlib.closing(batches):
            self.assertEqual(next(batches).images.shape, (8, 8, 8, 3))

    def test_grey_files_are_read_as_rgb_for_a_network_of_colours(self):
        """Networks that were trained on RGB of gray files still take them, as torchvision does."""
        images = pixels(6, channels=1)
        given = self.write("folder", {"train": (images, [0, 1] * 3)}, "ab")
        source = data.open_source(given["name"], "train")
        self.assertIs(source.for_channels(1), source)
        colour = source.for_channels(3)
        self.assertEqual((colour.channels, colour.image_shape), (3, (8, 8, 3)))
        batches = data.evaluation_batches(colour, batch_size=6, image_size=8)
        with contextlib.closing(batches):
            found = next(batches).images
        order = [0, 2, 4, 1, 3, 5]  # by class
        np.testing.assert_array_equal(found, np.repeat(images[order], 3, axis=3))

    @sweeps.rows("folder", "hf")
    def test_one_colour_image_makes_all_rgb(self, kind):
        """Hugging Face's sets turned it to gray if it was not among 200 that were looked at."""
        files = [png(image) for image in pixels(300, channels=1)]
        files[101] = png(pixels(1)[0])
        given = self.write(kind, {"train": (files, np.arange(300) * 2 // 300)}, "ab")
        source = data.open_source(given["name"], "train")
        self.assertEqual((source.channels, source.image_shape), (3, (8, 8, 3)))

    @sweeps.rows("folder", "tfds", "hf")
    def test_sizes_as_they_are_stored(self, kind):
        """EXIF may turn an image, which decoding does not follow; the size is the decoder's."""
        exif = Image.Exif()
        exif[0x0112] = 6
        picture = Image.fromarray(RNG.integers(0, 256, (6, 9, 3), np.uint8))
        files = [encoded(picture, "JPEG"), encoded(picture, "JPEG", exif=exif)]
        given = self.write(kind, {"train": (files, [0, 1])}, "ab")
        source = data.open_source(given["name"], "train", data_dir=given["data_dir"])
        self.assertEqual(source.image_shape, (6, 9, 3))
        self.assertRegex(" ".join(source.notes), "1 of 2 .*have an EXIF orientation")


class SeveralSizesTest(SizesCase):
    @sweeps.rows("folder", "tfds", "hf")
    def test_one_other_size_is_found_and_said(self, kind):
        """Of 600 images, 32 are looked at first, and one of the others differs."""
        files = [png(image) for image in pixels(600)]
        files[401] = png(pixels(1, side=9)[0])
        given = self.write(kind, {"train": (files, np.arange(600) // 300)}, "ab")
        source = data.open_source(given["name"], "train", data_dir=given["data_dir"])
        self.assertIsNone(source.image_shape)
        self.assertRegex(
            " ".join(source.notes), "has 9x9 pixels, but the images before it have 8x8"
        )

    def test_photographs_cost_a_few_headers(self):
        """A folder of ImageNet's size is not read through, which on a network takes hours."""
        write_tree(self.root / "train", [f"a/{i:03}.jpg" for i in range(600)])
        for number in (3, 599):
            Image.new("RGB", (5, 5 + number)).save(self.root / f"train/a/{number:03}.jpg")
        opened = []
        real = Image.open
        with mock.patch.object(Image, "open", lambda file: opened.append(file) or real(file)):
            self.assertIsNone(data.open_source(f"folder:{self.root}", "train").image_shape)
        self.assertLess(len(opened), 40)

    def test_sizes_that_decide_are_those_of_whole_splits(self):
        """A part with images of one size is not prepared otherwise than the split is."""
        files = [png(image) for image in pixels(4)] + [png(pixels(1, side=9)[0])]
        given = self.write("folder", {"train": (files, [0, 0, 1, 1, 1])}, "ab")
        self.assertIsNone(data.open_source(given["name"], "train[:4]").image_shape)


class KeptAnswerTest(SizesCase):
    def setUp(self):
        super().setUp()
        self.enter_context(mock.patch.object(headers, "_REMEMBERED", 100))
        self.files = [png(image) for image in pixels(120)]
        self.folder = self.write("folder", {"train": (self.files, np.arange(120) // 60)}, "ab")

    def opened(self):
        """Return the shape, and how many headers were read."""
        real, count = Image.open, [0]

        def counted(file):
            count[0] += 1
            return real(file)

        with mock.patch.object(Image, "open", counted):
            source = data.open_source(self.folder["name"], "train")
        return source.image_shape, count[0]

    def test_headers_are_read_once(self):
        self.assertEqual(self.opened(), ((8, 8, 3), 120))
        self.assertEqual(self.opened(), ((8, 8, 3), 32))

    def test_a_file_that_changes_is_looked_at_again(self):
        self.opened()
        path = self.root / "folder/train/a/0001.png"
        path.write_bytes(png(pixels(1, side=9)[0]))
        self.assertIsNone(self.opened()[0])

    def test_a_damaged_answer_is_found_again(self):
        self.opened()
        (kept,) = (self.root / "cache/jaxrobust/index").glob("headers-*.json")
        for content in ("", "{}", "[1"):
            kept.write_text(content)
            self.assertEqual(self.opened(), ((8, 8, 3), 120))

    def test_where_nothing_can_be_written(self):
        (self.root / "cache").write_text("a file")
        for _ in range(2):
            self.assertEqual(self.opened(), ((8, 8, 3), 120))

    @pytest.mark.slow
    def test_fifty_thousand_files_take_five_seconds(self):
        folder = self.root / "many" / "a"
        folder.mkdir(parents=True)
        for number in range(50_000):
            (folder / f"{number}.png").write_bytes(self.files[number % 120])
        start = time.process_time()
        source = data.open_source(f"folder:{self.root}/many", "all")
        self.assertEqual(source.image_shape, (8, 8, 3))
        self.assertLess(time.process_time() - start, 5)
