"""Host transforms against torchvision, RobustBench's preprocessing and fixed digests."""

import functools
import hashlib
import io
import warnings

import numpy as np
from absl.testing import absltest, parameterized
from PIL import Image

from jaxrobust.data import transforms
from tests.paths import NO_SHARED, PARITY, SHARED

GOLDEN = SHARED / "golden" / "models" / "preprocessing.npz"
SIZES = ("333x500", "500x375", "181x240")
GOLDEN_IDS = {
    "Res256Crop224": "Res256Crop224",
    "BicubicRes256Crop224": "BicubicRes256Crop224",
    "Res224": "Res224",
    "Crop288": "Crop288",
    "xcit_timm_224_bicubic_crop1.0": "bicubic-224-crop-224",
}


def pattern(height, width, channels=3):
    """A picture with edges and slopes, the same on every machine."""
    y, x, c = np.indices((height, width, channels))
    return ((x * (c + 3) + y * 5 + (x // 7 % 2) * 90 + (y // 11 % 2) * (40 + 30 * c)) % 256).astype(
        np.uint8
    )


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    Image.fromarray(image.squeeze()).save(buffer, kind, **options)
    return buffer.getvalue()


def photographs(count):
    return sorted((SHARED / "data" / "imagenet_samples").glob("*/*.JPEG"))[:count]


def digest(image):
    return hashlib.sha256(image.tobytes()).hexdigest()[:16]


def torchvision(test):
    """torch and torchvision; the test is skipped without them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, on import
        try:
            from tools import torch_reference
        except ImportError:
            test.skipTest(PARITY)
        torch_reference.import_timm()  # declares what torchvision misses on a CPU build
        import torch
        import torchvision

    return torch, torchvision


class DecodeTest(parameterized.TestCase):
    @parameterized.parameters(1, 3)
    def test_channels_stay(self, channels):
        image = pattern(20, 30, channels)
        np.testing.assert_array_equal(transforms.decode(encoded(image, "PNG")), image)

    def test_channels_are_converted_when_asked(self):
        grey, colour = pattern(6, 9, 1), pattern(6, 9, 3)
        np.testing.assert_array_equal(
            transforms.decode(encoded(grey, "PNG"), channels=3), np.repeat(grey, 3, axis=2)
        )
        self.assertEqual(transforms.decode(encoded(colour, "PNG"), channels=1).shape, (6, 9, 1))

    def test_cmyk_and_palette_become_rgb(self):
        for mode, kind in (("CMYK", "JPEG"), ("P", "PNG"), ("RGBA", "PNG")):
            buffer = io.BytesIO()
            Image.fromarray(pattern(8, 8)).convert(mode).save(buffer, kind)
            self.assertEqual(transforms.decode(buffer.getvalue()).shape, (8, 8, 3), mode)

    @parameterized.parameters("JPEG", "PNG")
    def test_a_cut_or_foreign_file_is_refused(self, kind):
        data = encoded(pattern(64, 64), kind)
        for bad in (b"", b"not an image", data[: len(data) // 2], data[:30]):
            with self.assertRaisesRegex(ValueError, "not a whole image file: "):
                transforms.decode(bad)


class EvaluationTest(parameterized.TestCase):
    @parameterized.product(size=SIZES, option=tuple(GOLDEN_IDS))
    def test_robustbench_golden(self, size, option):
        if not GOLDEN.exists():
            self.skipTest(NO_SHARED)
        golden = np.load(GOLDEN)
        ours = transforms.evaluation_transform(GOLDEN_IDS[option])(golden[f"img_{size}"])
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

    @parameterized.parameters(*DIGESTS)
    def test_digest(self, preprocessing, height, width, expected):
        ours = transforms.evaluation_transform(preprocessing)(pattern(height, width))
        self.assertEqual(digest(ours), expected)

    @parameterized.parameters(*DIGESTS)
    def test_torchvision_on_patterns(self, preprocessing, height, width, expected):
        theirs = self.torchvision_evaluation(preprocessing)(Image.fromarray(pattern(height, width)))
        self.assertEqual(digest(np.asarray(theirs)), expected)

    @parameterized.parameters("BicubicRes256Crop224", "Res224", "Crop288", "bicubic-292-crop-256")
    def test_torchvision_on_photographs(self, preprocessing):
        theirs = self.torchvision_evaluation(preprocessing)
        ours = transforms.evaluation_transform(preprocessing)
        if not photographs(1):
            self.skipTest(NO_SHARED)
        for path in photographs(8):
            with Image.open(path) as image:
                expected = np.asarray(theirs(image.convert("RGB")))
                np.testing.assert_array_equal(ours(path.read_bytes()), expected, str(path))
                np.testing.assert_array_equal(ours(image), expected, str(path))

    def torchvision_evaluation(self, preprocessing):
        theirs = torchvision(self)[1].transforms
        bilinear, bicubic = theirs.InterpolationMode.BILINEAR, theirs.InterpolationMode.BICUBIC
        robustbench = {
            "BicubicRes256Crop224": (256, bicubic, 224),
            "Res256Crop224": (256, bilinear, 224),
            "Res224": ((224, 224), bilinear, None),
            "Crop288": (None, bilinear, 288),
        }
        if preprocessing in robustbench:
            resize, mode, crop = robustbench[preprocessing]
        else:
            kind, size, _, crop = preprocessing.split("-")
            resize, mode, crop = int(size), {"bicubic": bicubic}.get(kind, bilinear), int(crop)
        steps = [theirs.Resize(resize, mode)] if resize else []
        return theirs.Compose([*steps, theirs.CenterCrop(crop)] if crop else steps)

    def test_an_image_of_the_right_size_passes_through(self):
        image = pattern(32, 32)
        np.testing.assert_array_equal(transforms.resize_crop(image, resize=32, crop=32), image)

    def test_grey_stays_grey(self):
        image = pattern(40, 50, 1)
        self.assertEqual(transforms.resize_crop(image, resize=9, crop=8).shape, (8, 8, 1))

    @parameterized.parameters("none", "Crop288", "Res224", "bicubic-9-crop-8")
    def test_every_kind_of_image(self, preprocessing):
        transform = transforms.evaluation_transform(preprocessing)
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

    @parameterized.product(
        preprocessing=("none", "Crop288", "Res224", "bicubic-9-crop-8"),
        image=(
            (np.zeros((9, 9, 3), np.float32), r"an image float32 of shape \(9, 9, 3\)"),
            (np.zeros((9, 9), np.uint8), r"an image uint8 of shape \(9, 9\)"),
            (np.zeros((3, 9, 9), np.uint8), r"an image uint8 of shape \(3, 9, 9\)"),
            ("cat.png", "an image of type str"),
        ),
    )
    def test_other_images_are_refused(self, preprocessing, image):
        with self.assertRaisesRegex(
            ValueError, image[1] + r" is unknown; pass a PIL image, .*uint8"
        ):
            transforms.evaluation_transform(preprocessing)(image[0])

    def test_unknown_id(self):
        with self.assertRaisesRegex(ValueError, "unknown preprocessing 'Res99'.*BicubicRes256Crop"):
            transforms.evaluation_transform("Res99")


class TorchDraws:
    """Draws of torchvision's RandomResizedCrop, in its order and precision, as our generator."""

    def __init__(self, seed):
        import torch

        self.torch, self.generator = torch, torch.Generator().manual_seed(seed)

    def uniform(self, low, high):
        return self.torch.empty(1).uniform_(low, high, generator=self.generator).item()

    def integers(self, low, high):
        return self.torch.randint(low, high, (1,), generator=self.generator).item()


class RandomResizedCropTest(parameterized.TestCase):
    # Tall, wide and square; a narrow scale forces the central fallback on the long ones.
    @parameterized.product(
        shape=((40, 60), (60, 40), (33, 33), (10, 90), (90, 10)), scale=((0.08, 1), (0.9, 1))
    )
    def test_boxes_and_pixels_of_torchvision(self, shape, scale):
        torch, vision = torchvision(self)
        theirs, functional = vision.transforms, vision.transforms.functional
        image = pattern(*shape)
        ratio = (3 / 4, 4 / 3)
        for seed in range(40):
            torch.manual_seed(seed)
            box = theirs.RandomResizedCrop.get_params(
                Image.fromarray(image), list(scale), list(ratio)
            )
            self.assertEqual(
                transforms._resized_crop_box(image.shape, TorchDraws(seed), scale, ratio), box
            )
            bicubic = theirs.InterpolationMode.BICUBIC
            expected = functional.resized_crop(Image.fromarray(image), *box, [24, 24], bicubic)
            ours = transforms.random_resized_crop(image, TorchDraws(seed), size=24, scale=scale)
            np.testing.assert_array_equal(ours, np.asarray(expected))

    def test_fallback_is_the_largest_central_part(self):
        box = functools.partial(
            transforms._resized_crop_box, rng=np.random.default_rng(0), scale=(1, 1)
        )
        self.assertEqual(box((10, 90), ratio=(3 / 4, 4 / 3)), (0, 38, 10, 13))
        self.assertEqual(box((90, 10), ratio=(3 / 4, 4 / 3)), (38, 0, 13, 10))
        self.assertEqual(box((32, 32), ratio=(1, 1)), (0, 0, 32, 32))

    def test_areas_and_aspects_fill_their_ranges(self):
        rng = np.random.default_rng(0)
        boxes = [
            transforms._resized_crop_box((400, 400), rng, (0.08, 1), (3 / 4, 4 / 3))
            for _ in range(4000)
        ]
        top, left, height, width = np.array(boxes).T
        self.assertTrue(np.all((top >= 0) & (left >= 0)))
        self.assertTrue(np.all((top + height <= 400) & (left + width <= 400)))
        area, aspect = height * width / 400**2, width / height
        # Rounding to pixels moves the ends by at most 1 / 113 (the side at the least area).
        self.assertBetween(area.min(), 0.078, 0.09)
        self.assertGreater(area.max(), 0.95)
        self.assertBetween(aspect.min(), 0.74, 0.76)
        self.assertBetween(aspect.max(), 1.31, 1.35)
        # Log-uniform is symmetric; 4000 draws of a spread of 0.17 give the mean to 0.003.
        self.assertAlmostEqual(np.log(aspect).mean(), 0, delta=0.012)


class AugmentationTest(parameterized.TestCase):
    def test_random_crop_is_a_shifted_window(self):
        image = pattern(8, 10, 1) // 2 + 1
        padded = np.pad(image, ((2, 2), (2, 2), (0, 0)))
        windows = {
            padded[top : top + 8, left : left + 10].tobytes()
            for top in range(5)
            for left in range(5)
        }
        rng = np.random.default_rng(0)
        seen = {transforms.random_crop(image, rng, padding=2).tobytes() for _ in range(400)}
        self.assertEqual(seen, windows)

    def test_flip_mirrors_half_of_the_time(self):
        image = pattern(4, 5)
        rng = np.random.default_rng(0)
        flipped = 0
        for _ in range(1000):
            out = transforms.flip(image, rng)
            if not np.array_equal(out, image):
                np.testing.assert_array_equal(out[:, ::-1], image)
                flipped += 1
        self.assertBetween(flipped, 450, 550)  # 3 standard deviations are 47

    @parameterized.parameters(*transforms.AUGMENTATIONS)
    def test_rows_keep_type_and_input_and_repeat(self, name):
        row = transforms.AUGMENTATIONS[name]
        for channels in (1, 3):
            image = pattern(40, 56, channels) if row.resizes else pattern(32, 32, channels)
            image.flags.writeable = False
            outs = []
            for seed in (7, 7):
                out, rng = image, np.random.default_rng(seed)
                for op in row.ops(32):
                    out = op(out, rng)
                self.assertEqual((out.shape, out.dtype), ((32, 32, channels), np.uint8))
                outs.append(out)
            np.testing.assert_array_equal(*outs)

    def test_padding_is_4_on_cifar_and_1_on_digits(self):
        for size, padding in ((32, 4), (8, 1)):
            (op,) = transforms.AUGMENTATIONS["crop"].ops(size)
            self.assertEqual(op.keywords, {"padding": padding})


if __name__ == "__main__":
    absltest.main()
