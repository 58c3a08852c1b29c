"""Attacks on any task: losses, targets and outputs of one's own, and networks of any library."""

import functools

import equinox
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from flax import linen, nnx

from jaxrobust import attacks
from tests.support import paths, sweeps

try:
    import torch
except ImportError:
    torch = None

EPSILON, STEPS, CLASSES, VOID = 0.1, 20, 4, 255
DRAW = np.random.default_rng(0)
IMAGES = DRAW.random((3, 10, 10, 3))
MASKS = DRAW.integers(0, CLASSES, (3, 10, 10))
MASKS[DRAW.random(MASKS.shape) < 0.2] = VOID
KERNEL = DRAW.standard_normal((3, 3, 3, CLASSES))


def segment(images):
    """Return logits f[B,10,10,4] of each pixel."""
    dims = ("NHWC", "HWIO", "NHWC")
    logits = jax.lax.conv_general_dilated(
        images, jnp.asarray(KERNEL, images.dtype), (1, 1), "SAME", dimension_numbers=dims
    )
    return jnp.tanh(logits)


def pixel_loss(outputs, targets):
    """Return the mean cross-entropy of the pixels that have a class, f[B]."""
    logs = jax.nn.log_softmax(outputs, axis=-1)
    counted = targets != VOID
    picked = jnp.take_along_axis(logs, jnp.where(counted, targets, 0)[..., None], -1)[..., 0]
    return -jnp.mean(picked, (1, 2), where=counted)


def share_right(outputs, targets):
    """Return the share of right pixels among those that have a class, f[B]."""
    counted = targets != VOID
    right = (outputs.argmax(-1) == targets).astype(outputs.dtype)
    return jnp.mean(right, (1, 2), where=counted)


SEGMENTATION = attacks.Goal(pixel_loss, share_right, lambda score: score <= 0.3)


def embed(images):
    """Return a dict of features, such as an encoder with several heads has."""
    weights = jnp.asarray(KERNEL.reshape(27, CLASSES), images.dtype)
    return {"features": jnp.tanh(images.reshape(len(images), -1)[:, :27] @ weights)}


class SegmentationTest(parameterized.TestCase):
    @absltest.skipIf(torch is None, paths.PARITY)
    @parameterized.parameters("linf", "l2")
    def test_pgd_is_that_of_pytorch(self, norm):
        """Points, losses and scores of each step in float64, with masks that ignore pixels."""
        epsilon = {"linf": 0.1, "l2": 1.0}[norm]
        kernel = torch.from_numpy(KERNEL.transpose(3, 2, 0, 1).copy())
        clean = torch.from_numpy(IMAGES.transpose(0, 3, 1, 2).copy())
        masks = torch.from_numpy(MASKS)
        at, points, losses, scores = clean, [], [], []
        for _ in range(STEPS):
            at = at.detach().requires_grad_()
            logits = torch.nn.functional.conv2d(at, kernel, padding=1).tanh()
            loss = torch.stack(
                [
                    torch.nn.functional.cross_entropy(one[None], mask[None], ignore_index=VOID)
                    for one, mask in zip(logits, masks, strict=True)
                ]
            )
            (g,) = torch.autograd.grad(loss.sum(), at)
            losses.append(loss.detach().numpy())
            right = (logits.argmax(1) == masks) & (masks != VOID)
            scores.append((right.double().sum((1, 2)) / (masks != VOID).sum((1, 2))).numpy())
            size = g.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
            at = at.detach() + 2.5 * epsilon / STEPS * (g.sign() if norm == "linf" else g / size)
            delta = at - clean
            if norm == "linf":
                delta = delta.clamp(-epsilon, epsilon)
            else:
                length = delta.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
                delta = delta * (epsilon / length).clamp(max=1)
            at = (clean + delta).clamp(0, 1)
            points.append(at.numpy().transpose(0, 2, 3, 1))
        with jax.enable_x64(True):
            machine = attacks.pgd_machine(
                norm=norm, epsilon=epsilon, steps=STEPS, loss=SEGMENTATION
            )

            def step(state, _):
                done = attacks.advance(machine, lambda x, draw: segment(x), state)
                values = machine.loss(state, done.outputs), machine.score(state, done.outputs)
                return done.state, (machine.query(done.state), *values)

            state = machine.init(jnp.asarray(IMAGES), jnp.asarray(MASKS))
            _, found = jax.lax.scan(step, state, length=STEPS)
        for ours, theirs in zip(found, (points, losses, scores), strict=True):
            np.testing.assert_allclose(ours, np.stack(theirs), rtol=1e-9, atol=1e-9)

    def test_apgd_keeps_its_latest_success(self):
        state = attacks.apgd_run(
            segment,
            jnp.float32(IMAGES),
            MASKS,
            norm="linf",
            epsilon=EPSILON,
            steps=10,
            loss=SEGMENTATION,
        )
        scores = share_right(segment(state.x_best_adv), MASKS)
        np.testing.assert_array_equal(np.asarray(scores) <= 0.3, ~np.asarray(state.correct))
        self.assertTrue((~state.correct).any())

    def test_square_stops_where_the_goal_is_reached(self):
        images = jnp.float32(IMAGES)
        easy = attacks.Goal(pixel_loss, share_right, lambda score: score <= 0.9)
        settings = {"norm": "linf", "epsilon": EPSILON, "queries": 12, "key": jax.random.key(0)}
        state = attacks.square_run(segment, images, MASKS, **settings, loss=easy)
        self.assertEqual(state.iteration.tolist(), [1, 1, 1])
        state = attacks.square_run(segment, images, MASKS, **settings, loss=pixel_loss)
        self.assertEqual(state.iteration.tolist(), [13, 13, 13])
        self.assertTrue((-state.margin_best >= pixel_loss(segment(images), MASKS)).all())


class InfoTest(parameterized.TestCase):
    @sweeps.rows("pgd", "apgd", "fgsm", "mim", "square")
    def test_loss_score_and_steps_of_the_points(self, name):
        settings = {"square": {"queries": 5}, "fgsm": {}}.get(name, {"steps": 3})
        attack = getattr(attacks, name)(epsilon=EPSILON, loss=SEGMENTATION, info=True, **settings)
        images = jnp.float32(IMAGES)
        points, info = jax.jit(functools.partial(attack, segment))(jax.random.key(0), images, MASKS)
        outputs = segment(points)
        np.testing.assert_allclose(info.loss, pixel_loss(outputs, MASKS), rtol=1e-5)
        np.testing.assert_allclose(info.score, share_right(outputs, MASKS), rtol=1e-5)
        steps = {"pgd": 3, "mim": 3, "fgsm": 1, "apgd": 4, "square": info.steps[0]}[name]
        self.assertEqual(info.steps.tolist()[0], steps)

    def test_without_a_score_and_without_images(self):
        attack = attacks.pgd(epsilon=EPSILON, steps=1, loss=pixel_loss, info=True)
        _, info = attack(segment, jax.random.key(0), jnp.float32(IMAGES), MASKS)
        self.assertIsNone(info.score)
        points, info = attack(segment, None, jnp.zeros((0, 10, 10, 3)), MASKS[:0])
        self.assertEqual((points.shape, info.loss.shape), ((0, 10, 10, 3), (0,)))


class TargetsTest(absltest.TestCase):
    def test_a_tree_of_outputs_and_of_targets(self):
        """The embedding of an image, pushed away from that of the clean one."""
        images = jnp.float32(IMAGES)
        targets = jax.tree.map(np.asarray, embed(images))
        away = lambda outputs, targets: (  # noqa: E731
            jnp.sum((outputs["features"] - targets["features"]) ** 2, axis=1)
        )
        attack = attacks.apgd(epsilon=EPSILON, steps=5, random_start=True, loss=away)
        points = attack(embed, jax.random.key(0), images, targets)
        self.assertGreater(float(away(embed(points), targets).min()), 0.01)
        for seeds in (jax.random.split(jax.random.key(1), 2),):  # and under vmap over seeds
            many = jax.vmap(lambda key: attack(embed, key, images, targets))(seeds)
            self.assertEqual(many.shape, (2, *images.shape))

    def test_no_targets(self):
        energy = lambda outputs, targets: -jax.nn.logsumexp(outputs, axis=(1, 2, 3))  # noqa: E731
        attack = attacks.pgd(epsilon=EPSILON, steps=2, random_start=False, loss=energy)
        images = jnp.float32(IMAGES)
        points = attack(segment, None, images, None)
        self.assertTrue((energy(segment(points), None) > energy(segment(images), None)).all())


class NetworksTest(parameterized.TestCase):
    """NNX, Linen and Equinox as they are, inside and outside of `jit`; those in training mode."""

    IMAGES, LABELS = jnp.float32(DRAW.random((2, 4, 4, 3))), jnp.int32([0, 1])
    attack = staticmethod(attacks.pgd(epsilon=EPSILON, steps=2, random_start=False))

    def linen_pair(self):
        class Net(linen.Module):
            @linen.compact
            def __call__(self, x):
                return linen.Dense(3)(x.reshape(len(x), -1))

        net = Net()
        return net, net.init(jax.random.key(0), self.IMAGES)

    def test_linen(self):
        net, variables = self.linen_pair()
        expected = self.attack(lambda x: net.apply(variables, x), None, self.IMAGES, self.LABELS)
        points = self.attack((net, variables), None, self.IMAGES, self.LABELS)
        np.testing.assert_array_equal(points, expected)
        inside = jax.jit(lambda v, x: self.attack((net, v), None, x, self.LABELS))
        np.testing.assert_allclose(inside(variables, self.IMAGES), expected, atol=1e-6)

    def test_nnx(self):
        net = nnx.Sequential(lambda x: x.reshape(len(x), -1), nnx.Linear(48, 3, rngs=nnx.Rngs(0)))
        points = self.attack(net, None, self.IMAGES, self.LABELS)
        inside = nnx.jit(lambda net, x: self.attack(net, None, x, self.LABELS))
        np.testing.assert_allclose(inside(net, self.IMAGES), points, atol=1e-6)
        self.assertGreater(float(jnp.abs(points - self.IMAGES).max()), EPSILON / 2)

    def test_equinox(self):
        class Net(equinox.Module):
            linear: equinox.nn.Linear

            def __call__(self, x):
                return jax.vmap(self.linear)(x.reshape(len(x), -1))

        net = Net(equinox.nn.Linear(48, 3, key=jax.random.key(0)))
        points = self.attack(net, None, self.IMAGES, self.LABELS)
        inside = jax.jit(lambda net, x: self.attack(net, None, x, self.LABELS))
        np.testing.assert_allclose(inside(net, self.IMAGES), points, atol=1e-6)

    def refused(self, network, words):
        with self.assertRaisesRegex(ValueError, words):
            self.attack(network, None, self.IMAGES, self.LABELS)

    def test_no_network(self):
        self.refused(np.zeros(3), "the network is of type ndarray; pass a function, an NNX module")
        self.refused(
            self.linen_pair()[0], r"is of type Net; pass a function, .*\(linen_module, variables"
        )
        self.refused((1, 2), "is of type tuple")

    def test_training_mode(self):
        head = nnx.Linear(48, 3, rngs=nnx.Rngs(0))
        flat = lambda x: x.reshape(len(x), -1)  # noqa: E731
        dropout = nnx.Sequential(flat, nnx.Dropout(0.5, rngs=nnx.Rngs(0)), head)
        self.refused(dropout, r"model.eval\(\) in NNX")
        norm = nnx.Sequential(flat, nnx.BatchNorm(48, rngs=nnx.Rngs(0)), head)
        self.refused(norm, r"model.eval\(\) in NNX")
        norm.eval()
        self.attack(norm, None, self.IMAGES, self.LABELS)


class WrongCallsTest(parameterized.TestCase):
    """A sentence for each loss, target or output that does not fit."""

    def call(self, name="apgd", network=segment, targets=MASKS, **settings):
        steps = {"square": {"queries": 3}, "fab": {"steps": 2}}.get(name, {"steps": 2})
        attack = getattr(attacks, name)(epsilon=EPSILON, **steps, **settings)
        return attack(network, jax.random.key(0), jnp.float32(IMAGES), targets)

    @sweeps.rows("apgd", "pgd", "mim", "square")
    def test_losses(self, name):
        mean = lambda outputs, targets: pixel_loss(outputs, targets).mean()  # noqa: E731
        by_pixel = lambda outputs, targets: outputs.max(-1)  # noqa: E731
        for loss, words in (
            (mean, r"the loss has shape \(\) for 3 images; return one number for each"),
            (by_pixel, r"the loss has shape \(3, 10, 10\) for 3 images"),
            (lambda outputs, targets: pixel_loss(outputs, targets)[:2], r"has shape \(2,\)"),
            ("cee", "loss='cee' is unknown; choose one of ce, dlr, .*or pass a function"),
            ("ce", r"returns \(3, 10, 10, 4\), but this attack needs logits \[B, C\]; for another"),
        ):
            labels = np.zeros(3, int) if isinstance(loss, str) else MASKS
            with self.assertRaisesRegex(ValueError, words):
                self.call(name, loss=loss, targets=labels)

    def test_scores(self):
        for score, words in (
            (lambda outputs, targets: 0.5, r"the score has shape \(\) for 3 images"),
            (lambda outputs, targets: outputs[..., 0], r"the score has shape \(3, 10, 10\)"),
        ):
            with self.assertRaisesRegex(ValueError, words):
                self.call(loss=attacks.Goal(pixel_loss, score))

    def test_targets_and_outputs(self):
        for change, words in (
            ({"targets": MASKS[:2]}, r"targets of shape \(2, 10, 10\) do not fit 3 images"),
            ({"targets": {"a": MASKS, "b": 3}}, r"targets of shape \(\) do not fit 3 images"),
            ({"targets": [MASKS, "words"]}, "targets"),
            ({"network": lambda x: {}}, "returns nothing for 3 images"),
            (
                {"network": lambda x: (segment(x), x.mean())},
                r"returns \(3, 10, 10, 4\), \(\) for 3",
            ),
            ({"network": lambda x: segment(x)[:1]}, r"returns \(1, 10, 10, 4\) for 3 images"),
        ):
            loss = change.pop("loss", lambda outputs, targets: jnp.zeros(3))
            with self.assertRaisesRegex(ValueError, words):
                self.call(loss=loss, **change)

    def test_votes_are_logits(self):
        """Integers of a network without gradients, as before losses were functions."""
        votes = lambda images: jnp.int32(10 * images.mean((1, 2)))  # noqa: E731
        images, labels = jnp.float32(IMAGES), jnp.zeros(3, jnp.int32)
        attack = attacks.square(epsilon=EPSILON, queries=3)
        found = attack(votes, jax.random.key(0), images, labels)
        self.assertLessEqual(float(jnp.abs(found - images).max()), EPSILON + 1e-6)

    def test_fab_needs_logits(self):
        with self.assertRaisesRegex(ValueError, r"but this attack needs logits \[B, C\]"):
            self.call("fab", targets=np.zeros(3, int))
        with self.assertRaisesRegex(TypeError, "loss"):
            attacks.fab(epsilon=EPSILON, loss=pixel_loss)


if __name__ == "__main__":
    absltest.main()
