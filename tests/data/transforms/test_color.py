"""Changes of color and sharpness on the host, against torchvision's and timm's."""

import itertools
import random
from unittest import mock

import numpy as np
from absl.testing import parameterized
from PIL import Image
from scipy import stats

from jaxrobust.data.transforms import augmentations, operations
from tests.support import sweeps
from tests.support.images import pattern, photographs, torchvision


class Draws:
    """Draws that a test says, as our generator."""

    def __init__(self, **values):
        for name, value in values.items():
            setattr(self, name, lambda *_, value=value: value)


def pictures():
    """Two photographs, a drawn image, and a gray one; PIL images."""
    photos = [Image.open(path).convert("RGB").resize((120, 90)) for path in photographs(2)]
    return [*photos, Image.fromarray(pattern(40, 56)), Image.fromarray(pattern(40, 56, 1)[..., 0])]


class ColorTest(parameterized.TestCase):
    @sweeps.rows((0, 1, 2, 3), (3, 2, 1, 0), (1, 3, 0, 2), (2, 0, 3, 1))
    def test_jitter_makes_the_bytes_of_torchvision(self, *order):
        torch, vision = torchvision(self)
        ranges = augmentations.jitter_ranges(0.4, 0.3, 0.5, 0.2)
        theirs = vision.transforms.ColorJitter(0.4, 0.3, 0.5, 0.2)
        for image, shares in itertools.product(
            pictures(), ((0.0, 1.0, 0.3, 1.0), (0.7, 0.1, 0.9, 0.365), (1.0, 0.5, 0.0, 0.635))
        ):
            rng = Draws(random=np.array([np.argsort(order), shares]))
            numbers = dict(augmentations.draw_jitter(rng, ranges))
            drawn = (torch.tensor(order), *(numbers[index] for index in range(4)))
            with mock.patch.object(theirs, "get_params", lambda *_, drawn=drawn: drawn):
                expected = theirs(image)
            ours = augmentations.jitter(image, rng, ranges=ranges)
            np.testing.assert_array_equal(ours, expected)

    def test_jitter_draws_the_numbers_and_orders_of_torchvision(self):
        torch, vision = torchvision(self)
        torch.manual_seed(0)
        theirs = vision.transforms.ColorJitter(0.4, 0.3, 1.5, 0.2)
        ranges = augmentations.jitter_ranges(0.4, 0.3, 1.5, 0.2)
        np.testing.assert_allclose(
            ranges, [theirs.brightness, theirs.contrast, theirs.saturation, theirs.hue]
        )
        rng = np.random.default_rng(0)
        orders, expected_orders, numbers, expected = [], [], [], []
        for _ in range(5000):
            order, *drawn = theirs.get_params(
                theirs.brightness, theirs.contrast, theirs.saturation, theirs.hue
            )
            expected_orders.append(tuple(order.tolist()))
            expected.append(drawn)
            ours = augmentations.draw_jitter(rng, ranges)
            orders.append(tuple(index for index, _ in ours))
            numbers.append([number for _, number in sorted(ours)])
        for ours, theirs in zip(np.transpose(numbers), np.transpose(expected), strict=True):
            self.assertGreater(stats.ks_2samp(ours, theirs).pvalue, 1e-3)
        kinds = sorted(set(orders))
        self.assertLen(kinds, 24)
        table = [[got.count(kind) for kind in kinds] for got in (orders, expected_orders)]
        self.assertGreater(stats.chi2_contingency(table).pvalue, 1e-3)

    def test_numbers_of_no_jitter_change_nothing(self):
        self.assertEqual(
            augmentations.draw_jitter(
                np.random.default_rng(0), augmentations.jitter_ranges(0, 0, 0, 0)
            ),
            [],
        )

    @sweeps.rows((0.5, 127), (-0.5, 129), (0.25, 63), (1 / 512, 0), (0, 0))
    def test_turns_of_the_hue_are_cut_to_255ths(self, turns, hue):
        """Of red, whose hue is 0: -127 of 256 is 129."""
        expected = Image.new("HSV", (1, 1), (hue, 255, 255)).convert("RGB")
        found = operations.hue(Image.new("RGB", (1, 1), (255, 0, 0)), turns)
        self.assertEqual(found.getpixel((0, 0)), expected.getpixel((0, 0)))

    @sweeps.rows(
        (operations.solarize_add, 110, [110, 237, 128, 255]),
        (operations.solarize_add, 200, [200, 255, 128, 255]),  # no value is above 255
        (operations.solarize, 128, [0, 127, 127, 0]),
        (operations.solarize, 256, [0, 127, 128, 255]),
        (operations.solarize, 0, [255, 128, 127, 0]),
        (operations.posterize, 8, [0, 127, 128, 255]),
        (operations.posterize, 1, [0, 0, 128, 128]),
        (operations.posterize, 0, [0, 0, 0, 0]),
    )
    def test_tables_of_values(self, change, number, expected):
        grey = Image.fromarray(np.array([[0, 127, 128, 255]], np.uint8))
        np.testing.assert_array_equal(np.asarray(change(grey, number)), [expected])

    def test_numbers_of_a_jitter_that_are_not_written_are_the_first(self):
        for text, numbers in (
            ("jitter(0.4)", (0.4, 0.4, 0.4, 0)),
            ("jitter(0.4, 0.1)", (0.4, 0.1, 0.4, 0)),
            ("jitter(0.4, 0, 0.2, 0.05)", (0.4, 0, 0.2, 0.05)),
        ):
            (op,) = augmentations.chain(text, 32).augment.keywords["ops"]
            self.assertEqual(op.keywords["ranges"], augmentations.jitter_ranges(*numbers), text)

    def test_ranges_up_to_half_of_the_circle(self):
        ranges = augmentations.jitter_ranges(0.25, 1.5, 0, 0.5)
        self.assertEqual(ranges, ((0.75, 1.25), (0, 2.5), (1, 1), (-0.5, 0.5)))
        for wrong in ((0, 0, 0, 0.501), (-0.1, 0, 0, 0), (0, -0.1, 0, 0), (0, 0, -0.1, 0)):
            with self.assertRaisesRegex(ValueError, "must be at least 0, and the hue at most 0.5"):
                augmentations.jitter_ranges(*wrong)

    @sweeps.rows((0, "Desaturate"), (1, "Solarize"), (2, "GaussianBlurRand"))
    def test_one_of_three_makes_the_bytes_of_timm(self, which, name):
        torchvision(self)  # or skip
        from timm.data import auto_augment

        policy = auto_augment.auto_augment_policy("3a", {"img_mean": (0, 0, 0)})
        (op,) = [op for (op,) in policy if op.name == name]
        for image, radius in itertools.product(pictures(), (0.1, 0.77, 2.0)):
            with mock.patch.object(auto_augment.random, "uniform", lambda *_, r=radius: r):
                expected = op(image)
            rng = Draws(integers=which, random=0.5, uniform=radius)
            np.testing.assert_array_equal(augmentations.three_augment(image, rng), expected)

    def test_one_of_three_is_drawn_as_timm_does(self):
        torchvision(self)  # or skip
        from timm.data import auto_augment

        random.seed(0)
        theirs = auto_augment.auto_augment_transform("3a", {"img_mean": (0, 0, 0)})
        expected, ours = [], []
        for (op,) in theirs.policy[:2]:
            op.aug_fn = lambda image, number, name=op.name, **_: expected.append((name, number))
        # The third draws its radius, and hands it to the image.
        blurred = Draws()
        blurred.filter = lambda blur: expected.append(("GaussianBlurRand", blur.radius))
        for _ in range(15_000):
            theirs(blurred)

        def record(name):
            return lambda image, number=1.0: ours.append((name, number)) or image

        rng, image = np.random.default_rng(0), Image.new("RGB", (2, 2))
        with (
            mock.patch.object(operations, "grey", record("Desaturate")),
            mock.patch.object(operations, "solarize", record("Solarize")),
            mock.patch.object(operations, "blur", record("GaussianBlurRand")),
        ):
            for _ in range(15_000):
                augmentations.three_augment(image, rng)
        kinds = ("Desaturate", "Solarize", "GaussianBlurRand")
        table = [[[n for n, _ in drawn].count(k) for k in kinds] for drawn in (ours, expected)]
        self.assertGreater(stats.chi2_contingency(table).pvalue, 1e-3)
        for kind in kinds:
            numbers = [
                [number for name, number in drawn if name == kind] for drawn in (ours, expected)
            ]
            self.assertGreater(stats.ks_2samp(*numbers).pvalue, 1e-3, kind)

    @sweeps.rows(
        (augmentations.grey, {}),
        (augmentations.solarize, {"threshold": 100}),
        (augmentations.blur, {"radii": (1, 1)}),
    )
    def test_single_changes_happen_with_their_probability(self, op, options):
        image, rng = Image.fromarray(pattern(8, 9)), np.random.default_rng(0)
        changed = [op(image, rng, p=0.3, **options) != image for _ in range(2000)]
        self.assertBetween(sum(changed), 540, 660)  # 3 standard deviations are 61
        self.assertIs(op(image, rng, p=0, **options), image)
