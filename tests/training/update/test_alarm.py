import functools
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from jax.sharding import PartitionSpec

from jaxrobust import attacks
from jaxrobust.runtime.devices import sharding
from jaxrobust.training.update import alarm, objectives, step
from jaxrobust.types import Batch, Classifier
from tests.support import sweeps
from tests.support.steps import small_config

SHAPE, CLASSES, HIDDEN = (16, 4, 4, 3), 10, 32


def perceptron(dtype):
    """Two layers, computed in `dtype`."""

    def apply(params, stats, images, *, train=False, key=None):
        x = images.reshape(len(images), -1).astype(dtype) - jnp.asarray(0.5, dtype)
        x = jnp.tanh(x @ params["first"].astype(dtype))
        return (x @ params["second"].astype(dtype)).astype(jnp.float32), stats

    def init(key):
        first, second = jax.random.split(key)
        size = SHAPE[1] * SHAPE[2] * SHAPE[3]
        return {
            "first": jax.random.normal(first, (size, HIDDEN)) / size**0.5 * 3,
            "second": jax.random.normal(second, (HIDDEN, CLASSES)) / HIDDEN**0.5,
        }, {}

    return Classifier(init, apply)


def linear(dtype):
    def apply(params, stats, images, *, train=False, key=None):
        x = images.reshape(len(images), -1).astype(dtype)
        return (x @ params["kernel"].astype(dtype)).astype(jnp.float32), stats

    return Classifier(lambda key: ({}, {}), apply)


def images_of(seed=0):
    return jax.random.uniform(jax.random.key(seed), SHAPE)


def cross_entropy(logits, labels):
    return -np.asarray(jax.nn.log_softmax(logits))[np.arange(len(labels)), np.asarray(labels)]


def certain(params, scale):
    """The same decisions with larger logits."""
    return params | {"second": scale * params["second"]}


def probe_of(
    *, dtype=jnp.float32, network=perceptron, attack=attacks.apgd, objective=None,
    mean=lambda tree: tree, **more,
):  # fmt: skip
    options = {"epsilon": 0.1} | more
    weaker, stronger = (attack(steps=steps, **options) for steps in (2, 2 + alarm.STRONGER))
    parts = step.GradientParts(
        network(dtype),
        weaker,
        objective or objectives.adversarial(),
        dtype=jnp.dtype(dtype),
        mean_over_devices=mean,
    )

    def probe(params, stats, images, labels, keys):
        return alarm.probe(
            *(params, stats, {}, Batch(images, labels), keys),
            parts=parts,
            net32=network(jnp.float32),
            stronger_attack=stronger,
        )

    return probe


@functools.cache
def usual_probe(dtype=jnp.float32):
    """One program for the tests that look at the same network and attack."""
    return jax.jit(probe_of(dtype=dtype))


class ProbeTest(parameterized.TestCase):
    def setUp(self):
        self.images = images_of()
        self.params, _ = perceptron(jnp.float32).init(jax.random.key(1))
        self.labels = jax.random.randint(jax.random.key(2), SHAPE[:1], 0, CLASSES, jnp.int32)

    def predictions(self):
        logits, _ = perceptron(jnp.float32).apply(self.params, {}, self.images)
        return logits.argmax(-1).astype(jnp.int32)

    def test_losses_are_those_of_the_attacks(self):
        self.check_losses("adversarial")

    @pytest.mark.slow
    def test_losses_of_trades_are_comparable(self):
        """Its attack aims at the clean probabilities."""
        self.check_losses("trades")

    def check_losses(self, objective):
        key, trades = jax.random.key(3), objective == "trades"
        kind = {"loss": "kl" if trades else "ce", "random_start": True}
        chosen = objectives.trades(6.0) if trades else objectives.adversarial()
        probe = probe_of(objective=chosen, **kind)
        found = jax.jit(probe)(self.params, {}, self.images, self.labels, key)
        logits = jax.jit(lambda x: perceptron(jnp.float32).apply(self.params, {}, x)[0])
        targets = jax.nn.softmax(logits(self.images)) if trades else self.labels
        for name, steps in (("alarm_loss", 2), ("alarm_loss_stronger", 5)):
            attack = jax.jit(partial(attacks.apgd(epsilon=0.1, steps=steps, **kind), logits))
            expected = cross_entropy(logits(attack(key, self.images, targets)), self.labels).mean()
            np.testing.assert_allclose(found[name], expected, rtol=1e-5, err_msg=name)

    @sweeps.fast(1)
    @parameterized.parameters(jnp.float32, jnp.bfloat16)
    def test_agreement_is_that_of_the_gradients(self, dtype):
        found = usual_probe(dtype)(self.params, {}, self.images, self.labels, None)

        def signs(dtype):
            def loss(x):
                logits, _ = perceptron(dtype).apply(self.params, {}, x)
                return jax.nn.log_softmax(logits)[jnp.arange(16), self.labels].sum()

            return np.sign(jax.grad(loss)(self.images))

        same = (signs(dtype) == signs(jnp.float32)).mean()
        # Of 768 signs, three that another order of bfloat16 sums may turn.
        np.testing.assert_allclose(found["alarm_gradient_agreement"], same, atol=3 / 768)
        self.assertEqual(found["alarm_gradient_zero"], 0)
        if dtype == jnp.bfloat16:
            self.assertBetween(same, 0.9, 0.9999)
        self.assertEmpty(alarm.warnings(jax.device_get(found)))

    def test_soft_labels_and_bytes(self):
        soft, image_bytes = (
            jax.nn.one_hot(self.labels, CLASSES),
            (self.images * 255).astype("uint8"),
        )
        probe = usual_probe()
        a = probe(self.params, {}, image_bytes, soft, None)
        b = probe(self.params, {}, image_bytes.astype("float32") / 255, self.labels, None)
        for name in a:
            np.testing.assert_allclose(a[name], b[name], rtol=1e-5, err_msg=name)

    @pytest.mark.matrix
    def test_eight_devices_are_one(self):
        options = {"dtype": jnp.bfloat16, "random_start": True}
        probe = probe_of(**options)
        keys = attacks.image_keys(jax.random.key(3), SHAPE[0])
        mesh = sharding.make_mesh(jax.devices())
        rows, axes = PartitionSpec(mesh.axis_names), mesh.axis_names
        spread = jax.shard_map(
            probe_of(mean=partial(jax.lax.pmean, axis_name=axes), **options),
            mesh=mesh,
            in_specs=(PartitionSpec(), PartitionSpec(), rows, rows, rows),
            out_specs=PartitionSpec(),
            check_vma=False,
        )
        functions = jax.jit(probe), jax.jit(spread)
        # With large logits only some images have a gradient: shares of other numbers per device.
        for scale in (1, 400):
            params = certain(self.params, scale)
            one, many = (f(params, {}, self.images, self.predictions(), keys) for f in functions)
            if scale > 1:
                self.assertBetween(one["alarm_gradient_zero"], 0.1, 0.9)
            for name in one:
                # Another order of sums, which the signs of 3 of 768 pixels may feel.
                error = {"rtol": 1e-3, "atol": 4e-3, "err_msg": name}
                np.testing.assert_allclose(one[name], many[name], **error)

    def test_saturated_network_has_no_gradient(self):
        probe = usual_probe()
        shares = []
        for scale in (1, 1e2, 1e3, 1e4, 1e5):
            params = certain(self.params, scale)
            found = probe(params, {}, self.images, self.predictions(), None)
            shares.append(float(found["alarm_gradient_zero"]))
        self.assertEqual(shares, sorted(shares))
        self.assertEqual(shares[0], 0)
        self.assertGreater(shares[-2], 0.9)
        (sentence,) = alarm.warnings(jax.device_get(found))
        self.assertRegex(sentence, r"\d+% of the images, the input gradient is only")

    def test_no_gradient_at_all_is_no_disagreement(self):
        params = jax.tree.map(jnp.zeros_like, self.params)
        found = usual_probe(jnp.bfloat16)(params, {}, self.images, self.labels, None)
        self.assertEqual(found["alarm_gradient_agreement"], 1)
        self.assertEqual(found["alarm_gradient_zero"], 1)

    def test_coarse_type_loses_the_sign(self):
        # bfloat16 knows neighbors of 100 at a distance of 0.5.
        kernel = 100 + 0.1 * jax.random.normal(jax.random.key(4), (48, CLASSES))
        probe = jax.jit(probe_of(dtype=jnp.bfloat16, network=linear))
        found = probe({"kernel": kernel}, {}, self.images, self.labels, None)
        self.assertLess(found["alarm_gradient_agreement"], 0.7)
        sentences = alarm.warnings(jax.device_get(found))
        self.assertIn("the input gradient has the same sign", " ".join(sentences))


class WarningsTest(parameterized.TestCase):
    def values(self, **changes):
        healthy = {"loss": 1.0, "loss_stronger": 1.05}
        healthy |= {"gradient_agreement": 0.99, "gradient_zero": 0.0}
        return {f"alarm_{key}": value for key, value in (healthy | changes).items()}

    @sweeps.rows(
        {},
        {"loss": 0.1, "loss_stronger": 0.5},  # five times, but both small
        {"loss": 4.3, "loss_stronger": 7.0},  # clean weights under FGSM
        {"gradient_agreement": 0.9},
        {"gradient_zero": 0.05},
    )
    def test_silence(self, **changes):
        self.assertEmpty(alarm.warnings(self.values(**changes)))

    def test_sentences_name_figures_and_remedy(self):
        rows = (
            (
                {"loss": 0.02, "loss_stronger": 5.1},
                "is 5.1 .* 3 more steps, but 0.02 .*attack.steps",
            ),
            (
                {"gradient_zero": 0.4},
                "^for 40% of the images, the input gradient is only.*label_smoothing",
            ),
            ({"gradient_agreement": 0.6}, "at only 60% of the pixels.*Set model.dtype='float32'"),
        )
        for changes, pattern in rows:
            (sentence,) = alarm.warnings(self.values(**changes))
            self.assertRegex(sentence, pattern)
        everything = {key: value for changes, _ in rows for key, value in changes.items()}
        self.assertLen(alarm.warnings(self.values(**everything)), 3)

    def test_thresholds(self):
        values = self.values(loss_stronger=1.8, gradient_agreement=0.9, gradient_zero=0.05)
        self.assertEmpty(alarm.warnings(values))
        self.assertLen(alarm.warnings(values, loss_ratio=1.5), 1)
        self.assertEmpty(alarm.warnings(values, loss_ratio=1.5, loss_rise=0.9))
        self.assertLen(alarm.warnings(values, agreement=0.95), 1)
        self.assertLen(alarm.warnings(values, zero=0.01), 1)
        # At a limit itself nothing is said.
        self.assertEmpty(alarm.warnings(values, zero=0.05, agreement=0.9))
        loss = values["alarm_loss"]
        twice = values | {"alarm_loss_stronger": 2 * loss}
        self.assertEmpty(alarm.warnings(twice, loss_ratio=2.0, loss_rise=loss / 2))
        self.assertEmpty(alarm.warnings(twice, loss_ratio=1.5, loss_rise=loss))
        self.assertLen(alarm.warnings(twice, loss_ratio=1.5, loss_rise=loss / 2), 1)


class OverfittingTest(parameterized.TestCase):
    def test_fall_while_training_rises(self):
        sentence = alarm.overfitting(
            [0.40, 0.53, 0.49, 0.46], [0.40, 0.55, 0.65, 0.75], images=4000
        )
        self.assertRegex(sentence, "from 53.0% at evaluation 2 to 46.0% at evaluation 4.*55.0% to")

    @sweeps.rows(
        ([], []),
        ([0.5], [0.5]),
        ([0.5, 0.3], [0.5, 0.6]),  # one evaluation after the best is too few
        ([0.5, 0.4, 0.49], [0.5, 0.6, 0.7]),  # recovered
        ([0.5, 0.49, 0.3], [0.5, 0.6, 0.7]),  # once
        ([0.5, 0.48, 0.48], [0.5, 0.6, 0.7]),  # by less than 3 points
        ([0.5, 0.4, 0.4], [0.5, 0.4, 0.4]),  # training falls too: another kind of trouble
        ([0.5, 0.52, 0.54], [0.5, 0.6, 0.7]),
        ([0.5, 0.4, 0.4], [0.5, 0.6, 0.5]),  # training is where it was
        ([0.5, 0.4, 0.4], [0.5, 0.6, math.nan]),  # and here it was not logged
        ([0.5, 0.4, 0.4], [math.nan, 0.6, 0.7]),
    )
    def test_silence(self, selection, training):
        self.assertIsNone(alarm.overfitting(selection, training, images=4000))


class CostTest(parameterized.TestCase):
    @sweeps.rows(
        # targets + attack + its loss + stronger attack + its loss + two gradients
        ("apgd", 2, "adversarial", "float32", 0 + 5 + 1 + 11 + 1 + 2 + 2, 5 + 3),
        ("apgd", 2, "adversarial", "bfloat16", 0 + 5 + 1 + 11 + 1 + 2 + 12, 5 + 3),
        ("pgd", 10, "trades", "float32", 1 + 20 + 1 + 26 + 1 + 2 + 2, 1 + 20 + 6),
        ("fgsm", 7, "adversarial", "float32", 0 + 2 + 1 + 8 + 1 + 2 + 2, 2 + 3),
    )
    def test_counts_passes(self, attack, steps, objective, dtype, of_probe, of_step):
        changes = {"train__batch_size": 1024, "attack__name": attack, "attack__steps": steps}
        changes |= {"train__objective": objective, "model__dtype": dtype}
        config = small_config(alarm__every_steps=500, **changes)
        found = alarm.check_cost(config, "train", images=64)
        self.assertAlmostEqual(found, of_probe * 64 / (of_step * 1024 * 500))

    def test_remedy_is_the_least_that_works(self):
        def cost(every_steps):
            config = small_config(
                train__batch_size=64, attack__steps=2, alarm__every_steps=every_steps
            )
            return alarm.check_cost(config, "train", images=64)

        message = (
            r"alarm.every_steps=50 with 64 images adds 5.50% to the cost of training, more than "
            r"1%; set alarm.every_steps=275 or more, or reduce alarm.images"
        )
        with self.assertRaisesRegex(ValueError, message):
            cost(50)
        self.assertAlmostEqual(cost(275), 0.01)
        with self.assertRaisesRegex(ValueError, "every_steps=274"):
            cost(274)


class NormsTest(absltest.TestCase):
    def test_says_which_norms_and_how_many_channels(self):
        good = {"bn1.mean": [0, -3], "bn1.var": [1, 1e-9], "fc.moment": [np.inf], "var": [1]}
        good |= {"normalize.mean": [np.nan], "norm.running_var": [3]}
        for bad, broken in (
            ({}, ""),
            ({"bn1.mean": [np.inf, 1]}, "the running mean of bn1 is not finite in 1 of 2 channels"),
            (
                {"a.b.var": [-1e-5, 1, -3e-5]},
                "the running variance of a.b is negative in 2 of 3 channels (lowest -3e-05)",
            ),
            (
                {"norm.running_var": [-1], "bn1.var": [np.nan, -np.inf]},
                "the running variance of bn1 is not finite in 2 of 2 channels and the running "
                "variance of norm is negative in 1 of 1 channels (lowest -1)",
            ),
        ):
            stats = {k: jnp.asarray(v, jnp.float32) for k, v in (good | bad).items()}
            self.assertEqual(alarm.of_norms(stats), alarm.Norms(broken, ""))
        many = {f"bn{i}.var": np.float32([-1]) for i in range(9)}
        self.assertRegex(alarm.of_norms(many).broken, r"bn3 is negative in .* and 5 more norms$")

    def test_a_variance_of_nothing_is_dead_and_not_broken(self):
        """As of momentum 1, which forgets at once; that of the images' normalization is not a
        norm.
        """
        stats = {"a.var": [0, 1e-10, 1.1e-10, 1], "b.var": [1], "c.mean": [0, 0]}
        stats |= {"normalize.var": [0], "normalize.mean": [0]}
        found = alarm.of_norms({k: np.float32(v) for k, v in stats.items()})
        self.assertEqual(found.broken, "")
        self.assertStartsWith(found.dead, "2 of 4 in a channels are dead:")

    def test_dead_channels_are_a_warning(self):
        """Those of a batch norm whose images do not vary, after as many updates as it says."""
        from jaxrobust.models.modules.basic import BatchNorm

        norm = BatchNorm(3)
        images = jnp.zeros((4, 2, 2, 3)).at[0, 0, 0, 1].set(1)
        for updates in range(1, 221):
            norm(images, True)
            found = alarm.of_norms({"bn1.mean": norm.mean[...], "bn1.var": norm.var[...]})
            self.assertEqual(bool(found.dead), updates >= 219, updates)
            self.assertFalse(found.broken)
        self.assertRegex(found.dead, r"^2 of 3 in bn1 channels are dead: .* of at most 1e-10")


class FallTest(parameterized.TestCase):
    """A fall counts beyond twice the standard error of a difference, and beyond three points."""

    @sweeps.rows(
        # Of 100 images at 50% two standard errors of a difference are 14.1 points.
        ([0.5, 0.37, 0.36], 100, False),
        ([0.5, 0.35, 0.34], 100, True),
        # Of 10,000 they are 1.4, and three points are more.
        ([0.5, 0.471, 0.46], 10_000, False),
        ([0.5, 0.469, 0.46], 10_000, True),
        ([0.5, 0.4, 0.48], 10_000, False),  # one bad evaluation
        ([0.5, 0.4], 10_000, False),
        ([0.3, 0.5, 0.4, 0.45], 10_000, True),
    )
    def test_of_so_many_images(self, selection, images, alarms):
        training = [0.1 * (1 + place) for place in range(len(selection))]
        said = alarm.overfitting(selection, training, images=images)
        self.assertEqual(said is not None, alarms, said)
