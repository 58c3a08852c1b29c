"""Augmentations on the device, against timm's on the host."""

import importlib.util
import itertools
import random
from functools import partial
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from scipy import stats

from jaxrobust.models.interface import network_inputs
from jaxrobust.runtime.devices import sharding
from jaxrobust.training.update import mixing
from jaxrobust.types import Batch
from tests.support import paths, sweeps

COUNT = 5000
SHAPE = (40, 56)  # not square: an exchange of the axes would show
HEAVY = mixing.Mixing(10, mixup=0.8, cutmix=1.0, smoothing=0.1, group=4)
SMOOTHS = mixing.batch_augmentation(mixing.Mixing(10, smoothing=0.1))


def timm_data(test):
    """timm's modules (mixup, random_erasing), or a skipped test; all of timm would take seconds."""
    found = importlib.util.find_spec("timm")
    if found is None:
        test.skipTest(paths.PARITY)
    modules = []
    for name in ("mixup", "random_erasing"):
        file = Path(found.origin).with_name("data") / f"{name}.py"
        spec = importlib.util.spec_from_file_location(f"{name}_of_timm", file)
        modules.append(importlib.util.module_from_spec(spec))
        spec.loader.exec_module(modules[-1])
    return modules


def pictures(batch, side=16, seed=0) -> Batch:
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (batch, side, side, 3), np.uint8)
    return Batch(jnp.asarray(images), jnp.asarray(rng.integers(0, 10, batch), jnp.int32))


class DistributionTest(parameterized.TestCase):
    def assert_alike(self, ours, theirs, what):
        self.assertGreater(min(len(ours), len(theirs)), 100, what)
        self.assertGreater(stats.ks_2samp(ours, theirs).pvalue, 0.001, what)

    def assert_as_often(self, ours, theirs, what):
        """Both are bool arrays; frequencies of 0 or 1 must be equal."""
        table = [[x.sum(), (~x).sum()] for x in map(np.asarray, (ours, theirs))]
        if np.any(np.sum(table, axis=0) == 0):
            return
        self.assertGreater(stats.fisher_exact(table).pvalue, 0.001, f"{what}: {table}")


class SymmetricBetaTest(DistributionTest):
    @sweeps.rows(0.2, 0.8, 1.0, 2.0)
    def test_is_numpys(self, a):
        u, v = jax.random.uniform(jax.random.key(1), (2, COUNT))
        ours = np.asarray(mixing.symmetric_beta(jnp.float32(a), u, v))
        theirs = np.random.default_rng(0).beta(a, a, COUNT).astype(np.float32)  # 1 - 1e-9 is 1
        self.assert_alike(ours, theirs, a)
        self.assertTrue(np.all((ours >= 0) & (ours <= 1)))

    @sweeps.rows(1e-3, 0.05, 1.0, 1e3)
    def test_ends_of_its_draws_are_numbers(self, a):
        u, v = jnp.meshgrid(jnp.array([0, 1e-7, 0.5, 1 - 2**-24]), jnp.array([0, 0.25, 0.5, 0.75]))
        lam = mixing.symmetric_beta(jnp.float32(a), u, v)
        self.assertTrue(bool(jnp.all((lam >= 0) & (lam <= 1))))


class DrawTest(parameterized.TestCase):
    """What one group draws, of six numbers that are given."""

    def drawn(self, *u, switch=0.5, probability=0.75):
        settings = mixing.Mixing(10, 0.5, 2.0, switch, probability)
        with mock.patch.object(jax.random, "uniform", return_value=jnp.float32(u)) as uniform:
            boxes, lam, y, x = mixing._draw_mixing("key", (*SHAPE, 3), settings)
        uniform.assert_called_once_with("key", (6,))
        return bool(boxes), float(lam), float(y), float(x)

    @sweeps.rows((0.0, True), (0.49, True), (0.5, False), (0.99, False))
    def test_boxes_as_often_as_the_switch_says(self, u, boxes):
        own = mixing.symmetric_beta(jnp.float32(2.0 if boxes else 0.5), 0.3, 0.1)
        found = self.drawn(u, 0.3, 0.1, 0, 0, 0)
        self.assertEqual(found[0], boxes)
        self.assertAlmostEqual(found[1], float(own), places=6)
        self.assertEqual(self.drawn(u, 0.3, 0.1, 0, 0, 0, switch=1.0)[0], True)
        self.assertEqual(self.drawn(u, 0.3, 0.1, 0, 0, 0, switch=0.0)[0], False)

    @sweeps.rows((0.74, True), (0.75, False), (0.76, False))
    def test_no_more_often_than_the_probability(self, u, mixed):
        self.assertEqual(self.drawn(0, 0.3, 0.1, u, 0, 0)[1] != 1, mixed)

    @sweeps.rows((0.0, 0, 0), (0.5, 20, 28), (0.51, 20, 28), (0.999, 39, 55))
    def test_the_centre_of_a_box_is_a_pixel_of_the_image(self, u, y, x):
        self.assertEqual(self.drawn(0, 0, 0, 0, u, 0)[2:], (y, 0))
        self.assertEqual(self.drawn(0, 0, 0, 0, 0, u)[2:], (0, x))


class BlendTest(parameterized.TestCase):
    """timm's Mixup with its draws given, against ours with the same."""

    @sweeps.rows(
        *itertools.product(
            # not mixed, MixUp, a box inside, boxes that two borders and one cut, and an empty one
            (
                (False, 1.0, 0, 0),
                (False, 0.3, 0, 0),
                (True, 0.8, 20, 30),
                (True, 0.4, 2, 50),
                (True, 0.05, 38, 28),
                (True, 0.9999, 5, 5),
            ),
            (0.0, 0.1),
        )
    )
    def test_images_and_targets(self, drawn, smoothing):
        timm_mixup, _ = timm_data(self)
        import torch

        boxes, lam, y, x = drawn
        lam = float(np.float32(lam))
        rng = np.random.default_rng(0)
        images = rng.normal(size=(6, *SHAPE, 3)).astype(np.float32)
        labels = np.array([3, 1, 4, 1, 5, 3], np.int32)  # the outer pair has one label
        theirs = timm_mixup.Mixup(0.8, 1.0, label_smoothing=smoothing, num_classes=7)
        theirs.mix_prob = 0.5
        draws = {
            "rand": mock.Mock(side_effect=[0.9] if lam == 1 else [0.1, 0.1 if boxes else 0.9]),
            "beta": mock.Mock(side_effect=[lam]),
            "randint": mock.Mock(side_effect=[y, x]),
        }
        with mock.patch.multiple(np.random, **draws):
            expected = theirs(
                torch.tensor(images).permute(0, 3, 1, 2).contiguous(), torch.tensor(labels)
            )
        targets = mixing.smoothed(jnp.asarray(labels), 7, smoothing)
        drawn = (jnp.array(boxes), *map(jnp.float32, (lam, y, x)))
        out, mixed = jax.jit(mixing.blend)(jnp.asarray(images), targets, *drawn)
        np.testing.assert_array_equal(out, expected[0].permute(0, 2, 3, 1).numpy())
        # The weight of a box is a quotient: timm's in float64, ours in float32.
        np.testing.assert_allclose(mixed, expected[1].numpy(), rtol=0, atol=2.0**-24 * boxes)
        np.testing.assert_allclose(mixed.sum(-1), 1, rtol=1e-6)


@pytest.mark.computes
class MixDistributionTest(DistributionTest):
    """COUNT pairs of a black and a white image, so that the weight of every pixel shows."""

    @staticmethod
    def described(black, weight):
        """Of images [n,H,W] that were black and the weights of their labels: what was drawn."""
        mixup = (black == black[:, :1, :1]).all((1, 2)) & (black[:, 0, 0] > 0)
        boxes = (black == 1).any((1, 2)) & ~mixup
        rows, columns = ((black[boxes] == 1).any(axis) for axis in (2, 1))
        return {
            "mixed": weight < 1,
            "boxes": boxes,
            "weight of mixup": weight[mixup],
            "weight of boxes": weight[boxes],
            "area": rows.sum(1) * columns.sum(1),
            "top": rows.argmax(1),
            "left": columns.argmax(1),
            "bottom": rows[:, ::-1].argmax(1),
            "right": columns[:, ::-1].argmax(1),
        }

    @sweeps.fast(1)
    @parameterized.parameters(
        {"mixup": 0.8, "cutmix": 1.0},
        {"mixup": 0.8, "cutmix": 1.0, "switch": 0.2, "probability": 0.6},
        {"mixup": 0.2, "cutmix": 0.0},
        {"mixup": 0.0, "cutmix": 0.5},
    )
    def test_is_timms(self, mixup, cutmix, switch=0.5, probability=1.0):
        timm_mixup, _ = timm_data(self)
        import torch

        pair = np.zeros((2, *SHAPE, 1), np.float32)
        pair[1] = 1
        ours = jax.jit(
            partial(mixing.mix, mixing=mixing.Mixing(2, mixup, cutmix, switch, probability))
        )
        labels = jnp.tile(jnp.arange(2, dtype=jnp.int32), COUNT)
        images, targets = ours(jax.random.key(0), jnp.tile(pair, (COUNT, 1, 1, 1)), labels)
        found = self.described(np.asarray(images)[::2, ..., 0], np.asarray(targets)[::2, 0])
        theirs = timm_mixup.Mixup(
            mixup, cutmix, prob=probability, switch_prob=switch, label_smoothing=0, num_classes=2
        )
        black, weight = np.empty((COUNT, *SHAPE), np.float32), np.empty(COUNT, np.float32)
        state = np.random.get_state()
        np.random.seed(0)
        for i in range(COUNT):
            image, target = theirs(
                torch.tensor(pair).permute(0, 3, 1, 2).contiguous(), torch.arange(2)
            )
            black[i], weight[i] = image[0, 0].numpy(), target[0, 0]
        np.random.set_state(state)
        for what, expected in self.described(black, weight).items():
            if expected.dtype == bool:
                self.assert_as_often(found[what], expected, what)
            elif len(expected) or len(found[what]):
                self.assert_alike(found[what], expected, what)


class EraseDistributionTest(DistributionTest):
    MARK = 9.0  # no draw from N(0, 1)

    @classmethod
    def described(cls, images):
        """Of images [n,H,W] that were MARK: what was erased, and all erased pixels."""
        erased = images != cls.MARK
        rows, columns = erased.any(2), erased.any(1)
        some = rows.any(1)
        height, width = rows.sum(1), columns.sum(1)
        assert (height * width == erased.sum((1, 2))).all(), "not one box each"
        room = SHAPE[0] - height + 1, SHAPE[1] - width + 1
        return {
            "erased": some,
            "area": (height * width)[some],
            "aspect": height[some] / width[some],
            "top": ((rows.argmax(1) + 0.5) / room[0])[some],
            "left": ((columns.argmax(1) + 0.5) / room[1])[some],
            "noise": images[erased][:COUNT],
        }

    @sweeps.fast(1)
    @parameterized.parameters(
        {"probability": 1.0},
        {"probability": 0.25},
        # Most boxes do not fit, and for some images none of ten does.
        {"probability": 1.0, "area": (0.5, 1.0), "aspect": (0.1, 10.0)},
    )
    def test_is_timms(self, probability, area=(0.02, 1 / 3), aspect=(0.3, 1 / 0.3)):
        _, random_erasing = timm_data(self)
        import torch

        ours = partial(mixing.erase, probability=probability, area=area, aspect=aspect)
        images = jnp.full((COUNT, *SHAPE, 1), self.MARK)
        found = self.described(np.asarray(jax.jit(ours)(jax.random.key(0), images))[..., 0])
        theirs = random_erasing.RandomErasing(
            probability, *area, *aspect, mode="pixel", device="cpu"
        )
        images = torch.full((COUNT, 1, *SHAPE), self.MARK)
        state = random.getstate()
        random.seed(0)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            theirs(images)
        random.setstate(state)
        for what, expected in self.described(images[:, 0].numpy()).items():
            if expected.dtype == bool:
                self.assert_as_often(found[what], expected, what)
            else:
                self.assert_alike(found[what], expected, what)

    @parameterized.parameters("normal", "truncated")
    def test_noise(self, noise):
        scale, low = {"normal": (stats.norm(), -np.inf), "truncated": (None, 0)}[noise]
        scale = scale or stats.truncnorm(-2, 2, loc=0.5, scale=0.25)
        images = jnp.full((64, 20, 20, 3), self.MARK)
        erase = jax.jit(partial(mixing.erase, probability=1.0, noise=noise))
        out = np.asarray(erase(jax.random.key(0), images))
        values = out[(out != self.MARK).all(-1)]
        self.assertGreater(stats.kstest(values[:COUNT].ravel(), scale.cdf).pvalue, 0.001)
        self.assertTrue(np.all((values >= low) & (values <= 1 - low)) or noise == "normal")
        # Every channel draws for itself: of n pairs a correlation has the deviation n ** -0.5.
        correlation = np.corrcoef(values.T)[np.triu_indices(3, 1)]
        self.assertLess(np.abs(correlation).max(), 4 * len(values) ** -0.5)


class BatchAugmentationTest(parameterized.TestCase):
    @pytest.mark.slow
    def test_does_not_depend_on_devices(self):
        run, key = mixing.batch_augmentation(HEAVY, erasing=0.5), jax.random.key(3)
        batch = pictures(32)
        floats = batch._replace(images=network_inputs.unit_range(batch.images))
        expected = jax.device_get(jax.jit(run)(key, floats))
        for count in (1, 2, 4, 8):
            mesh = sharding.make_mesh(jax.devices()[:count])
            whole, split = sharding.replicated(mesh), sharding.by_image(mesh)
            f = jax.jit(
                lambda key, batch: run(
                    key, Batch(network_inputs.unit_range(batch.images), batch.labels)
                ),
                in_shardings=(whole, split),
                out_shardings=split,
            )
            for a, b in zip(f(key, batch), expected, strict=True):
                np.testing.assert_array_equal(a, b, f"{count} devices")

    def test_rows_and_groups_draw_for_themselves(self):
        run = jax.jit(mixing.batch_augmentation(HEAVY, erasing=0.5))
        whole = pictures(16)._replace(images=network_inputs.unit_range(pictures(16).images))
        start = jax.tree.map(lambda a: a[:8], whole)
        for a, b in zip(run(jax.random.key(0), whole), run(jax.random.key(0), start), strict=True):
            np.testing.assert_array_equal(a[:8], b)
        erase = jax.jit(partial(mixing.erase, probability=1.0))
        erased = erase(jax.random.key(0), jnp.full((8, 16, 16, 3), 9.0))
        self.assertLen({np.asarray(image).tobytes() for image in erased}, 8)

    def test_a_box_of_the_whole_side_does_not_fit(self):
        """As timm has it, whose boxes are smaller than the image in both directions."""
        images = jnp.full((8, 16, 16, 3), 9.0)
        square = {"probability": 1.0, "aspect": (1.0, 1.0)}
        whole = mixing.erase(jax.random.key(0), images, area=(1.0, 1.0), **square)
        np.testing.assert_array_equal(whole, images)
        nearly = mixing.erase(jax.random.key(0), images, area=(0.88, 0.88), **square)  # 15 x 15
        self.assertEqual((np.asarray(nearly) != 9).any(3).sum((1, 2)).tolist(), 8 * [225])

    def test_erases_then_mixes_within_groups(self):
        key, batch = jax.random.key(7), pictures(8)
        images = network_inputs.unit_range(batch.images)
        mix = jax.jit(partial(mixing.mix, mixing=HEAVY))
        augment = jax.jit(mixing.batch_augmentation(HEAVY, erasing=0.5))
        found = augment(key, Batch(images, batch.labels))
        erase_key, mix_key = jax.random.split(key)
        erased = jax.jit(partial(mixing.erase, probability=0.5))(erase_key, images)
        expected = mix(mix_key, erased, batch.labels)
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_array_equal(a, b)
        # Images 4 to 7 are nobody's partner among the first four; 3 is that of 0.
        again, _ = mix(mix_key, erased.at[4:].set(0), batch.labels)
        np.testing.assert_array_equal(again[:4], expected[0][:4])
        again, _ = mix(mix_key, erased.at[3].set(0), batch.labels)
        self.assertGreater(float(jnp.abs(again[0] - expected[0][0]).max()), 0.01)
        np.testing.assert_array_equal(again[1:3], expected[0][1:3])

    def test_smoothing_alone_and_nothing_at_all(self):
        batch = pictures(4)
        out = mixing.batch_augmentation(mixing.Mixing(10))(jax.random.key(0), batch)
        self.assertIs(out.images, batch.images)
        self.assertIs(out.labels, batch.labels)
        out = SMOOTHS(jax.random.key(0), batch)
        self.assertIs(out.images, batch.images)
        expected = np.full((4, 10), 0.01)
        expected[np.arange(4), batch.labels] = 0.91
        np.testing.assert_allclose(out.labels, expected, rtol=1e-6)  # one rounding each

    def test_smoothing_of_labels_that_are_soft(self):
        batch, rng = pictures(4), np.random.default_rng(0)
        soft = rng.dirichlet(np.ones(10), 4).astype(np.float32)
        given = batch._replace(labels=jnp.asarray(soft))
        out = mixing.batch_augmentation(mixing.Mixing(10))(jax.random.key(0), given)
        self.assertIs(out.labels, given.labels)
        out = SMOOTHS(jax.random.key(0), given)
        np.testing.assert_allclose(out.labels, 0.9 * soft + 0.01, rtol=1e-6)
        batch = batch._replace(images=batch.images.astype(jnp.float32) / 255)
        hard = batch._replace(labels=jnp.eye(10)[batch.labels])
        for mixes in ({"smoothing": 0.1}, {"mixup": 0.8, "smoothing": 0.1}):
            augment = mixing.batch_augmentation(mixing.Mixing(10, **mixes))
            one, other = (augment(jax.random.key(1), b).labels for b in (batch, hard))
            np.testing.assert_allclose(one, other, rtol=1e-6)
