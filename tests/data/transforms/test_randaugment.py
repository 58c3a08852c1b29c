"""RandAugment against timm's own objects, and AutoAugment against torchvision's."""

import collections
import itertools
import random
from unittest import mock

import numpy as np
import pytest
from absl.testing import absltest, parameterized
from PIL import Image, ImageEnhance, ImageOps
from scipy import stats

from jaxrobust.data.transforms import policies
from jaxrobust.data.transforms.operations import Canvas
from tests.support import sweeps
from tests.support.images import pattern, photographs, torchvision

BICUBIC, NEAREST = Image.Resampling.BICUBIC, Image.Resampling.NEAREST
_THEIR_NAMES = {  # where they are not ours
    "Posterize": "PosterizeIncreasing",
    "Solarize": "SolarizeIncreasing",
    "Color": "ColorIncreasing",
    "Contrast": "ContrastIncreasing",
    "Brightness": "BrightnessIncreasing",
    "Sharpness": "SharpnessIncreasing",
    "TranslateX": "TranslateXRel",
    "TranslateY": "TranslateYRel",
}


def timm_randaugment(test, mean=(0, 0, 0)):
    """(timm's module of ops, its RandAugment of the heavy recipe)."""
    torchvision(test)  # or skip
    from timm.data import auto_augment, create_transform

    text = "rand-m9-mstd0.5-inc1"
    transform = create_transform(
        224, is_training=True, auto_augment=text, interpolation="bicubic", mean=mean, std=(1, 1, 1)
    )
    (op,) = [t for t in transform.transforms if isinstance(t, auto_augment.RandAugment)]
    return auto_augment, op


def pictures(sizes):
    """Real photographs at those (width, height), and drawn ones, in color and gray."""
    photos = [Image.open(path).convert("RGB") for path in photographs(len(sizes))]
    drawn = pattern(40, 56)
    return [
        *(photo.resize(size, BICUBIC) for photo, size in zip(photos, sizes, strict=False)),
        Image.fromarray(drawn),
        Image.fromarray(drawn[:, :, 0]),
    ]


def same_frequencies(test, ours, theirs, floor=1e-3):
    """Two-sample chi-square of lists of things."""
    kinds = sorted(set(ours) | set(theirs))
    counts = [collections.Counter(ours), collections.Counter(theirs)]
    table = [[count[kind] for kind in kinds] for count in counts]
    test.assertGreater(stats.chi2_contingency(table).pvalue, floor, (kinds, table))


class RandAugmentOpTest(parameterized.TestCase):
    @sweeps.rows(*policies.RANDAUGMENT)
    def test_bytes_of_timm(self, name):
        module, theirs = timm_randaugment(self)
        row = policies.RANDAUGMENT[name]
        (op,) = [op for op in theirs.ops if op.name == _THEIR_NAMES.get(name, name)]
        op.prob, op.magnitude_std = 1, 0
        canvas = Canvas(BICUBIC, fill=0)
        for image in pictures([(224, 224), (224, 224), (97, 130)]):
            # Gray images need one number where timm has the three of a color.
            op.kwargs["fillcolor"] = (0, 0, 0) if image.mode == "RGB" else 0
            for level in (0, 3.7, 5, 9, 9.63, 10):
                for sign in (-1, 1):
                    ours = row.change(image, row.number(sign * level / 10), canvas)
                    if name == "Posterize" and level == 10:
                        self.assertFalse(np.asarray(ours).any())  # timm asks Pillow for 0 bits
                        continue
                    op.magnitude = level
                    with mock.patch.object(module, "_randomly_negate", lambda v, s=sign: s * v):
                        expected = op(image)
                    np.testing.assert_array_equal(ours, expected, f"{name} {level} {sign}")

    @sweeps.rows("Rotate", "ShearX", "TranslateY")
    def test_fill_is_the_mean_of_timm(self, name):
        module, theirs = timm_randaugment(self, mean=(128 / 255,) * 3)
        (op,) = [op for op in theirs.ops if op.name == _THEIR_NAMES.get(name, name)]
        op.prob, op.magnitude_std = 1, 0
        row = policies.RANDAUGMENT[name]
        image = pictures([(224, 224)])[0]
        with mock.patch.object(module, "_randomly_negate", lambda v: v):
            expected = op(image)
        ours = row.change(image, row.number(0.9), Canvas(BICUBIC, fill=128))
        np.testing.assert_array_equal(ours, expected)

    def test_ops_are_those_of_timm(self):
        _, theirs = timm_randaugment(self)
        names = [_THEIR_NAMES.get(name, name) for name in policies.RANDAUGMENT]
        self.assertEqual(names, [op.name for op in theirs.ops])


class RandAugmentDrawTest(absltest.TestCase):
    @pytest.mark.slow
    def test_frequencies_and_numbers_of_timm(self):
        _, theirs = timm_randaugment(self)
        ours_names = {theirs: ours for ours, theirs in _THEIR_NAMES.items()}
        count, happened = 75_000, []  # 5,000 of each op
        for op in theirs.ops:
            name = ours_names.get(op.name, op.name)
            # timm gives some ops no number, where ours is 0.
            op.aug_fn = lambda image, number=0, name=name, **_: happened.append((name, number))
        random.seed(0)
        np.random.seed(0)
        expected = []
        for _ in range(count):
            happened.clear()
            theirs(None)
            expected.append(tuple(happened))
        rng = np.random.default_rng(0)
        ours = [
            tuple(policies.draw_randaugment(rng, magnitude=9, std=0.5, ops=2)) for _ in range(count)
        ]

        same_frequencies(self, [len(plan) for plan in ours], [len(plan) for plan in expected])
        pairs = [
            [tuple(name for name, _ in plan) for plan in plans if len(plan) == 2]
            for plans in (ours, expected)
        ]
        same_frequencies(self, *pairs)  # order and repetition
        numbers = [collections.defaultdict(list), collections.defaultdict(list)]
        for plans, by_name in zip((ours, expected), numbers, strict=True):
            for name, number in (change for plan in plans for change in plan):
                by_name[name].append(number)
        same_frequencies(self, *[[n for n in by for _ in by[n]] for by in numbers])
        for name, values in numbers[0].items():
            with self.subTest(name):
                self.assertGreater(min(len(values), len(numbers[1][name])), 4700)
                if len(set(values)) < 5:
                    same_frequencies(self, values, numbers[1][name])
                else:
                    p = stats.ks_2samp(values, numbers[1][name]).pvalue
                    self.assertGreater(p, 1e-3)

        moving = ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY")
        strengths = [
            np.concatenate([np.abs(by[name]) / np.max(np.abs(by[name])) for name in moving])
            for by in numbers
        ]
        same_frequencies(self, *[(values == 1).tolist() for values in strengths])  # clipped
        # 25,000 numbers each give a standard deviation to 0.45%, their ratio to 0.63%.
        self.assertAlmostEqual(strengths[0].std() / strengths[1].std(), 1, delta=0.02)

    def test_strengths_end_at_ten_and_at_zero(self):
        """Drawn far apart, most lie outside: they become the ends, 30 degrees or none."""
        rng = np.random.default_rng(3)
        plans = [policies.draw_randaugment(rng, magnitude=5, std=40, ops=8) for _ in range(300)]
        turns = np.abs([number for plan in plans for name, number in plan if name == "Rotate"])
        self.assertEqual((turns.min(), turns.max()), (0, 30))
        for end in (0, 30):
            self.assertBetween(np.mean(turns == end), 0.3, 0.6)

    def test_strength_and_count_follow_the_arguments(self):
        rng = np.random.default_rng(1)
        plans = [policies.draw_randaugment(rng, magnitude=3, std=0, ops=5) for _ in range(2000)]
        rotations = {abs(n) for plan in plans for name, n in plan if name == "Rotate"}
        np.testing.assert_allclose(list(rotations), [9])
        self.assertEqual(max(map(len, plans)), 5)
        self.assertAlmostEqual(np.mean([len(plan) for plan in plans]), 2.5, delta=0.1)


class RandAugmentTest(parameterized.TestCase):
    @sweeps.rows(
        (policies.randaugment, 1),
        (policies.randaugment, 3),
        (policies.autoaugment, 1),
        (policies.autoaugment, 3),
    )
    def test_keeps_type_and_input_and_repeats(self, op, channels):
        array = pattern(24, 30, channels)
        image = Image.fromarray(array.squeeze())
        outs = [
            [np.asarray(op(image, np.random.default_rng(seed))) for seed in range(60)]
            for _ in range(2)
        ]
        np.testing.assert_array_equal(image, array.squeeze())
        np.testing.assert_array_equal(*outs)
        self.assertEqual({out.shape for out in outs[0]}, {array.squeeze().shape})
        self.assertEqual({out.dtype for out in outs[0]}, {np.dtype(np.uint8)})
        kept = sum(np.array_equal(out, image) for out in outs[0])
        self.assertBetween(kept, 5, 40)

    def test_the_plan_is_what_happens(self):
        image = Image.fromarray(pattern(24, 30))
        for seed in range(20):
            plan = policies.draw_randaugment(
                np.random.default_rng(seed), magnitude=9, std=0.5, ops=2
            )
            changed = image
            for name, number in plan:
                row = policies.RANDAUGMENT[name]
                changed = row.change(changed, number, Canvas(BICUBIC, 0))
            ours = policies.randaugment(image, np.random.default_rng(seed))
            np.testing.assert_array_equal(ours, changed)


class AutoAugmentTest(parameterized.TestCase):
    def policy(self, name):
        """(torch, torchvision's module, its transform)."""
        torch, vision = torchvision(self)
        module = vision.transforms.autoaugment
        return torch, module, module.AutoAugment(module.AutoAugmentPolicy(name), fill=128)

    @sweeps.rows("cifar10", "imagenet")
    def test_policies_of_torchvision(self, name):
        _, _, theirs = self.policy(name)
        expected = tuple(
            tuple((op, p, level or 0) for op, p, level in pair) for pair in theirs.policies
        )
        self.assertEqual(policies.POLICIES[name], expected)

    @sweeps.rows(*policies.TORCHVISION)
    def test_bytes_of_torchvision(self, name):
        _, module, theirs = self.policy("cifar10")
        row = policies.TORCHVISION[name]
        for image in pictures([(32, 32), (32, 32), (224, 224), (50, 331)]):
            values, signed = theirs._augmentation_space(10, image.size[::-1])[name]
            side = image.width if name == "TranslateX" else image.height
            for level, sign in itertools.product(range(10), (-1, 1)):
                magnitude = float(values[level]) if values.ndim else 0.0
                magnitude = sign * magnitude if signed else magnitude
                expected = module._apply_op(
                    image, name, magnitude, theirs.interpolation, theirs.fill
                )
                ours = row.change(image, row.number(sign, level, side), Canvas(NEAREST, fill=128))
                np.testing.assert_array_equal(ours, expected, f"{name} {level} {sign}")

    def test_a_translation_is_a_share_of_its_own_side(self):
        """At level 9 it is 150/331 of the side: of 400 columns 181, of 100 rows 45."""
        always = mock.Mock()
        always.random.return_value = 0.0  # every change happens, its sign is 1
        sizes = {"policy": "cifar10", "height": 100, "width": 400}
        for row, expected in ((1, ("TranslateX", -181)), (3, ("TranslateY", -45))):
            always.integers.return_value = row
            self.assertEqual(policies.draw_autoaugment(always, **sizes)[1], expected)
            always.integers.assert_called_with(25)

    def test_a_change_without_probability_never_happens(self):
        always = mock.Mock()
        always.random.return_value = 0.0
        always.integers.return_value = 14  # Solarize at 0.5 and Invert at 0
        plan = policies.draw_autoaugment(always, policy="cifar10", height=32, width=32)
        self.assertEqual([name for name, _ in plan], ["Solarize"])

    @sweeps.rows((32, 32), (50, 31))
    def test_bytes_of_robustart(self, width, height):
        """Written out with Pillow alone, from the description of that code."""
        image = Image.fromarray(pattern(height, width))
        bits = (8, 8, 7, 7, 6, 6, 5, 5, 4, 4)
        enhancers = {
            "Color": ImageEnhance.Color,
            "Contrast": ImageEnhance.Contrast,
            "Brightness": ImageEnhance.Brightness,
            "Sharpness": ImageEnhance.Sharpness,
        }

        def moved(matrix, resample=NEAREST):
            grey = (128, 128, 128)
            affine = Image.Transform.AFFINE
            return image.transform(image.size, affine, matrix, resample, fillcolor=grey)

        def turned(degrees):
            layer = image.convert("RGBA").rotate(degrees)
            behind = Image.new("RGBA", image.size, (128, 128, 128, 128))
            return Image.composite(layer, behind, layer).convert("RGB")

        for level, sign in itertools.product(range(10), (-1, 1)):
            slope, share = (sign * np.linspace(0, s, 10)[level] for s in (0.3, 150 / 331))
            dx, dy = (share * side for side in image.size)
            expected = {
                "AutoContrast": ImageOps.autocontrast(image),
                "Equalize": ImageOps.equalize(image),
                "Invert": ImageOps.invert(image),
                "Posterize": ImageOps.posterize(image, bits[level]),
                "Solarize": ImageOps.solarize(image, np.linspace(256, 0, 10)[level]),
                "Rotate": turned(np.linspace(0, 30, 10)[level]),
                "ShearX": moved((1, slope, 0, 0, 1, 0), BICUBIC),
                "ShearY": moved((1, 0, 0, slope, 1, 0), BICUBIC),
                "TranslateX": moved((1, 0, dx, 0, 1, 0)),
                "TranslateY": moved((1, 0, 0, 0, 1, dy)),
            }
            for name, enhancer in enhancers.items():
                expected[name] = enhancer(image).enhance(1 + sign * np.linspace(0, 0.9, 10)[level])
            self.assertEqual(expected.keys(), policies.ROBUSTART.keys())
            for name, row in policies.ROBUSTART.items():
                side = width if name == "TranslateX" else height
                ours = row.change(image, row.number(sign, level, side), Canvas(NEAREST, fill=128))
                np.testing.assert_array_equal(ours, expected[name], f"{name} {level} {sign}")

    @sweeps.rows("cifar10", "imagenet")
    def test_frequencies_of_torchvision(self, name):
        torch, module, theirs = self.policy(name)
        torch.manual_seed(0)
        image, happened, expected = Image.new("RGB", (32, 32)), [], []

        def record(image, op, magnitude, **_):
            number = int(magnitude) if op.startswith("Translate") else round(magnitude, 3)
            happened.append((op, number))
            return image

        space = theirs._augmentation_space(10, (32, 32))
        with (
            mock.patch.object(module, "_apply_op", record),
            mock.patch.object(theirs, "_augmentation_space", lambda *_: space),
        ):
            for _ in range(5000):
                happened.clear()
                theirs(image)
                expected.append(tuple(happened))
        rng = np.random.default_rng(0)
        ours = [
            tuple(policies.draw_autoaugment(rng, policy=name, height=32, width=32))
            for _ in range(5000)
        ]
        same_frequencies(
            self, *[[tuple(n for n, _ in p) for p in plans] for plans in (ours, expected)]
        )
        # Half a change more or less in each of 5,000 gives the mean to 0.01.
        often = sum(p for pair in theirs.policies for _, p, _ in pair) / len(theirs.policies)
        self.assertAlmostEqual(np.mean([len(plan) for plan in ours]), often, delta=0.035)
        signs = [
            [(n, np.sign(v)) for p in plans for n, v in p if n in ("Rotate", "ShearY")]
            for plans in (ours, expected)
        ]
        same_frequencies(self, *signs)
