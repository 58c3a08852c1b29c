import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest

from jaxrobust.training.update import objectives
from jaxrobust.types import Batch, Classifier


def linear_net() -> Classifier:
    """Logits are a matrix times the pixels: every loss can be written down in NumPy."""
    weights = np.random.default_rng(0).normal(size=(12, 5)).astype(np.float32)

    def apply(params, stats, images, *, train=False, key=None):
        return images.reshape(len(images), -1) @ params["w"], stats

    return Classifier(lambda key: ({"w": jnp.asarray(weights)}, {}), apply)


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


class ObjectivesTest(absltest.TestCase):
    def setUp(self):
        super().setUp()
        rng = np.random.default_rng(1)
        self.images, self.adv = rng.random((2, 6, 2, 2, 3), dtype=np.float32)
        self.labels = rng.integers(0, 5, 6).astype(np.int32)
        self.net = linear_net()
        self.params, _ = self.net.init(jax.random.key(0))
        w = np.asarray(self.params["w"], np.float64)
        self.p, self.q = (softmax(x.reshape(6, -1) @ w) for x in (self.images, self.adv))

    def value(self, objective, labels=None):
        batch = Batch(
            jnp.asarray(self.images), jnp.asarray(self.labels if labels is None else labels)
        )
        return objective.loss(self.net, self.params, {}, batch, jnp.asarray(self.adv), None)

    def test_clean_and_adversarial(self):
        for objective, p, name in (
            (objectives.clean(), self.p, "clean"),
            (objectives.adversarial(), self.q, "robust"),
        ):
            value, (_, metrics) = self.value(objective)
            expected = -np.log(p[np.arange(6), self.labels]).mean()
            np.testing.assert_allclose(value, expected, rtol=1e-5)  # float32 logits of size 3
            expected = (p.argmax(-1) == self.labels).mean()
            np.testing.assert_allclose(metrics[name], expected, rtol=1e-6)

    def test_soft_targets(self):
        soft = softmax(np.random.default_rng(2).normal(size=(6, 5))).astype(np.float32)
        value, (_, metrics) = self.value(objectives.adversarial(), soft)
        np.testing.assert_allclose(value, -(soft * np.log(self.q)).sum(-1).mean(), rtol=1e-5)
        expected = (self.q.argmax(-1) == soft.argmax(-1)).mean()
        np.testing.assert_allclose(metrics["robust"], expected, rtol=1e-6)

    def test_what_the_attack_aims_at(self):
        soft = softmax(np.random.default_rng(2).normal(size=(6, 5))).astype(np.float32)
        for labels in (soft, self.labels):
            batch = Batch(jnp.asarray(self.images), jnp.asarray(labels))
            found = objectives.adversarial().attack_targets(None, batch)
            np.testing.assert_array_equal(found, labels)
            found = objectives.adversarial("hard").attack_targets(None, batch)
            self.assertEqual(found.dtype, jnp.int32)
            np.testing.assert_array_equal(found, labels.argmax(-1) if labels.ndim > 1 else labels)
            # Only the attack is told so: the loss is that of the labels as they are.
            hard, plain = (
                self.value(objectives.adversarial(kind), labels)[0] for kind in ("hard", "soft")
            )
            self.assertEqual(hard, plain)

    def test_trades_with_soft_targets(self):
        soft = softmax(np.random.default_rng(2).normal(size=(6, 5))).astype(np.float32)
        value, (_, metrics) = self.value(objectives.trades(6.0), soft)
        expected = -(soft * np.log(self.p)).sum(-1).mean() + 6 * metrics["kl"]
        np.testing.assert_allclose(value, expected, rtol=1e-5)  # float32 logits of size 3
        expected = (self.p.argmax(-1) == soft.argmax(-1)).mean()
        np.testing.assert_allclose(metrics["clean"], expected, rtol=1e-6)

    def test_mart(self):
        """In NumPy, from its formula; the label is the likeliest class of some images only."""
        images = np.arange(6)
        for labels in (self.labels, np.eye(5, dtype=np.float32)[self.labels]):
            value, (_, metrics) = self.value(objectives.mart(5.0), labels)
            others = self.q.copy()
            others[images, self.labels] = -1
            margin = -np.log(1.0001 - others.max(1))
            sure = self.p[images, self.labels]
            kl = ((self.p * np.log(self.p / self.q)).sum(-1) * (1 - sure)).mean()
            wrong = -np.log(self.q[images, self.labels])
            expected = (wrong + margin).mean() + 5 * kl
            np.testing.assert_allclose(value, expected, rtol=1e-5)  # float32 logits of size 3
            np.testing.assert_allclose(metrics["kl"], kl, rtol=1e-4)
        self.assertGreater((others.max(1) > sure).sum(), 0)

    def test_marts_attack_aims_at_labels(self):
        soft = softmax(np.random.default_rng(2).normal(size=(6, 5))).astype(np.float32)
        batch = Batch(jnp.asarray(self.images), jnp.asarray(soft))
        for kind, expected in (("soft", soft), ("hard", soft.argmax(-1))):
            found = objectives.mart(6.0, attack_labels=kind).attack_targets(None, batch)
            np.testing.assert_array_equal(found, expected)

    def test_trades(self):
        value, (_, metrics) = self.value(objectives.trades(6.0))
        kl = (self.p * np.log(self.p / self.q)).sum(-1).mean()
        clean = -np.log(self.p[np.arange(6), self.labels]).mean()
        np.testing.assert_allclose(value, clean + 6 * kl, rtol=1e-5)
        np.testing.assert_allclose(metrics["kl"], kl, rtol=1e-4)
        batch = Batch(jnp.asarray(self.images), jnp.asarray(self.labels))
        targets = objectives.trades(6.0).attack_targets(
            lambda x: self.net.apply(self.params, {}, x)[0], batch
        )
        np.testing.assert_allclose(targets, self.p, rtol=1e-5, atol=1e-7)

    def test_sparse_adds_up_in_float32(self):
        params = {"kernel": jnp.full((300, 300), 0.01, jnp.bfloat16)}
        norm = objectives.l1_norm(params)
        self.assertEqual(norm.dtype, jnp.float32)
        np.testing.assert_allclose(norm, 90_000 * float(params["kernel"][0, 0]), rtol=1e-5)


class SparseTest(absltest.TestCase):
    def setUp(self):
        super().setUp()
        kernel, other = np.float32([[1.5, -2.0], [0.0, 0.25]]), np.float32([-3.0])
        rest = {"a.bias": np.float32([9.0]), "token": np.float32([7.0])}
        arrays = {"a.kernel": kernel, "b.kernel": other} | rest
        self.params = {name: jnp.asarray(array) for name, array in arrays.items()}

    def test_the_norm_of_kernels_and_its_gradient(self):
        value, slopes = jax.value_and_grad(objectives.l1_norm)(self.params)
        self.assertEqual(value, 1.5 + 2 + 0.25 + 3)
        self.assertEqual(slopes["a.kernel"].tolist(), [[1, -1], [0, 1]])  # none at 0
        self.assertEqual((slopes["b.kernel"].tolist(), slopes["a.bias"].tolist()), ([-1], [0]))

    def test_it_is_added_to_another_objective_and_told(self):
        seen = []

        def loss(*given):
            seen.append(given)
            return jnp.float32(10), ("after", {"accuracy": 0.5})

        other = objectives.Objective(loss=loss, attack_targets="targets", draws=True)
        made = objectives.sparse(other, 0.5)
        given = ("net", self.params, "stats", "batch", "adv", "key")
        value, (after, metrics) = made.loss(*given)
        self.assertEqual((float(value), after), (10 + 0.5 * 6.75, "after"))
        self.assertEqual((metrics["accuracy"], float(metrics["l1"])), (0.5, 6.75))
        self.assertEqual(seen, [given])
        self.assertEqual((made.attack_targets, made.draws), ("targets", True))
