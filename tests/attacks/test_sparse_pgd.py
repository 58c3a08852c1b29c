"""Sparse-PGD against the authors' algorithm with the same draws, and L0 AutoAttack."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from absl.testing import absltest, parameterized
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxrobust import attacks
from jaxrobust.attacks import losses
from tests.support import sweeps
from tests.support.sparse_nets import COUNT, IMAGES, LABELS, SIDE, W1, W2, net

sparse_pgd = importlib.import_module("jaxrobust.attacks.sparse.sparse_pgd")

PIXELS, STEPS = 4, 50


def loss_and_gradient(point, label):
    """Return the authors' loss at a point f64[H,W,3], its gradient, and the class, by PyTorch."""
    point = torch.tensor(point, requires_grad=True)
    logits = torch.tanh(point.ravel() @ torch.tensor(W1) / 4) @ torch.tensor(W2)
    others = torch.cat([logits[:label], logits[label + 1 :]])
    lead = logits[label] - others.max()
    loss = -lead if lead < 0.5 else torch.logsumexp(logits, 0) - logits[label]
    (gradient,) = torch.autograd.grad(loss, point)
    return loss.item(), gradient.numpy(), int(logits.argmax())


def searched(image, label, deltas, masks, *, projected):
    """Return points and masks of one image, as the authors find them in a batch.

    In one that has another image whose pixels stay: then no count starts again without a draw.
    `deltas` and `masks` are drawn for each step; only those of a start or a restart are read.
    """

    def top(mask):
        chosen = np.zeros(mask.size, bool)
        chosen[np.argsort(-mask.ravel())[:PIXELS]] = True
        return chosen.reshape(mask.shape)

    def backward(delta, mask):
        sigmoid = 1 / (1 + np.exp(-mask))
        _, gradient, _ = loss_and_gradient(image + delta * top(sigmoid), label)
        of_mask = (gradient * delta).sum(2, keepdims=True) * sigmoid * (1 - sigmoid)
        return gradient * (top(sigmoid) if projected else sigmoid), of_mask

    delta, mask, idle = np.clip(deltas[0], -image, 1 - image), masks[0], 0
    points, found = [image + delta * top(mask)], [mask]
    of_delta, of_mask = backward(delta, mask)
    for step in range(1, STEPS + 1):
        before, norm = mask, np.sqrt((of_mask**2).sum())
        if norm >= 2e-10:
            mask = mask + 0.25 * SIDE * of_mask / (norm + 1e-10)
        delta = np.clip(delta + 0.25 * np.sign(of_delta), -1, 1)
        delta = np.minimum(np.maximum(delta, -image), 1 - image)
        points, found = [*points, image + delta * top(mask)], [*found, mask]
        of_delta, of_mask = backward(delta, mask)
        idle += (top(mask) == top(before)).all()
        if idle >= 3 and step < STEPS:
            mask, idle, of_delta, of_mask = masks[step + 1], 0, 0 * of_delta, 0 * of_mask
    return np.stack(points), np.stack(found)


class SparsePgdTest(parameterized.TestCase):
    @parameterized.parameters(False, True)
    @pytest.mark.slow
    def test_the_authors_iterates(self, projected):
        """Of 50 steps in float64; the machine does not stop at success, nor does this."""
        with jax.enable_x64(True):
            machine = attacks.sparse_pgd_machine(pixels=PIXELS, steps=STEPS, projected=projected)

            def step(state, _):
                draws = sparse_pgd._draw(state.keys, state.iteration, state.images)
                after = attacks.advance(machine, lambda x, draw: net(x), state).state
                return after, (machine.query(state), state.mask, *draws)

            keys = attacks.image_keys(jax.random.key(0), COUNT)
            state = machine.init(jnp.asarray(IMAGES), jnp.asarray(LABELS), keys=keys)
            scan = jax.jit(lambda state: jax.lax.scan(step, state, length=STEPS + 1))
            state, told = jax.device_get(scan(state))
            self.assertTrue(machine.finished(state).all())
        points, masks, deltas, new_masks = told
        drawn_again = 0
        for i in range(COUNT):
            expected, numbers = searched(
                *(IMAGES[i], LABELS[i], deltas[:, i], new_masks[:, i]), projected=projected
            )
            np.testing.assert_allclose(points[:, i], expected, rtol=0, atol=1e-6)
            np.testing.assert_allclose(masks[:, i], numbers, rtol=0, atol=1e-6)
            drawn_again += (np.abs(np.diff(numbers, axis=0)).max((1, 2, 3)) > 2.1).sum()
        self.assertGreater(drawn_again, 2)

    def test_the_authors_loss(self):
        with jax.enable_x64(True):
            points = np.concatenate([IMAGES, 1 - IMAGES, IMAGES**4])
            labels = np.concatenate([LABELS] * 3)
            loss = lambda x: losses.ce_cw_loss(net(x), jnp.asarray(labels))  # noqa: E731
            values, gradients = loss(jnp.asarray(points)), jax.grad(lambda x: loss(x).sum())(points)
        pairs = list(map(loss_and_gradient, points, labels))
        np.testing.assert_allclose(values, [pair[0] for pair in pairs], rtol=1e-12)
        np.testing.assert_allclose(gradients, np.stack([pair[1] for pair in pairs]), atol=1e-12)
        self.assertLen({pair[0] < 0 for pair in pairs}, 2)

    @parameterized.parameters(False, True)
    def test_pixels_steps_and_success(self, projected):
        attack = attacks.sparse_pgd(pixels=PIXELS, steps=100, projected=projected, info=True)
        run = jax.jit(lambda key, x, y: attack(net, key, x, y))
        points, info = run(jax.random.key(1), jnp.float32(IMAGES), jnp.asarray(LABELS))
        changed = np.asarray(points) != np.float32(IMAGES)
        self.assertLessEqual(changed.any(3).sum((1, 2)).max(), PIXELS)
        self.assertTrue(((points >= 0) & (points <= 1)).all())
        np.testing.assert_array_equal(info.score <= 0, np.asarray(net(points)).argmax(1) != LABELS)
        stopped = np.asarray(info.steps) < 101
        np.testing.assert_array_equal(stopped, np.asarray(info.score) <= 0)
        few, _ = attacks.sparse_rs(pixels=PIXELS, queries=100, info=True)(
            net, jax.random.key(1), jnp.float32(IMAGES), jnp.asarray(LABELS)
        )
        by_search = (np.asarray(net(few)).argmax(1) != LABELS).sum()
        self.assertGreaterEqual((info.score <= 0).sum(), by_search)

    @parameterized.parameters("sparse_pgd", "sparse_rs")
    def test_radii_of_one_program(self, name):
        """The same points, whether a radius is a number, one of several, or one per image."""
        length = {"steps": 5} if name == "sparse_pgd" else {"queries": 5}
        key, images, labels = jax.random.key(3), jnp.float32(IMAGES), jnp.asarray(LABELS)
        run = lambda pixels: getattr(attacks, name)(pixels=pixels, **length)(  # noqa: E731
            net, key, images, labels
        )
        several = jax.jit(jax.vmap(run))(jnp.array([2, 5]))
        for points, pixels in zip(several, (2, 5), strict=True):
            np.testing.assert_allclose(points, run(pixels), atol=1e-6)
        each = np.where(np.arange(COUNT) % 2, 5, 2)
        mixed = np.where((each == 5)[:, None, None, None], several[1], several[0])
        np.testing.assert_allclose(run(jnp.asarray(each)), mixed, atol=1e-6)

    def test_any_task(self):
        """Segmentation of 5 x 8 pixels, with a loss and a score of its own, in trees."""
        images, least = jnp.float32(IMAGES[:, :5]), 1 - (PIXELS - 0.5) / 40
        outputs = lambda x: {"maps": jnp.stack([x.mean(3), 1 - x.mean(3)], axis=3)}  # noqa: E731
        right = lambda maps, masks: maps["maps"].argmax(3) == masks["pixels"]  # noqa: E731
        masks = {"pixels": jnp.asarray(images.mean(3) < 0.5, jnp.int32)}
        goal = attacks.Goal(
            lambda maps, masks: (
                -jnp.take_along_axis(maps["maps"], masks["pixels"][..., None], 3).sum((1, 2, 3))
            ),
            lambda maps, masks: right(maps, masks).astype(jnp.float32).mean((1, 2)),
            lambda score: score <= least,
        )
        key = jax.random.key(0)
        attack = attacks.sparse_pgd(pixels=PIXELS, steps=40, loss=goal, info=True)
        _, info = attack(outputs, key, images, masks)
        self.assertTrue((info.score <= least).all())
        plain = attacks.sparse_pgd(pixels=PIXELS, steps=40, loss=goal.loss, info=True)
        _, info = plain(outputs, key, images, masks)
        self.assertIsNone(info.score)
        self.assertEqual(set(info.steps.tolist()), {41})

    @pytest.mark.slow
    def test_devices_do_not_matter(self):
        """Nor does a `vmap` over seeds."""
        attack = functools.partial(attacks.sparse_pgd(pixels=3, steps=5), net)
        images, labels = (jnp.asarray(np.resize(a, (16, *a.shape[1:]))) for a in (IMAGES, LABELS))
        keys, images = attacks.image_keys(jax.random.key(2), 16), images.astype(jnp.float32)
        expected = jax.jit(attack)(keys, images, labels)
        mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
        mapped = jax.shard_map(attack, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
        np.testing.assert_allclose(jax.jit(mapped)(keys, images, labels), expected, atol=1e-5)
        seeds = jax.vmap(lambda keys: attack(keys, images, labels))(keys[None])
        np.testing.assert_allclose(seeds[0], expected, atol=1e-5)

    @sweeps.rows(
        ({"pixels": 0}, "pixels=0 must be an int >= 1"),
        ({"pixels": 0.5}, "pixels=0.5 must be an int"),
        ({"pixels": 2, "steps": 0}, "steps=0 must be an int >= 1"),
        ({"pixels": 2, "loss": "dlr-targeted"}, "needs a target class per image"),
    )
    def test_refuses(self, settings, words):
        with self.assertRaisesRegex(ValueError, words):
            attacks.sparse_pgd(**settings)

    def test_refuses_images_and_starts(self):
        images, keys = jnp.float32(IMAGES), attacks.image_keys(jax.random.key(0), COUNT)
        with self.assertRaisesRegex(
            ValueError, "pixels=64 must be less than the 64 pixels of an image"
        ):
            attacks.sparse_pgd(pixels=64, steps=1)(net, jax.random.key(0), images, LABELS)
        with self.assertRaisesRegex(
            ValueError, "only supports a random start; pass start='random' and keys"
        ):
            attacks.sparse_pgd_machine(pixels=2, steps=1).init(
                images, LABELS, keys=keys, start="image"
            )


if __name__ == "__main__":
    absltest.main()
