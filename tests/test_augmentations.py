"""Augmentations on the host, against torchvision's and timm's."""

import functools

import numpy as np
from absl.testing import absltest, parameterized
from PIL import Image

from jaxrobust.data import augmentations
from tests.images import pattern, torchvision


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
                augmentations._resized_crop_box(image.shape, TorchDraws(seed), scale, ratio), box
            )
            bicubic = theirs.InterpolationMode.BICUBIC
            expected = functional.resized_crop(Image.fromarray(image), *box, [24, 24], bicubic)
            ours = augmentations.random_resized_crop(image, TorchDraws(seed), size=24, scale=scale)
            np.testing.assert_array_equal(ours, np.asarray(expected))

    def test_fallback_is_the_largest_central_part(self):
        box = functools.partial(
            augmentations._resized_crop_box, rng=np.random.default_rng(0), scale=(1, 1)
        )
        self.assertEqual(box((10, 90), ratio=(3 / 4, 4 / 3)), (0, 38, 10, 13))
        self.assertEqual(box((90, 10), ratio=(3 / 4, 4 / 3)), (38, 0, 13, 10))
        self.assertEqual(box((32, 32), ratio=(1, 1)), (0, 0, 32, 32))

    def test_areas_and_aspects_fill_their_ranges(self):
        rng = np.random.default_rng(0)
        boxes = [
            augmentations._resized_crop_box((400, 400), rng, (0.08, 1), (3 / 4, 4 / 3))
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
        seen = {augmentations.random_crop(image, rng, padding=2).tobytes() for _ in range(400)}
        self.assertEqual(seen, windows)

    def test_flip_mirrors_half_of_the_time(self):
        image = pattern(4, 5)
        rng = np.random.default_rng(0)
        flipped = 0
        for _ in range(1000):
            out = augmentations.flip(image, rng)
            if not np.array_equal(out, image):
                np.testing.assert_array_equal(out[:, ::-1], image)
                flipped += 1
        self.assertBetween(flipped, 450, 550)  # 3 standard deviations are 47

    @parameterized.parameters("none", "crop", "crop-flip", "resized-crop-flip", "basic")
    def test_presets_keep_type_and_input_and_repeat(self, name):
        chain = augmentations.chain(name, 32)
        for channels in (1, 3):
            image = pattern(40, 56, channels) if chain.resizes else pattern(32, 32, channels)
            image.flags.writeable = False
            outs = []
            for seed in (7, 7):
                out, rng = image, np.random.default_rng(seed)
                for op in chain.ops:
                    out = op(out, rng)
                self.assertEqual((out.shape, out.dtype), ((32, 32, channels), np.uint8))
                outs.append(out)
            np.testing.assert_array_equal(*outs)

    def test_padding_is_4_on_cifar_and_1_on_digits(self):
        for size, padding in ((32, 4), (8, 1)):
            (op,) = augmentations.chain("crop", size).ops
            self.assertEqual(op.keywords, {"padding": padding})

    @parameterized.parameters(
        ("corp", "unknown augmentation 'corp': presets are none, basic"),
        ("crop|flip(2)", "'flip\\(2\\)': flip takes no number"),
        ("resized-crop(a)", "resized-crop takes low, high, narrow, wide .*'a'"),
    )
    def test_chains_that_cannot_be(self, text, message):
        with self.assertRaisesRegex(ValueError, message):
            augmentations.chain(text, 32)


if __name__ == "__main__":
    absltest.main()
