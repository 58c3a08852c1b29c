"""Augmentations on the host, against torchvision's and timm's."""

import functools
import pickle
import random
from unittest import mock

import numpy as np
from absl.testing import parameterized
from PIL import Image
from scipy import stats

from jaxrobust.data.transforms import augmentations, operations, policies
from jaxrobust.data.transforms.presets import PRESETS
from tests.support import sweeps
from tests.support.images import pattern, torchvision


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
    # Tall, wide and square; a narrow scale forces the central fallback on the long ones. Parts
    # larger than the image are drawn again.
    @sweeps.rows(
        *sweeps.product(
            shape=((40, 60), (60, 40), (33, 33), (10, 90), (90, 10)),
            scale=((0.08, 1), (0.9, 1), (0.8, 1.2)),
        )
    )
    def test_boxes_and_pixels_of_torchvision(self, shape, scale):
        torch, vision = torchvision(self)
        theirs, functional = vision.transforms, vision.transforms.functional
        image = pattern(*shape)
        ratio = (3 / 4, 4 / 3)
        for seed in range(15):
            torch.manual_seed(seed)
            box = theirs.RandomResizedCrop.get_params(
                Image.fromarray(image), list(scale), list(ratio)
            )
            self.assertEqual(
                augmentations._resized_crop_box(image.shape, TorchDraws(seed), scale, ratio), box
            )
            bicubic = theirs.InterpolationMode.BICUBIC
            expected = functional.resized_crop(Image.fromarray(image), *box, [24, 24], bicubic)
            for given in (image, Image.fromarray(image)):
                draws = TorchDraws(seed)
                ours = augmentations.random_resized_crop(given, draws, size=24, scale=scale)
                np.testing.assert_array_equal(ours, expected)

    def test_fallback_is_the_largest_central_part(self):
        box = functools.partial(
            augmentations._resized_crop_box, rng=np.random.default_rng(0), scale=(1, 1)
        )
        self.assertEqual(box((10, 90), ratio=(3 / 4, 4 / 3)), (0, 38, 10, 13))
        self.assertEqual(box((90, 10), ratio=(3 / 4, 4 / 3)), (38, 0, 13, 10))
        self.assertEqual(box((32, 32), ratio=(1, 1)), (0, 0, 32, 32))
        for shape in ((40, 36), (36, 40)):  # within the ratios it is whole, if nothing fits
            found = box(shape, scale=(4, 4), ratio=(3 / 4, 4 / 3))
            self.assertEqual(found, (0, 0, *shape))


class CropDrawTest(parameterized.TestCase):
    # The whole image (areas above 1) is as frequent as timm has it.
    @sweeps.rows(((0.08, 1), (3 / 4, 4 / 3), (375, 500)), ((0.8, 1.2), (0.95, 1.05), (32, 32)))
    def test_areas_ratios_and_places_of_timm(self, scale, ratio, shape):
        torchvision(self)  # or skip
        from timm.data.transforms import RandomResizedCropAndInterpolation as Theirs

        random.seed(0)
        rng, image = np.random.default_rng(0), Image.new("L", shape[::-1])
        theirs = np.array([Theirs.get_params(image, scale, ratio) for _ in range(5000)]).T
        ours = np.array(
            [augmentations._resized_crop_box(shape, rng, scale, ratio) for _ in range(5000)]
        ).T

        def share(box):  # of the way that the part can move
            top, left, height, width = box
            return (top + 0.5) / (shape[0] - height + 1), (left + 0.5) / (shape[1] - width + 1)

        for name, measure in {
            "area": lambda box: box[2] * box[3],
            "aspect": lambda box: box[3] / box[2],
            "top": lambda box: share(box)[0],
            "left": lambda box: share(box)[1],
        }.items():
            with self.subTest(name):
                self.assertGreater(stats.ks_2samp(measure(ours), measure(theirs)).pvalue, 1e-3)


class AugmentationTest(parameterized.TestCase):
    @sweeps.rows(1, 3)
    def test_random_crop_is_a_shifted_window(self, channels):
        image = pattern(8, 10, channels).squeeze() // 2 + 1
        padded = np.pad(image, ((2, 2), (2, 2), (0, 0))[: image.ndim])
        windows = {
            padded[top : top + 8, left : left + 10].tobytes()
            for top in range(5)
            for left in range(5)
        }
        rng, image = np.random.default_rng(0), Image.fromarray(image)
        seen = {augmentations.random_crop(image, rng, padding=2).tobytes() for _ in range(400)}
        self.assertEqual(seen, windows)

    def test_flip_mirrors_half_of_the_time(self):
        array = pattern(4, 5)
        image, rng = Image.fromarray(array), np.random.default_rng(0)
        flipped = 0
        for _ in range(1000):
            out = augmentations.flip(image, rng)
            if out is not image:
                np.testing.assert_array_equal(out, array[:, ::-1])
                flipped += 1
        self.assertBetween(flipped, 450, 550)  # 3 standard deviations are 47

    @sweeps.rows(0.3, -1.9, 20.0, 2.0)
    def test_rotation_makes_the_bytes_of_torchvision(self, angle):
        _, vision = torchvision(self)
        theirs = vision.transforms.RandomRotation(20)
        rng = mock.Mock(uniform=lambda *_: angle)
        for array in (pattern(40, 56), pattern(33, 32, 1)):
            image = Image.fromarray(array.squeeze())
            with mock.patch.object(theirs, "get_params", lambda *_: angle):
                expected = theirs(image)
            ours = augmentations.rotate(image, rng, degrees=20)
            np.testing.assert_array_equal(ours, expected)

    def test_rotations_are_uniform_on_both_sides(self):
        drawn, rng, image = [], np.random.default_rng(0), pattern(2, 2)
        with mock.patch.object(operations, "rotate", lambda i, angle, _: drawn.append(angle) or i):
            for _ in range(5000):
                augmentations.rotate(image, rng, degrees=2)
        self.assertGreater(stats.kstest(drawn, stats.uniform(-2, 4).cdf).pvalue, 1e-3)

    def test_presets_that_change_batches(self):
        """All others leave images unmixed and whole, and labels as sharp as they are."""
        off = {"mixup": 0, "cutmix": 0, "erase": 0, "label_smoothing": 0}
        own = {name: preset._asdict() for name, preset in PRESETS.items()}
        changing = {n for n, preset in own.items() if {k: preset[k] for k in off} != off}
        self.assertEqual(changing, {"3-augment", "heavy", "light-cifar-thesis"})
        mixed = {"mixup": 0.8, "cutmix": 1.0}  # of DeiT, and so of DeiT III
        heavy = mixed | {"erase": 0.25, "label_smoothing": 0.1}
        for name, values in (("3-augment", mixed), ("heavy", heavy),
                             ("light-cifar-thesis", {"erase": 0.2})):  # fmt: skip
            self.assertEqual({k: own[name][k] for k in off}, off | values, name)

    @sweeps.rows(*PRESETS)
    def test_presets_keep_type_and_input_and_repeat(self, name):
        chain = pickle.loads(pickle.dumps(augmentations.chain(name, 32)))  # as workers get it
        for channels in (1, 3):
            image = pattern(40, 56, channels) if chain.resizes else pattern(32, 32, channels)
            image.flags.writeable = False
            outs = []
            for seed in (7, 7):
                out = chain.augment(image, np.random.default_rng(seed))
                self.assertEqual((out.shape, out.dtype), ((32, 32, channels), np.uint8))
                outs.append(out)
            np.testing.assert_array_equal(*outs)

    def test_padding_is_4_on_cifar_and_1_on_digits(self):
        for text, size, padding in (
            *(("crop", 32, 4), ("crop", 8, 1), ("crop(2)", 32, 2)),
            *(("crop", 7, 1), ("crop(0)", 7, 0), ("crop", 224, 28)),
        ):
            (op,) = augmentations.chain(text, size).augment.keywords["ops"]
            self.assertEqual(op.keywords, {"padding": padding})

    @sweeps.rows(
        *("randaugment(0, 0, 0, 0)", "randaugment(10, 10, 15, 255)", "crop(32)", "rotate(180)"),
        *("blur(1, 1, 1)", "resized-crop(1, 1, 1, 1)", "solarize(0, 256)", "jitter(0, 0, 0, 0.5)"),
        *("autoaugment(255)", "autoaugment-robustart(0)", "grey(0)", "flip(1)", "crop()"),
    )
    def test_chains_at_the_ends_of_what_can_be(self, text):
        chain = augmentations.chain(text, 32)
        image = pattern(32, 32, 3)
        out = chain.augment(image, np.random.default_rng(0))
        self.assertEqual((out.shape, out.dtype), (image.shape, np.uint8))
        self.assertEqual(chain.resizes, text.startswith("resized-crop"))

    @sweeps.rows(
        ("autoaugment()", policies.TORCHVISION, 0, "cifar10"),
        ("autoaugment-imagenet", policies.TORCHVISION, 0, "imagenet"),
        ("autoaugment-robustart", policies.ROBUSTART, 128, "cifar10"),
        ("autoaugment-robustart-imagenet", policies.ROBUSTART, 128, "imagenet"),
        ("autoaugment(7)", policies.TORCHVISION, 7, "cifar10"),
    )
    def test_policies_and_what_they_leave_behind(self, text, rows, fill, policy):
        (op,) = augmentations.chain(text, 32).augment.keywords["ops"]
        self.assertIs(op.keywords["rows"], rows)
        self.assertEqual((op.keywords["fill"], op.keywords["policy"]), (fill, policy))

    @sweeps.rows(
        ("corp", "unknown augmentation 'corp': presets are none, basic"),
        ("crop|flip(2)", "'flip\\(2\\)': flip takes p .2 is not between 0 and 1"),
        ("3-augment(2)", "3-augment takes no number"),
        ("3aug", "'3aug' is now called '3-augment' .from DeiT III.; for .* 3-Aug .* write 'light'"),
        ("flip|3aug", "'3aug' is now called '3-augment'"),
        ("crop(1.5)", "crop takes padding .1.5 is not a whole number between 0 and 32"),
        ("rotate", "rotate takes degrees"),
        ("rotate(nan)", "numbers must be finite"),
        ("rotate(-1)", "-1 is not between 0 and 180"),
        ("jitter", "jitter takes brightness, contrast, saturation, hue"),
        ("jitter(0.1,0.1,0.1,0.6)", "the hue"),
        ("jitter(-0.1)", "at least 0"),
        ("grey(1.5)", "grey takes p .1.5 is not between 0 and 1"),
        ("blur(1, 2, 1)", "2 to 1 must be positive"),
        ("resized-crop(0)", "0 to 1 must be positive"),
        ("randaugment(11)", "11 is not between 0 and 10"),
        ("randaugment(9, 0.5, 1.5)", "1.5 is not a whole number"),
        ("autoaugment(256)", "autoaugment takes fill .256 is not a whole number between 0 and 255"),
        ("resized-crop(a)", "resized-crop takes low, high, narrow, wide .*'a'"),
    )
    def test_chains_that_cannot_be(self, text, message):
        with self.assertRaisesRegex(ValueError, message):
            augmentations.chain(text, 32)
