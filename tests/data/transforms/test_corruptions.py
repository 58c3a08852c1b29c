"""Common corruptions against hendrycks/robustness: pixels given its draws, moments without."""

import functools
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from absl.testing import absltest, parameterized
from PIL import Image

from jaxrobust import data
from jaxrobust.data.stream import corrupted_images
from jaxrobust.data.transforms import corruptions, decoding, distortions
from jaxrobust.data.transforms.corruptions import KINDS, SEVERITIES, Corruption
from tests.support import paths, sweeps

GIVEN = paths.SHARED / "golden" / "cifar" / "corruptions_cifar.npz"
CIFAR = paths.SHARED / "data" / "tensorflow_datasets"
# Of those with golden pixels: what draws nothing, and what does.
QUIET = ("defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression")
DRAWN = ("gaussian_noise", "shot_noise", "glass_blur", "fog", "elastic_transform")
RANDOM = (*DRAWN, "impulse_noise", "motion_blur", "snow", "frost")


class Draws(np.random.RandomState):
    """The generator of the reference, which calls whole numbers otherwise."""

    def integers(self, low, high=None, size=None):
        return self.randint(low, high, size=size)


@functools.cache
def golden() -> dict[str, np.ndarray]:
    """`corruptions_cifar.npz` of shared/, its first two images, without frost."""
    with np.load(paths.GOLDEN / "cifar" / "corruptions.npz") as arrays:
        return dict(arrays)


def picture(side: int, seed: int = 0) -> np.ndarray:
    """A smooth image with some noise, uint8[S,S,3]."""
    y, x, c = np.indices((side, side, 3)) / side
    noise = np.random.default_rng(seed).normal(0, 8, y.shape)
    waves = 128 + 70 * np.sin(5 * x + 2 * c + seed) + 50 * np.cos(7 * y - c)
    return (waves + noise).clip(0, 255).astype(np.uint8)


def ice(count: int = 2, side: int = 240) -> list[np.ndarray]:
    rng = np.random.default_rng(9)
    return [rng.integers(0, 256, (side, side + 9, 3), np.uint8) for _ in range(count)]


def corrupted(image, kind, severity, rng) -> np.ndarray:
    return corruptions.corrupt(image, Corruption(kind, severity), rng, photographs=ice())


class ReferenceTest(parameterized.TestCase):
    @sweeps.rows(*sweeps.product(kind=QUIET + DRAWN, severity=SEVERITIES))
    def test_pixels(self, kind, severity):
        """Both cut to whole numbers, so that a rounding of 1e-16 may be one level; no more."""
        for number, image in enumerate(golden()["images"]):
            found = corrupted(image, kind, severity, Draws(1000 * severity + number))
            off = np.abs(found.astype(int) - golden()[kind][severity - 1, number])
            self.assertLess((off > 1).mean(), 1e-3)
            self.assertLess((off > 0).mean(), 0.03)  # brightness 4: 1.6%, the others less

    @absltest.skipUnless(GIVEN.exists(), paths.NO_SHARED)
    def test_pixels_of_all_images(self):
        with np.load(GIVEN) as arrays:
            for kind in QUIET + DRAWN:
                for severity in SEVERITIES:
                    off = [
                        corrupted(image, kind, severity, Draws(1000 * severity + number)).astype(
                            int
                        )
                        - arrays[kind][severity - 1, number]
                        for number, image in enumerate(arrays["images_u8"])
                    ]
                    self.assertLess((np.abs(off) > 1).mean(), 1e-3, (kind, severity))

    def test_plasma(self):
        np.testing.assert_allclose(
            distortions.plasma(32, 3, Draws(5)), golden()["plasma_32_3"], rtol=1e-6, atol=1e-7
        )  # kept in float32

    @sweeps.rows((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1))
    def test_disks(self, radius, alias):
        found = distortions.disk(radius, alias)
        # OpenCV blurs in float32.
        np.testing.assert_allclose(found, golden()[f"disk_{radius}_{alias}"], atol=1e-7)

    @sweeps.rows((3, 17, 3), (8, 17, 3), (10, 21, 5))
    def test_large_disks(self, radius, width, window):
        """Of 8 and 10 they touch the border, at which the blur mirrors them: their sum is not 1."""
        y, x = np.mgrid[:width, :width] - width // 2
        inside = np.pad((x**2 + y**2 <= radius**2).astype(float), window // 2, "reflect")
        weights = np.exp(-((np.arange(window) - window // 2) ** 2) / (2 * 0.5**2))
        kernel = np.outer(weights, weights) / weights.sum() ** 2
        parts = np.lib.stride_tricks.sliding_window_view(inside, (window, window))
        count = (x**2 + y**2 <= radius**2).sum()
        expected = np.einsum("hwij,ij->hw", parts, kernel) / count
        np.testing.assert_allclose(distortions.disk(radius, 0.5), expected, atol=1e-8)


class PlainTest(parameterized.TestCase):
    """What has no golden pixels, against the slow way."""

    @sweeps.rows((32, 1, 1), (32, 1, 2), (40, 3, 2))
    def test_glass_copies_pixel_by_pixel(self, side, reach, rounds):
        image = np.random.default_rng(1).integers(0, 256, (side, side, 3), np.uint8)
        found = distortions.glass_blur(image, Draws(3), 0.05, reach, rounds)
        rng, pixels = Draws(3), image.copy()
        for _ in range(rounds):
            for h in range(side - reach, reach, -1):
                for w in range(side - reach, reach, -1):
                    across, down = rng.integers(-reach, reach, 2)
                    pixels[h, w] = pixels[h + down, w + across]
        np.testing.assert_allclose(found, pixels, atol=1e-9)  # sigma 0.05 blurs nothing

    @sweeps.rows(0, 30, -45, -90, -120)
    def test_motion_goes_along_one_side_of_a_line(self, angle):
        image, radius, sigma = picture(32), 4, 2.0
        found = distortions._moved(image, radius, sigma, angle)
        weights = np.array([np.exp(-(i**2) / 8) for i in range(9)])
        expected = np.zeros(image.shape)
        for (y, x), _ in np.ndenumerate(image[..., 0]):
            for i, weight in enumerate(weights / weights.sum()):
                down = int(np.ceil(i * np.sin(np.pi * angle / 180) - 0.5))
                across = int(np.ceil(i * np.cos(np.pi * angle / 180) - 0.5))
                row, column = min(max(y + down, 0), 31), min(max(x + across, 0), 31)
                expected[y, x] += weight * image[row, column]
        np.testing.assert_array_equal(found, np.floor(257 * expected + 0.5) // 257)

    def test_motion_is_imagemagick_s(self):
        """`convert -motion-blur RADIUSxSIGMA+ANGLE` of version 6.9.11-60, Q16, on two images."""
        for severity, angles in enumerate(golden()["imagemagick_angles"]):
            radius, sigma = KINDS["motion_blur"].small[severity]
            for number, angle in enumerate(angles):
                found = distortions._moved(golden()["images"][number], radius, sigma, angle)
                expected = golden()["imagemagick"][severity, number]
                np.testing.assert_array_equal(found, expected)

    def test_motion_and_snow_draw_their_angles(self):
        class Fixed(Draws):
            def uniform(self, low, high):
                asked.append((low, high))
                return low

        asked = []
        found = corrupted(picture(32), "motion_blur", 3, Fixed(0))
        np.testing.assert_array_equal(found, distortions._moved(picture(32), 6, 2, -45))
        corrupted(picture(32), "snow", 1, Fixed(0))
        self.assertEqual(asked, [(-45, 45), (-135, -45)])

    def test_snow_by_hand(self):
        """Where no flake falls, only the whitening is left."""

        class Dry(Draws):
            def normal(self, mean, spread, size):
                asked.append((mean, spread, size))
                return np.zeros(size)

        asked, image = [], picture(32)
        found = corrupted(image, "snow", 5, Dry(0))
        grey = image @ np.array([0.299, 0.587, 0.114])
        white = np.maximum(image, 1.5 * grey[..., None] + 127.5)
        self.assertEqual(asked, [(0.3, 0.3, (32, 32))])
        np.testing.assert_allclose(found, (0.8 * image + 0.2 * white).clip(0, 255), atol=1)

    def test_frost_mixes_a_part_of_a_photograph(self):
        image, photographs = picture(32), ice()
        found = corrupted(image, "frost", 3, Draws(4))
        rng = Draws(4)
        chosen = photographs[rng.randint(2)]
        top, left = rng.randint(0, 240 - 32), rng.randint(0, 249 - 32)
        part = chosen[top : top + 32, left : left + 32].astype(float)
        expected = (0.9 * image + 0.4 * part).clip(0, 255)
        np.testing.assert_array_equal(found, expected.astype(np.uint8))

    def test_impulses_are_black_and_white(self):
        image = np.full((224, 224, 3), 100, np.uint8)
        found = distortions.impulse_noise(image, np.random.default_rng(0), 0.27)
        self.assertEqual(np.unique(found).tolist(), [0, 100, 255])
        # A share of 150,528 values, within four standard deviations.
        self.assertLess(abs((found != 100).mean() - 0.27), 4 * (0.27 * 0.73 / found.size) ** 0.5)
        self.assertLess(abs((found == 255).mean() - 0.135), 4 * (0.135 * 0.865 / found.size) ** 0.5)

    @sweeps.rows(1.07, 1.28, 2.25)
    def test_zoom_is_linear_interpolation(self, factor):
        """Of a plane, whose values between pixels are known; the border stays inside."""
        side = 32
        y, x = np.mgrid[:side, :side].astype(float)
        found = distortions._zoomed((2 * y + 3 * x)[..., None], factor)[..., 0]
        inner = int(np.ceil(side / factor))
        outer, start = round(inner * factor), (side - inner) // 2
        at = start + (np.arange(side) + (outer - side) // 2) * (inner - 1) / (outer - 1)
        np.testing.assert_allclose(found, 2 * at[:, None] + 3 * at, atol=1e-9)

    def test_brightness_is_added_to_black_too(self):
        """Value and saturation of black are 0, so that it becomes a gray; of white nothing does."""
        pixels = np.array([[[0, 0, 0], [255, 255, 255]], [[51, 0, 0], [0, 204, 102]]], np.uint8)
        found = distortions.brightness(pixels, None, 0.4)
        by_hand = [[[102] * 3, [255] * 3], [[153, 0, 0], [0, 255, 127.5]]]
        np.testing.assert_allclose(found, by_hand, atol=1e-9)

    def test_an_offset_reaches_three_deviations(self):
        """On a ramp of 8 a pixel, one displaced point moves its row by 8 alpha g(x) g(0)."""

        class Impulse(Draws):
            def uniform(self, low, high, size):
                asked.append((low, high, size))
                field = np.zeros(size)
                if len(asked) == 2:  # the offsets along the rows
                    field[16, 16] = 1
                return field

        asked = []
        ramp = np.broadcast_to(8 * np.arange(32, dtype=np.uint8)[None, :, None], (32, 32, 3))
        found = distortions.elastic_transform(ramp, Impulse(0), 20.0, 1.0, 2.0)
        self.assertEqual(asked, [(-2.0, 2.0, (3, 2)), (-1, 1, (32, 32)), (-1, 1, (32, 32))])
        g = np.exp(-(np.arange(-3, 4) ** 2) / 2)
        g /= g.sum()
        moved = (found - ramp)[:, :, 0]
        np.testing.assert_allclose(moved[16, 13:20], 8 * 20 * g * g[3], rtol=1e-3)
        np.testing.assert_allclose(moved[13:20, 16], 8 * 20 * g * g[3], rtol=1e-3)
        self.assertLess(abs(np.delete(moved, range(13, 20), 1)).max(), 1e-3)
        self.assertLess(abs(np.delete(moved, range(13, 20), 0)).max(), 1e-3)

    def test_each_kind_and_severity_has_draws_of_its_own(self):
        every = corruptions.chosen("all")
        drawn = [corruptions.draws(7, each, 3).random() for each in every]
        drawn += [
            corruptions.draws(7, every[0], 4).random(),
            corruptions.draws(8, every[0], 3).random(),
        ]
        self.assertLen(set(drawn), 15 * 5 + 2)
        self.assertEqual(corruptions.draws(7, every[0], 3).random(), drawn[0])

    def test_large_images_have_been_jpegs(self):
        image = picture(224)
        found = corrupted(image, "brightness", 1, Draws(0))
        plain = distortions.brightness(image, None, 0.1).clip(0, 255).astype(np.uint8)
        np.testing.assert_array_equal(found, distortions.jpeg_compression(plain, None, 85))


class AllTest(parameterized.TestCase):
    def test_severities_grow(self):
        self.check(32)

    def test_severities_grow_on_large_images(self):
        self.check(224)

    def check(self, side):
        image = picture(side)
        for kind in KINDS:
            with self.subTest(kind):
                away = []
                for severity in (1, 5):
                    asked = Corruption(kind, severity)
                    found, again = (
                        corrupted(image, kind, severity, corruptions.draws(3, asked, 5))
                        for _ in range(2)
                    )
                    self.assertEqual((found.dtype, found.shape), (np.uint8, image.shape))
                    np.testing.assert_array_equal(found, again)
                    away.append(np.abs(found.astype(float) - image).mean())
                if kind != "elastic_transform":  # whose waves grow shorter instead
                    self.assertLess(*away)

    @sweeps.rows(*RANDOM)
    def test_images_seeds_and_severities_draw_otherwise(self, kind):
        image, asked = picture(32), Corruption(kind, 2)
        seen = {
            corrupted(image, kind, 2, corruptions.draws(seed, asked, number)).tobytes()
            for seed in range(2)
            for number in range(3)
        }
        self.assertLen(seen, 6)
        one, other = (corruptions.draws(0, Corruption(kind, s), 0).random() for s in (1, 2))
        self.assertNotEqual(one, other)

    @pytest.mark.slow
    @absltest.skipUnless(CIFAR.exists(), paths.NO_SHARED)
    def test_moments_of_5000_images(self):
        """What our draws do to CIFAR-10 in the mean, next to the reference's generator: per image
        the mean change and the size of the change, their mean and their spread over the images.

        Means may differ by five standard errors, spreads by 8% (of 5,000 values that is five
        times 1 / sqrt(2 * 5000), with some room for heavy tails).
        """
        source = data.open_source("cifar10", "test[:5000]", data_dir=CIFAR)
        images = [decoding.decode(r.image, channels=3) for r in source.read(range(5000))]
        for kind in RANDOM:
            for severity in (1, 3, 5):
                asked = Corruption(kind, severity)
                moments = []
                for draw in (
                    lambda number, asked=asked: corruptions.draws(0, asked, number),
                    Draws,
                ):
                    change = [
                        corrupted(image, kind, severity, draw(number)).astype(np.float32) - image
                        for number, image in enumerate(images)
                    ]
                    moments.append([(c.mean(), np.abs(c).mean()) for c in change])
                ours, theirs = np.array(moments)
                error = np.hypot(ours.std(0), theirs.std(0)) / np.sqrt(len(images))
                print(kind, severity, ours.mean(0), theirs.mean(0), ours.std(0), theirs.std(0))
                apart = np.abs(ours.mean(0) - theirs.mean(0))
                self.assertTrue((apart < 5 * error).all(), (kind, severity))
                np.testing.assert_allclose(ours.std(0), theirs.std(0), rtol=0.08)

    @pytest.mark.slow
    @absltest.skipUnless(CIFAR.exists(), paths.NO_SHARED)
    def test_noise_of_5000_images_by_formula(self):
        """The mean and spread of noise that is cut at black and white, from its distribution."""
        source = data.open_source("cifar10", "test[:5000]", data_dir=CIFAR)
        images = np.stack([decoding.decode(r.image, channels=3) for r in source.read(range(5000))])
        share = np.bincount(images.ravel(), minlength=256) / images.size
        levels = np.arange(256)
        values = np.random.default_rng(0).normal(size=40_000)
        for severity, sigma in enumerate((0.04, 0.06, 0.08, 0.09, 0.10), 1):
            asked = Corruption("gaussian_noise", severity)
            found = np.stack(
                [
                    corrupted(image, *asked, corruptions.draws(1, asked, number))
                    for number, image in enumerate(images)
                ]
            )
            expected = np.floor((levels[:, None] + 255 * sigma * values).clip(0, 255))
            mean = share @ expected.mean(1)
            spread = np.sqrt(share @ (expected**2).mean(1) - mean**2)
            # 40,000 draws know a mean within 0.6% of sigma, all levels share them.
            self.assertLess(abs(found.mean() - mean), 4 * 255 * sigma / 200)
            self.assertLess(abs(found.std() - spread), 4 * 255 * sigma / 200)


class ChosenTest(parameterized.TestCase):
    def test_all(self):
        found = corruptions.chosen("all")
        self.assertLen(found, 75)
        self.assertEqual(found[0], Corruption("gaussian_noise", 1))
        self.assertLen(corruptions.chosen("all-5"), 15)

    def test_some(self):
        self.assertEqual(
            corruptions.chosen("fog-3, snow-5,fog-1"),
            [Corruption("snow", 5), Corruption("fog", 1), Corruption("fog", 3)],
        )
        self.assertLen(corruptions.chosen("frost"), 5)

    @sweeps.rows(
        ("fgo", "no corruption 'fgo'; did you mean fog"),
        ("", "no corruption ''"),
        ("fog-6", "fog has no severity '6'; write fog-1 to fog-5"),
        ("fog-", "fog has no severity ''"),
        ("fog,fog-1", "has fog-1 twice"),
    )
    def test_refused(self, text, said):
        with self.assertRaisesRegex(data.DataError, said):
            corruptions.chosen(text)


class SourceTest(parameterized.TestCase):
    def corrupted(self, name="fake:32x32x3", size=32, kind="fog", frost=None, preprocessing="none"):
        source = data.open_source(name, "test[:6]")
        return corrupted_images.corrupted(
            source,
            Corruption(kind, 2),
            image_size=size,
            preprocessing=preprocessing,
            seed=7,
            frost=frost,
        )

    def test_images_are_corrupted_one_by_one(self):
        source, plain = self.corrupted(), data.open_source("fake:32x32x3", "test[:6]")
        whole = source.read([4, 1])
        for record, index in zip(whole, (4, 1), strict=True):
            image = decoding.decode(plain[index].image, channels=3)
            rng = corruptions.draws(7, Corruption("fog", 2), index)
            expected = corruptions.corrupt(image, Corruption("fog", 2), rng)
            np.testing.assert_array_equal(decoding.decode(record.image, channels=3), expected)
            self.assertEqual(record.label, plain[index].label)
        again = pickle.loads(pickle.dumps(source)).read([1])
        self.assertEqual(again[0].image, whole[1].image)

    def test_images_are_prepared_first(self):
        source = self.corrupted("fake:256x256x3", 224, "jpeg_compression", None, "Res256Crop224")
        self.assertEqual(source.image_shape, (224, 224, 3))
        self.assertEqual(decoding.decode(source[0].image, channels=3).shape, (224, 224, 3))

    @sweeps.rows(
        ({"name": "fake:28x28x3", "size": 28}, "for color images of 32 or 224 px"),
        ({"name": "fake:32x32x1"}, "for color images of 32 or 224 px"),
        ({"name": "fake:64x64x3", "size": 64}, "for color images of 32 or 224 px"),
        ({"kind": "frost"}, "give --frost FOLDER"),
    )
    def test_refused(self, options, said):
        with self.assertRaisesRegex(data.DataError, said):
            self.corrupted(**options)


class PhotographsTest(parameterized.TestCase):
    def folder(self, **sizes) -> Path:
        place = Path(self.create_tempdir())
        for name, (height, width) in sizes.items():
            pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
            Image.fromarray(pixels).save(place / f"{name}.png")
        return place

    def test_the_first_five_by_name(self):
        place = self.folder(**{f"frost{n}": (200, 210 + n) for n in range(1, 8)})
        found = corrupted_images.photographs(place, 32)
        self.assertEqual([p.shape[:2] for p in found.pixels], [(40, 42)] * 2 + [(40, 43)] * 3)
        with Image.open(place / "frost1.png") as image:  # every fifth pixel, from the third on
            np.testing.assert_array_equal(found.pixels[0][1, 2], np.asarray(image)[7, 12])
        os.remove(place / "frost7.png")
        self.assertEqual(corrupted_images.photographs(place, 32).sha256, found.sha256)
        os.remove(place / "frost5.png")
        self.assertNotEqual(corrupted_images.photographs(place, 32).sha256, found.sha256)

    def test_large_ones_are_whole(self):
        (found,) = corrupted_images.photographs(self.folder(a=(230, 240)), 224).pixels
        self.assertEqual(found.shape, (230, 240, 3))

    @sweeps.rows(
        ({}, 32, "has no photographs of frost; copy the files frost1.png through frost5.jpg"),
        (
            {"a": (100, 200)},
            32,
            "too small for frost on images of 32 px; give photographs of at least 165",
        ),
        ({"a": (224, 400)}, 224, "give photographs of at least 225 px"),
    )
    def test_refused(self, sizes, side, said):
        with self.assertRaisesRegex(data.DataError, said):
            corrupted_images.photographs(self.folder(**sizes), side)

    def test_no_folder_and_damaged(self):
        place = self.folder(a=(200, 200))
        (place / "a.png").write_bytes(b"\x89PNG")
        for folder, said in (
            (place / "nowhere", "the folder of frost photographs .*nowhere does not exist"),
            (place, "not a complete image file.*; copy it again"),
        ):
            with self.assertRaisesRegex(data.DataError, said):
                corrupted_images.photographs(folder, 32)
