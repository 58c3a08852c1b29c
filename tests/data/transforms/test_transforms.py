"""Preprocessing for evaluation against torchvision, RobustBench's and fixed digests."""

import io
import math
import warnings

import numpy as np
import pytest
from absl.testing import parameterized
from PIL import Image

from jaxrobust.data.transforms import preparing
from tests.support import paths, sweeps
from tests.support.images import (
    digest,
    encoded,
    odd_images,
    pattern,
    photographs,
    pillow,
    torchvision,
)
from tests.support.paths import NO_SHARED, SHARED

GOLDEN = SHARED / "golden" / "models" / "preprocessing.npz"
SIZES = ("333x500", "500x375", "181x240")
GOLDEN_IDS = {
    "Res256Crop224": "Res256Crop224",
    "BicubicRes256Crop224": "BicubicRes256Crop224",
    "Res224": "Res224",
    "Crop288": "Crop288",
    "xcit_timm_224_bicubic_crop1.0": "bicubic-224-crop-224",
}


class EvaluationTest(parameterized.TestCase):
    @sweeps.rows(
        (448, 224, True),  # two pixels become one
        (300, 256, True),  # 75 become 64
        (300, 224, False),  # 75 become 56, no power of two
        (256, 224, False),
        (65_535, 256, True),
        (65_537, 256, False),  # float32 does not hold its multiples of 1 / 256
    )
    def test_parts_that_can_be_resized_alone(self, size, resized, exact):
        self.assertEqual(preparing._exact(size, resized), exact)

    @sweeps.rows(*sweeps.product(size=SIZES, option=tuple(GOLDEN_IDS)))
    def test_robustbench_golden(self, size, option):
        if not GOLDEN.exists():
            self.skipTest(NO_SHARED)
        golden = np.load(GOLDEN)
        ours = preparing.evaluation_transform(GOLDEN_IDS[option])(golden[f"img_{size}"])
        np.testing.assert_array_equal(ours, golden[f"{option}__{size}"].transpose(1, 2, 0))

    # Digests of torchvision 0.28.0's output (Pillow 13) on `pattern(height, width)`; made by
    # `torchvision_evaluation` below, which checks them whenever torchvision is there.
    DIGESTS = (
        ("BicubicRes256Crop224", 333, 500, "1f7b6b960af0080b"),
        ("BicubicRes256Crop224", 261, 260, "77ff92947f1d5815"),
        ("Res256Crop224", 500, 375, "dac430e9c13b7e37"),
        ("Res224", 181, 240, "469336389b812ace"),
        ("Crop288", 301, 240, "bd6642f9942356c4"),
        ("bicubic-36-crop-32", 41, 33, "e321fb731e1cd39b"),
        ("bilinear-248-crop-224", 248, 331, "c77a3192e3daacfb"),
    )

    @sweeps.rows(*DIGESTS)
    def test_digest(self, preprocessing, height, width, expected):
        ours = preparing.evaluation_transform(preprocessing)(pattern(height, width))
        self.assertEqual(digest(ours), expected)

    # The same of the goldens of `img_181x240`, which tests/golden/preprocessing.npz holds.
    GOLDEN_DIGESTS = (
        ("Res256Crop224", "c9e350f1729d084e"),
        ("BicubicRes256Crop224", "8c701c02ea8d071d"),
        ("Res224", "6c8fecdad75a314a"),
        ("Crop288", "6fe6260071c00da7"),
        ("bicubic-1.0", "abff8fe4ad5b54e7"),
    )

    @sweeps.rows(*GOLDEN_DIGESTS)
    def test_golden_digest(self, preprocessing, expected):
        with np.load(paths.GOLDEN / "preprocessing.npz") as golden:
            image = golden["image"]
        name = preparing.resolve(preprocessing, 224)
        self.assertEqual(digest(preparing.evaluation_transform(name)(image)), expected)

    def test_an_image_of_the_right_size_passes_through(self):
        image = pattern(32, 32)
        np.testing.assert_array_equal(preparing.resize_crop(image, resize=32, crop=32), image)

    def test_grey_stays_grey(self):
        image = pattern(40, 50, 1)
        self.assertEqual(preparing.resize_crop(image, resize=9, crop=8).shape, (8, 8, 1))

    @sweeps.fast(2)
    @parameterized.product(resample=(preparing.BICUBIC, preparing.BILINEAR), channels=(1, 3))
    def test_only_what_the_crop_needs(self, resample, channels):
        """Sizes whose ratio is exact and others, both ways up, kernels cut off at the edges."""
        rng = np.random.default_rng(channels)
        for round_ in range(80):
            height, width = rng.integers(4, 400, 2).tolist()
            resize = int(rng.choice([32, 64, 96, 128, 20, 55, 100, 151]))
            crop = int(rng.choice([resize, resize * 7 // 8, rng.integers(1, resize + 1)]))
            if round_ % 8 == 0:
                height, width = 7 + round_, 5000  # far from the edges
            if round_ % 4 == 0:
                height, width = width, height
            image = pattern(height, width, channels)
            far = int(resize * max(height, width) / min(height, width))
            size = (resize, far) if width <= height else (far, resize)
            top, left = round((size[1] - crop) / 2), round((size[0] - crop) / 2)
            whole = Image.fromarray(image.squeeze()).resize(size, resample)
            expected = np.asarray(whole.crop((left, top, left + crop, top + crop)))
            found = preparing.resize_crop(image, resize=resize, crop=crop, resample=resample)
            np.testing.assert_array_equal(
                found.squeeze(), expected.squeeze(), f"{height}x{width} {resize} {crop}"
            )

    def test_windows_of_rgbx_pixels(self):
        pixels = np.dstack([pattern(20, 30), np.full((20, 30), 255, np.uint8)])
        image = pixels[:, :, :3]
        windows = (image, image[3:], image[:, 5:], image[19:, 29:], image[7:9, 4:11], image[:, 7:8])
        others = (
            image[::-1],
            image[:, ::-1],
            image[::2],
            image[:, ::3],
            image[:0],
            pixels[..., 1:],
        )
        for number, window in enumerate(windows + others):
            if window.size:
                np.testing.assert_array_equal(
                    preparing.to_array(preparing.to_pil(window)), window, str(number)
                )

    @sweeps.rows("none", "Crop288", "Res224", "bicubic-9-crop-8")
    def test_every_kind_of_image(self, preprocessing):
        transform = preparing.evaluation_transform(preprocessing)
        image = pattern(40, 50)
        expected = transform(image)
        data = encoded(image, "PNG")
        image.flags.writeable = False
        for kind in (
            image,
            np.asfortranarray(image),
            data,
            bytearray(data),
            memoryview(data),
            Image.fromarray(image),
        ):
            out = transform(kind)
            np.testing.assert_array_equal(out, expected)
            self.assertEqual(out.dtype, np.uint8)
            self.assertTrue(out.flags.c_contiguous and out.flags.writeable and out.base is None)

    @sweeps.rows(*odd_images())
    def test_an_image_that_pillow_opened(self, name):
        data = odd_images()[name]
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            before = image.mode, dict(image.info), image.tobytes()
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # Pillow's, of transparency that is lost
                found = preparing.evaluation_transform("none")(image)
            self.assertEqual((image.mode, dict(image.info), image.tobytes()), before)
        np.testing.assert_array_equal(found, pillow(data))

    @sweeps.rows(
        *sweeps.product(
            preprocessing=("none", "Crop288", "Res224", "bicubic-9-crop-8"),
            image=(
                (np.zeros((9, 9, 3), np.float32), r"an image of float32\(9, 9, 3\) is"),
                (np.zeros((9, 9), np.uint8), r"an image of uint8\(9, 9\) is"),
                (np.zeros((3, 9, 9), np.uint8), r"an image of uint8\(3, 9, 9\) is"),
                ("cat.png", "images of type str are"),
            ),
        )
    )
    def test_other_images_are_refused(self, preprocessing, image):
        with self.assertRaisesRegex(
            ValueError, image[1] + r" not supported; pass a PIL image, .*uint8"
        ):
            preparing.evaluation_transform(preprocessing)(image[0])

    def test_unknown_id(self):
        with self.assertRaisesRegex(ValueError, "unknown preprocessing 'Res99'.*BicubicRes256Crop"):
            preparing.evaluation_transform("Res99")

    @sweeps.rows("bicubic-0-crop-0", "bicubic-0-crop-32", "bicubic-32-crop-0", "bilinear-00-crop-8")
    def test_size_of_zero(self, preprocessing):
        with self.assertRaisesRegex(
            ValueError, f"preprocessing '{preprocessing}': its sizes must be at least 1 pixel"
        ):
            preparing.evaluation_transform(preprocessing)


class ResolveTest(parameterized.TestCase):
    @sweeps.rows(
        ("bicubic-0.875", 224, "bicubic-256-crop-224"),
        ("bicubic-0.875", 256, "bicubic-292-crop-256"),  # the main paper's
        ("bicubic-0.875", 288, "bicubic-329-crop-288"),
        ("bicubic-0.875", 320, "bicubic-365-crop-320"),
        ("bicubic-0.9", 224, "bicubic-248-crop-224"),  # DeiT
        ("bilinear-0.95", 224, "bilinear-235-crop-224"),
        ("bicubic-1.0", 224, "bicubic-224-crop-224"),  # XCiT
        ("bicubic-1", 32, "bicubic-32-crop-32"),
        ("Res256Crop224", 288, "Res256Crop224"),
        ("bicubic-36-crop-32", 224, "bicubic-36-crop-32"),
        ("None", 224, "none"),
        (None, 224, "none"),
    )
    def test_sizes(self, preprocessing, size, expected):
        self.assertEqual(preparing.resolve(preprocessing, size), expected)
        preparing.evaluation_transform(expected)

    @sweeps.rows("None", None, "none")
    def test_none(self, preprocessing):
        image = pattern(5, 4)
        np.testing.assert_array_equal(preparing.evaluation_transform(preprocessing)(image), image)

    def test_a_share_must_be_resolved(self):
        with self.assertRaisesRegex(ValueError, "'bicubic-0.9' depends .*'bicubic-248-crop-224'"):
            preparing.evaluation_transform("bicubic-0.9")

    @sweeps.rows("bicubic-1.1", "bicubic-2", "cubic-0.9", "bicubic-.9", "bicubic--0.9")
    def test_no_share(self, preprocessing):
        self.assertEqual(preparing.resolve(preprocessing, 224), preprocessing)
        with self.assertRaisesRegex(ValueError, "unknown preprocessing .*bicubic-SHARE"):
            preparing.evaluation_transform(preprocessing)

    def test_share_of_zero(self):
        with self.assertRaisesRegex(ValueError, r"'bicubic-0.00': the share must be in \(0, 1\]"):
            preparing.resolve("bicubic-0.00", 224)

    @sweeps.rows("0.875", "0.965", "1.0", "0.7")
    def test_every_size_is_timms(self, share):
        torchvision(self)
        import timm

        for size in range(8, 513):
            theirs = timm.data.create_transform(
                size, interpolation="bilinear", crop_pct=float(share)
            ).transforms
            resize, crop = theirs[0].size, theirs[1].size
            self.assertEqual(theirs[0].interpolation.value, "bilinear")
            self.assertEqual(
                preparing.resolve(f"bilinear-{share}", size),
                f"bilinear-{resize}-crop-{crop[0]}",
            )


# Every id, with the size of the network for those that depend on it.
EVERY_ID = (
    ("none", 224),
    ("Res256Crop224", 224),
    ("BicubicRes256Crop224", 224),
    ("Res224", 224),
    ("Crop288", 288),
    ("bicubic-0.875", 320),
    ("bicubic-0.9", 224),
    ("bilinear-0.95", 224),
    ("bicubic-1.0", 224),
    ("bilinear-36-crop-40", 40),
)


class Reference(parameterized.TestCase):
    """`Image.open(file).convert("RGB")` and torchvision, against bytes and against the image."""

    def files(self, count):
        if not photographs(1):
            self.skipTest(NO_SHARED)
        return {str(path): path.read_bytes() for path in photographs(count)}

    def check(self, preprocessing, size, files):
        theirs = self.reference(preprocessing, size)
        ours = preparing.evaluation_transform(preparing.resolve(preprocessing, size))
        for name, data in files.items():
            image = Image.fromarray(pillow(data))
            expected = np.asarray(theirs(image))
            np.testing.assert_array_equal(ours(data), expected, name)
            np.testing.assert_array_equal(ours(image), expected, name)

    def reference(self, preprocessing, size):
        """torchvision's steps, written from RobustBench's and timm's documentation."""
        theirs = torchvision(self)[1].transforms
        modes = theirs.InterpolationMode
        kind, *numbers = preprocessing.split("-")
        if len(numbers) == 1:
            numbers = [math.floor(size / float(numbers[0])), None, size]
        if preprocessing == "none":
            return theirs.Compose([])
        if preprocessing == "Res224":
            return theirs.Resize((224, 224), modes.BILINEAR)
        resize, mode, crop = {
            "BicubicRes256Crop224": (256, modes.BICUBIC, 224),
            "Res256Crop224": (256, modes.BILINEAR, 224),
            "Crop288": (None, None, 288),
        }.get(preprocessing) or (int(numbers[0]), modes(kind), int(numbers[2]))
        steps = [theirs.Resize(resize, mode)] if resize else []
        return theirs.Compose([*steps, theirs.CenterCrop(crop)])


class TorchvisionTest(Reference):
    @sweeps.rows(*EvaluationTest.DIGESTS)
    def test_patterns(self, preprocessing, height, width, expected):
        theirs = self.reference(preprocessing, 224)(Image.fromarray(pattern(height, width)))
        self.assertEqual(digest(np.asarray(theirs)), expected)

    @sweeps.rows(*EVERY_ID)
    def test_odd_images(self, preprocessing, size):
        self.check(preprocessing, size, odd_images())

    @sweeps.rows(*EVERY_ID[:3])
    def test_photographs(self, preprocessing, size):
        self.check(preprocessing, size, self.files(10))

    @sweeps.rows("Res256Crop224", "BicubicRes256Crop224", "Res224", "Crop288", None)
    def test_robustbench(self, preprocessing):
        torchvision(self)
        from jaxrobust.publish import torch_networks

        try:
            torch_networks.import_robustbench()
        except ImportError as error:
            self.skipTest(str(error))
        from robustbench.data import PREPROCESSINGS

        ours = preparing.evaluation_transform(preprocessing)
        photographed = {str(path): path.read_bytes() for path in photographs(6)}
        for name, data in {**odd_images(), **photographed}.items():
            theirs = PREPROCESSINGS[preprocessing](Image.fromarray(pillow(data)))
            # ToTensor divides by 255 in float32
            np.testing.assert_array_equal(
                ours(data).astype(np.float32) / np.float32(255),
                theirs.permute(1, 2, 0).numpy(),
                name,
            )


@pytest.mark.slow
class EveryPhotographTest(Reference):
    @parameterized.parameters(*EVERY_ID)
    def test_photographs(self, preprocessing, size):
        self.check(preprocessing, size, self.files(200))


class NamesTest(parameterized.TestCase):
    @sweeps.rows(
        ("Res256Crop224", "bilinear-256-crop-224", 224, True),
        ("BicubicRes256Crop224", "bicubic-256-crop-224", 224, True),
        ("BicubicRes256Crop224", "bicubic-0.875", 224, True),
        ("BicubicRes256Crop224", "bicubic-0.875", 288, False),
        ("Res256Crop224", "BicubicRes256Crop224", 224, False),
        ("Res256Crop224", "bilinear-0.875", 224, True),
        ("bicubic-0.9", "bicubic-0.90", 64, True),
        ("bicubic-0.9", "bilinear-0.9", 64, False),
        ("none", "none", 32, True),
    )
    def test_two_names_of_one_preprocessing(self, first, second, size, same):
        self.assertEqual(preparing.same_preprocessing(first, second, size), same)
        self.assertEqual(preparing.same_preprocessing(second, first, size), same)
