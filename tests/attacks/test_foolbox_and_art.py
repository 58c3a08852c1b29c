"""PGD on three norms as foolbox 3.3.4 and ART 1.10 run it: starts, steps, projections."""

import warnings
from functools import partial
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from scipy import stats

from jaxrobust import attacks
from jaxrobust.attacks.geometry import l1_rules
from jaxrobust.attacks.geometry.balls import fill_l2
from jaxrobust.models.kernels import convolutions
from tests.support import paths, sweeps
from tests.support.golden import golden_nets, load, norm_in_float64
from tests.support.steps import standard

GOLDEN = load(paths.GOLDEN / "attacks/cifar_attacks.npz")
# name -> the attack as the golden arrays have it
RUNS = {
    "foolbox_linf": {"norm": "linf", "epsilon": 8 / 255, "steps": 20},
    "foolbox_linf_train15": {"norm": "linf", "epsilon": 8 / 255, "steps": 15},
    "foolbox_l2": {"norm": "l2", "epsilon": 1.5, "steps": 20},
    "art_l1": {"norm": "l1", "epsilon": 40.0, "steps": 20, "l1_rule": "art"},
}


def nhwc(array):
    return array.reshape(32, 3, 32, 32).transpose(0, 2, 3, 1)


def start_of(norm, images):
    """Where the golden runs begin, from their draws."""
    rng, epsilon = np.random.RandomState(21), 8 / 255
    uniform = rng.uniform(-epsilon, epsilon, (32, 3, 32, 32))
    if norm == "linf":
        return images + nhwc(uniform)
    if norm == "l2":
        normal = rng.standard_normal((32, 3074))
        normal[:, :-2] = nhwc(normal[:, :-2]).reshape(32, -1)
        return fill_l2(jnp.asarray(normal, images.dtype), images, jnp.full(32, 1.5, images.dtype))
    rng = np.random.RandomState(23)
    ends = np.zeros((32, 3073))
    ends[:, -1] = np.sqrt(rng.uniform(0, 1600, 32))
    for row in ends:
        row[1:-1] = np.sort(rng.uniform(0, row[-1], 3071))
    delta = np.diff(ends) * rng.choice([-1, 1], (32, 3072))
    return images + nhwc(delta).astype(images.dtype)


def found(name, dtype):
    """Points, losses and verdicts of a golden run with our machine."""
    run, data = RUNS[name], load(paths.GOLDEN / "attacks/aa_flags.npz")
    images = jnp.asarray((data["images"][:32] / 255.0).astype(np.float32), dtype)
    labels = jnp.asarray(data["labels"][:32])
    conv = golden_nets(dtype, partial(convolutions.conv, stride=2, padding=1))["conv"]
    # 3/40 of the radius in 20 steps, a tenth in 15.
    machine = attacks.pgd_machine(**run, step_size=1.5 * run["epsilon"] / run["steps"])

    @jax.jit
    def judged(images):
        start = jnp.asarray(start_of(run["norm"], images))
        state = machine.init(images, labels, start=jnp.clip(start, 0, 1))
        state = attacks.run(machine, conv, state, gradient_steps=run["steps"], final_forward=False)
        points = machine.result(state)
        logits = conv(points)
        return points, attacks.ce_loss(logits, labels), logits.argmax(1) == labels

    return jax.device_get(judged(images)), np.asarray(images)


class GoldenTest(parameterized.TestCase):
    """The golden network, 32 images; the golden run of ART is one batch of 32."""

    def check(self, name, bits, loss):
        dtype = {"f32": jnp.float32, "f64": jnp.float64}[bits]
        with mock.patch.object(l1_rules, "BATCH", 32):
            (points, losses, right), images = found(name, dtype)
        stored = {k: GOLDEN.get(f"{name}_{bits}_{k}") for k in ("loss", "correct", "norm")}
        np.testing.assert_array_equal(right, stored["correct"])
        np.testing.assert_allclose(losses, stored["loss"], rtol=loss, atol=loss)
        if stored["norm"] is not None:
            norms = norm_in_float64(points.astype(np.float64) - images, RUNS[name]["norm"])
            np.testing.assert_allclose(norms, stored["norm"], rtol=loss)
        return points

    @sweeps.fast(1)
    @parameterized.parameters(*RUNS)
    def test_flags_in_float32(self, name):
        with standard():
            # The addendum's tolerance of losses; flags are equal.
            self.check(name, "f32", 1e-4)

    @parameterized.parameters("foolbox_linf", "foolbox_linf_train15", "foolbox_l2")
    @pytest.mark.slow  # float64 has no fast convolutions within loops
    def test_points_in_float64(self, name):
        with jax.enable_x64(True), standard():
            points = self.check(name, "f64", 1e-9)
        stored = GOLDEN.get(f"{name}_f64_x_adv2")
        if stored is not None:
            np.testing.assert_allclose(points[:2], stored, rtol=0, atol=1e-9)

    def test_what_the_batch_is_for(self):
        """The study's batch of 60 gives the flags of the golden one of 32: a tiny constant."""
        with standard():
            (_, _, right), _ = found("art_l1", jnp.float32)
        np.testing.assert_array_equal(right, GOLDEN["art_l1_f32_correct"])


class FoolboxTest(parameterized.TestCase):
    """Against the package itself, in float64."""

    def setUp(self):
        super().setUp()
        try:
            import torch

            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # it imports names that SciPy will remove
                import foolbox
        except ImportError:
            self.skipTest(paths.PARITY)
        self.foolbox, self.torch = foolbox, torch

    @parameterized.product(norm=("linf", "l2"), steps=(15, 20))
    @pytest.mark.slow
    def test_points(self, norm, steps):
        torch, rng = self.torch, np.random.default_rng(0)
        images, labels = rng.random((16, 6, 6, 3)), rng.integers(0, 5, 16)
        w1, w2 = rng.normal(size=(108, 32)) / 4, rng.normal(size=(32, 5))
        epsilon = {"linf": 0.05, "l2": 0.5}[norm]
        kind = {
            "linf": "LinfProjectedGradientDescentAttack",
            "l2": "L2ProjectedGradientDescentAttack",
        }
        theirs = getattr(self.foolbox.attacks, kind[norm])(rel_stepsize=1.5 / steps, steps=steps)
        net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(108, 32, bias=False))
        net = net.append(torch.nn.Tanh()).append(torch.nn.Linear(32, 5, bias=False)).double().eval()
        with torch.no_grad():
            for layer, weights in ((net[1], w1), (net[3], w2)):
                layer.weight.copy_(torch.tensor(weights.T))
        starts, draw = [], theirs.get_random_start
        theirs.get_random_start = lambda *given: starts.append(draw(*given)) or starts[-1]
        torch.manual_seed(0)
        model = self.foolbox.PyTorchModel(net, bounds=(0, 1), device="cpu")
        _, expected, _ = theirs(model, torch.tensor(images), torch.tensor(labels), epsilons=epsilon)
        start = starts[0].raw.clamp(0, 1).numpy()
        with jax.enable_x64(True), standard():
            machine = attacks.pgd_machine(
                norm=norm, epsilon=epsilon, steps=steps, step_size=1.5 * epsilon / steps
            )
            state = machine.init(jnp.asarray(images), jnp.asarray(labels), start=start)
            state = attacks.run(
                machine,
                lambda x: jnp.tanh(x.reshape(len(x), -1) @ w1) @ w2,
                state,
                gradient_steps=steps,
                final_forward=False,
            )
            points = np.asarray(machine.result(state))
        np.testing.assert_allclose(points, expected.numpy(), rtol=0, atol=1e-9)
        self.assertGreater(np.abs(points - start).max(), 0.01)

    @pytest.mark.slow
    def test_l2_start(self):
        """The same draws give the same point."""
        torch, images = self.torch, np.full((8, 4, 4, 3), 0.5)
        theirs = self.foolbox.attacks.L2ProjectedGradientDescentAttack()
        torch.manual_seed(3)
        drawn = torch.randn((8, 50), dtype=torch.float64).numpy()
        torch.manual_seed(3)
        import eagerpy

        expected = theirs.get_random_start(eagerpy.astensor(torch.tensor(images)), 1.5).raw.numpy()
        with jax.enable_x64(True):
            ours = fill_l2(jnp.asarray(drawn), jnp.asarray(images), jnp.full(8, 1.5, jnp.float64))
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-9)


class StartsTest(parameterized.TestCase):
    def delta(self, norm, start, epsilon, **how):
        """What starts add to 2,000 images of 3 entries, which leave them room; each its own."""
        machine = attacks.pgd_machine(norm=norm, epsilon=epsilon, steps=1, **how)
        images, labels = jnp.full((2000, 1, 1, 3), 0.5), jnp.zeros(2000, jnp.int32)
        keys = attacks.image_keys(jax.random.key(0), 2000)
        init = partial(machine.init, images, labels, start=start)
        begin = jax.jit(lambda keys: machine.query(init(keys=keys)))
        points = begin(keys)
        np.testing.assert_array_equal(points[::-1], begin(keys[::-1]))
        return np.asarray(points - images, np.float64).reshape(2000, 3)

    def test_uniform_in_the_l2_ball(self):
        delta = self.delta("l2", attacks.STARTS["uniform-boxed"], 0.4)
        shares = np.linalg.norm(delta, axis=1) / 0.4
        self.assertGreater(stats.kstest(shares**3, "uniform").pvalue, 1e-3)
        # Of a sphere in three dimensions, each coordinate of the direction is uniform.
        for axis in range(3):
            along = delta[:, axis] / (0.4 * shares)
            self.assertGreater(stats.kstest((along + 1) / 2, "uniform").pvalue, 1e-3)

    def test_the_rule_of_art(self):
        delta = self.delta("l1", "random", 0.4, l1_rule="art")
        shares = np.abs(delta).sum(1) / 0.4
        self.assertGreater(stats.kstest(shares**2, "uniform").pvalue, 1e-3)
        # Spacings of two uniform numbers: each is smaller than t with probability 1 - (1 - t)^2.
        for axis in range(3):
            parts = np.abs(delta[:, axis]) / (0.4 * shares)
            self.assertGreater(stats.kstest(1 - (1 - parts) ** 2, "uniform").pvalue, 1e-3)
        np.testing.assert_allclose((delta > 0).mean(0), 0.5, atol=0.05)  # 4 standard errors

    @pytest.mark.slow
    def test_starts_stay_in_the_box(self):
        images = jnp.tile(jnp.array([0.0, 1.0]), 24).reshape(1, 4, 4, 3)
        labels, keys = jnp.zeros(1, jnp.int32), attacks.image_keys(jax.random.key(0), 1)
        for norm, start, how in (
            ("l2", attacks.STARTS["uniform-boxed"], {}),
            ("l1", "random", {"l1_rule": "art"}),
        ):
            machine = attacks.pgd_machine(norm=norm, epsilon=3.0, steps=1, **how)
            points = machine.query(machine.init(images, labels, keys=keys, start=start))
            self.assertTrue((points >= 0).all() and (points <= 1).all())
            self.assertFalse((points == images).all())


class RuleTest(parameterized.TestCase):
    def test_by_hand(self):
        """One step: along the gradient, dense; the box first, then towards the image."""
        ball = l1_rules.L1_RULES["art"]
        images = jnp.array([0.5, 0.9]).reshape(1, 2, 1, 1)
        gradient = jnp.array([1.0, 3.0]).reshape(1, 2, 1, 1)
        one = jnp.ones(1)
        moved = ball.ascend(images, gradient, 0.4 * one)
        np.testing.assert_allclose(moved.ravel(), [0.6, 1.2], atol=1e-6)
        for epsilon, expected in ((1.0, [0.6, 1.0]), (0.1, [0.55, 0.95]), (0.0, [0.5, 0.9])):
            points = ball.project(moved, images, epsilon * one)
            np.testing.assert_allclose(points.ravel(), expected, atol=1e-6)

    @sweeps.rows(
        ({"norm": "l1", "l1_rule": "dense"}, "l1_rule='dense' is unknown; choose one of sparse, a"),
        (
            {"norm": "l2", "l1_rule": "art"},
            "l1_rule='art' is only for norm='l1', not for 'l2'; leave it",
        ),
    )
    def test_refuses(self, changes, message):
        with self.assertRaisesRegex(ValueError, message):
            attacks.pgd(epsilon=1.0, steps=2, **changes)
