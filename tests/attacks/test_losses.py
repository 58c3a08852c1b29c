"""Losses of the attacks against numbers of auto-attack a392200 (tests/golden/attacks)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from jaxrobust import attacks
from jaxrobust.attacks import losses
from tests.support import paths, sweeps
from tests.support.golden import assert_within, golden_nets, load


def values_and_gradients(name, logits, *labels):
    def summed(logits):
        values = attacks.LOSSES[name](logits, *labels)
        return values.sum(), values

    (_, values), gradients = jax.jit(jax.value_and_grad(summed, has_aux=True))(logits)
    return values, gradients


class GoldenTest(parameterized.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.golden = load(paths.GOLDEN / "attacks/losses.npz")

    @sweeps.rows(("ce", "ce"), ("dlr", "dlr"), ("dlrt", "dlr-targeted"))
    def test_synthetic_rows(self, key, name):
        """Ties, equal, huge and tiny logits: values and gradients, ties to the same class."""
        g = self.golden
        labels = [jnp.asarray(g["syn_y"], jnp.int32)]
        if name == "dlr-targeted":
            labels.append(jnp.asarray(g["syn_ytarget"], jnp.int32))
        values, gradients = values_and_gradients(name, jnp.asarray(g["syn_logits"]), *labels)
        # float32 rounding of exp and log; logits up to 1e3 in the hand-made rows.
        np.testing.assert_allclose(values, g[f"syn_{key}"], rtol=2e-6, atol=1e-6)
        # Relative: all-equal logits divide by 1e-12. The floor is rounding of terms that cancel.
        scale = np.abs(g[f"syn_{key}_dlogits"]).max(axis=1, keepdims=True)
        assert_within(gradients, g[f"syn_{key}_dlogits"], 2e-6 * scale + 1e-6)

    def check_network(self, net, g, count, labels):
        logits = jnp.asarray(g[f"{net}_logits"][:count])
        labels = jnp.asarray(labels[:count], jnp.int32)
        # From equal logits: CE of terms up to 10. DLR is relative, its denominator can be tiny.
        np.testing.assert_allclose(
            attacks.ce_loss(logits, labels), g[f"{net}_ce"][:count], atol=1e-5
        )
        np.testing.assert_allclose(
            attacks.dlr_loss(logits, labels), g[f"{net}_dlr"][:count], rtol=1e-5, atol=1e-6
        )
        targeted = jax.jit(attacks.targeted_dlr_loss)
        for rank in range(9):
            target = jnp.asarray(g[f"{net}_ytarget_rank2to10"][:count, rank], jnp.int32)
            np.testing.assert_allclose(
                targeted(logits, labels, target),
                g[f"{net}_dlrt"][:count, rank],
                rtol=1e-5,
                atol=1e-6,
            )

    def check_input_gradients(self, net, g, images, labels):
        logits_fn = golden_nets()[net]
        for key, name in (("ce", "ce"), ("dlr", "dlr"), ("dlrt", "dlr-targeted")):
            expected = g[f"{net}_grad_{key}"]
            count = len(expected)
            extra = [jnp.asarray(labels[:count], jnp.int32)]
            if name == "dlr-targeted":
                extra.append(jnp.asarray(g[f"{net}_ytarget_rank2to10"][:count, 0], jnp.int32))
            x = jnp.asarray(images[:count].astype(np.float32) / np.float32(255))
            loss = attacks.LOSSES[name]
            gradient = jax.grad(lambda x, loss, extra: loss(logits_fn(x), *extra).sum())
            actual = jax.jit(gradient, static_argnums=1)(x, loss, extra)
            # Two float32 programs: 1e-5 of the largest entry. The logits agree to 2e-6, and DLR
            # divides by a difference of two of them, which can be small.
            top = -np.sort(-g[f"{net}_logits"][:count], axis=1)
            tolerance = 1e-5 + (key != "ce") * 4e-6 / (top[:, 0] - top[:, 2])
            scale = np.abs(expected).max(axis=(1, 2, 3))
            assert_within(actual, expected, (tolerance * scale + 1e-6)[:, None, None, None])

    @sweeps.fast("lin")
    @parameterized.parameters("conv", "lin")
    def test_networks(self, net):
        g = self.golden
        self.check_network(net, g, len(g[f"{net}_ce"]), g["labels64"])
        self.check_input_gradients(net, g, g["images_u8"], g["labels"])


@pytest.mark.slow
class FullGoldenTest(GoldenTest):
    @parameterized.parameters("conv", "lin")
    def test_networks(self, net):
        if not (paths.SHARED / "golden/losses.npz").exists():
            self.skipTest(paths.NO_SHARED)
        g, data = (load(paths.SHARED / f"golden/{n}.npz") for n in ("losses", "data"))
        self.check_network(net, g, 128, data["labels"])
        self.check_input_gradients(net, g, data["images_u8"], data["labels"])


class DefinitionTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.logits = jax.random.normal(jax.random.key(0), (6, 10)) * 3
        self.labels = jnp.arange(6, dtype=jnp.int32)

    def test_of_three_classes_dlr_is_climbed_and_of_two_the_margin(self):
        for classes, expected in ((3, attacks.dlr_loss), (2, attacks.cw_loss)):
            logits, labels = self.logits[:, :classes], self.labels % classes
            codes = jnp.full_like(labels, losses.DLR)
            found = losses.by_target(logits, labels, codes)
            np.testing.assert_array_equal(found, expected(logits, labels))

    def test_soft_targets(self):
        hard = attacks.ce_loss(self.logits, self.labels)
        np.testing.assert_allclose(
            attacks.ce_loss(self.logits, jax.nn.one_hot(self.labels, 10)), hard, rtol=1e-6
        )
        mixed = 0.3 * jax.nn.one_hot(self.labels, 10) + 0.7 * jax.nn.one_hot(self.labels + 1, 10)
        expected = 0.3 * hard + 0.7 * attacks.ce_loss(self.logits, self.labels + 1)
        np.testing.assert_allclose(attacks.ce_loss(self.logits, mixed), expected, rtol=1e-6)

    def test_kl(self):
        p = jax.nn.softmax(self.logits, axis=1)
        np.testing.assert_allclose(attacks.kl_loss(self.logits, p), 0, atol=1e-6)
        one_hot = jax.nn.one_hot(self.labels, 10)  # 0 log 0 = 0
        expected = attacks.ce_loss(self.logits, self.labels)
        np.testing.assert_allclose(attacks.kl_loss(self.logits, one_hot), expected, rtol=1e-6)

    def test_cw(self):
        logits = jnp.array([[3.0, 1.0, 2.0], [3.0, 5.0, 5.0]])
        labels = jnp.array([0, 0], jnp.int32)
        values, gradients = values_and_gradients("cw", logits, labels)
        np.testing.assert_array_equal(values, [-1, 2])
        np.testing.assert_array_equal(gradients, [[-1, 0, 1], [-1, 1, 0]])

    def test_pm(self):
        """Values and gradients in NumPy: p is the softmax, r the strongest other class."""
        z, labels = np.asarray(self.logits, np.float64), np.asarray(self.labels)
        p, rows = np.exp(z) / np.exp(z).sum(1, keepdims=True), np.arange(6)
        others = np.where(np.eye(10)[labels] == 1, -1, p)
        r = others.argmax(1)
        margin, slope = p[rows, r] - p[rows, labels], np.zeros_like(p)
        slope[rows, r] += p[rows, r]
        slope[rows, labels] -= p[rows, labels]
        values, gradients = values_and_gradients("pm", self.logits, self.labels)
        np.testing.assert_allclose(values, margin, atol=1e-6)
        np.testing.assert_allclose(gradients, slope - margin[:, None] * p, atol=1e-6)

    def test_dlr_ignores_shift_and_scale(self):
        expected = attacks.dlr_loss(self.logits, self.labels)
        np.testing.assert_allclose(
            attacks.dlr_loss(self.logits * 4 + 2, self.labels), expected, rtol=1e-5
        )

    def test_float64_stays(self):
        with jax.enable_x64(True):
            logits = jnp.asarray(np.asarray(self.logits), jnp.float64)
            labels = jnp.asarray(np.asarray(self.labels))
            for name in ("ce", "dlr", "cw"):
                self.assertEqual(attacks.LOSSES[name](logits, labels).dtype, jnp.float64)

    @sweeps.rows(
        ("dlr", 2, "needs at least 3 classes, but the logits have 2; use loss='ce'"),
        ("dlr-targeted", 3, "needs at least 4 classes, but the logits have 3"),
        ("pm", 1, "loss 'pm' needs at least 2 classes, but the logits have 1"),
    )
    def test_too_few_classes(self, name, classes, message):
        labels = [jnp.zeros(1, jnp.int32)] * (2 if name == "dlr-targeted" else 1)
        with self.assertRaisesRegex(ValueError, message):
            attacks.LOSSES[name](jnp.zeros((1, classes)), *labels)

    def test_wrong_kind_of_labels(self):
        soft = jnp.full((6, 10), 0.1)
        with self.assertRaisesRegex(ValueError, "use loss='ce' or 'kl' with soft targets"):
            attacks.dlr_loss(self.logits, soft)
        with self.assertRaisesRegex(ValueError, "pass the softmax of the clean logits"):
            attacks.kl_loss(self.logits, self.labels)

    def test_shapes_that_would_broadcast(self):
        for loss in (attacks.ce_loss, attacks.kl_loss):
            for shape in ((6, 1), (1, 10), (6, 9), (6, 11), (6, 10, 1)):
                with self.assertRaisesRegex(ValueError, r"do not fit logits of shape \(6, 10\); "):
                    loss(self.logits, jnp.full(shape, 0.1))
        for labels in (self.labels[:1], self.labels[:, None]):
            with self.assertRaisesRegex(ValueError, r"pass labels i32\[B\] or soft targets"):
                attacks.ce_loss(self.logits, labels)
