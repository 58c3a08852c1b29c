"""FGSM, PGD-20 and CW-40 as the authors of RobustResNets evaluate, and what they report."""

from functools import partial
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from jaxrobust import attacks
from jaxrobust.attacks import fixed_steps
from jaxrobust.attacks.geometry import balls
from jaxrobust.evaluation.engine import accuracy
from jaxrobust.models.kernels import convolutions
from jaxrobust.types import Classifier, Threat
from tests.support import paths, sweeps
from tests.support.golden import golden_nets, load
from tests.support.steps import standard

EPSILON, STEP = 8 / 255, 0.8 / 255
GOLDEN = load(paths.GOLDEN / "attacks/cifar_attacks.npz")
NAMED = {"fgsm": "fgsm", "pgd20": "pgd-20", "cw40": "cw-40"}


def asked(name, dtype):
    """The attack, with the golden start where it would draw its own; images and labels."""
    data = load(paths.GOLDEN / "attacks/aa_flags.npz")
    # The reference's float64 images are those of float32.
    images = jnp.asarray((data["images"][:32] / 255.0).astype(np.float32), dtype)
    noise = np.random.RandomState(31).uniform(-EPSILON, EPSILON, (32, 3, 32, 32))
    named = fixed_steps.parse(NAMED[name])
    length = named.length(EPSILON, step=None if name == "fgsm" else STEP)
    start = None if name == "fgsm" else "uniform"
    settings = named.settings(Threat("linf", EPSILON), length=length, start=start)
    drawn = jnp.asarray((noise.transpose(0, 2, 3, 1) / EPSILON + 1) / 2, dtype)

    def attack(*given):
        with mock.patch.object(balls, "draw", return_value=drawn):
            return fixed_steps.attack_of(settings)(*given)

    return attack, images, jnp.asarray(data["labels"][:32])


def judged(name, dtype):
    """What the evaluation says of the golden network, and the points."""
    conv = golden_nets(dtype, partial(convolutions.conv, stride=2, padding=1))["conv"]
    attack, images, labels = asked(name, dtype)
    points = []

    def kept(logits_fn, keys, images, labels):
        points.append(attack(logits_fn, keys, images, labels))
        return points[-1]

    def apply(params, stats, x):
        return conv(x), stats

    judging = accuracy.Judging(Classifier(None, apply), kept, jnp.dtype(dtype).name, moved=True)

    def judge(images, labels):
        found = accuracy.judged(
            {}, {}, images, labels, jnp.ones(32, bool), jnp.arange(32, dtype=jnp.int32),
            jax.random.key(0),
            judging=judging,
        )  # fmt: skip
        return found, points[-1]

    return jax.device_get(jax.jit(judge)(images, labels))


class CifarAttacksTest(parameterized.TestCase):
    @parameterized.parameters(*NAMED)
    @pytest.mark.slow  # 2 to 25 s: float64 has no fast convolutions within loops
    def test_points_in_float64(self, name):
        with jax.enable_x64(True), standard():
            found, points = judged(name, jnp.float64)
        np.testing.assert_allclose(points[:2], GOLDEN[f"{name}_f64_x_adv2"], rtol=0, atol=1e-9)
        self.check(found, name, "f64")

    @sweeps.fast("fgsm", "pgd20")
    @parameterized.parameters(*NAMED)
    def test_flags_in_float32(self, name):
        with standard():
            found, _ = judged(name, jnp.float32)
        self.check(found, name, "f32")

    def check(self, found, name, dtype):
        clean, right, _, stable, lipschitz = GOLDEN[f"{name}_{dtype}_figures"]
        reached = found["reached"] == found["labels"]
        np.testing.assert_array_equal(reached, GOLDEN[f"{name}_{dtype}_correct"])
        self.assertEqual((int(found["clean"].sum()), int(reached.sum())), (clean, right))
        self.assertEqual(int(found["stable"].sum()), stable)
        # The tolerance; the points of PGD differ in float32 where a gradient is near 0.
        np.testing.assert_allclose(found["local_lipschitz"].mean(), lipschitz, rtol=1e-5)


class FloorTest(absltest.TestCase):
    def test_what_is_misclassified_has_no_gradient(self):
        logits = jnp.array([[2.0, 1.0, 0.0], [1.0, 3.0, 0.0], [1.0, 1.0, 0.0]])
        labels = jnp.zeros(3, jnp.int32)
        value, slope = jax.value_and_grad(lambda z: attacks.LOSSES["cw-floor"](z, labels).sum())(
            logits
        )
        self.assertEqual(value, -1.0)
        np.testing.assert_array_equal(slope, [[-1, 1, 0], [0, 0, 0], [-1, 1, 0]])
        beyond = jax.grad(lambda z: attacks.cw_loss(z, labels).sum())(logits)
        np.testing.assert_array_equal(beyond, [[-1, 1, 0]] * 3)
