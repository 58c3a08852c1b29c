"""Preprocessing for evaluation against torchvision, RobustBench's and fixed digests."""

import numpy as np
from absl.testing import absltest, parameterized
from PIL import Image

from jaxrobust.data import transforms
from tests.images import digest, encoded, pattern, photographs, torchvision
from tests.paths import NO_SHARED, SHARED

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


if __name__ == "__main__":
    absltest.main()
