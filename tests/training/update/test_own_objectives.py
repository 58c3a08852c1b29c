"""DKL and HAT: twenty updates next to PyTorch's in float64, and what a step remembers for them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from jaxrobust.config import base
from jaxrobust.training import build
from jaxrobust.training.run import warnings
from jaxrobust.training.update import memory, objectives, step
from jaxrobust.types import Batch, Classifier
from jaxrobust.zoo.objectives import hat_examples, improved_kl
from tests.support import parity, sweeps
from tests.support import small_updates as small
from tests.support.steps import batch_of, small_config, standard

RECIPE = dict(
    optimizer="sgd", weight_decay=2e-4, lr=0.05, final_lr=0.0, warmup_epochs=0, epochs=20,
    schedule="step", lr_steps=(12, 16), decay_mask="all", clip_norm=5.0,
)  # fmt: skip
PER_EPOCH = 6  # updates, after each of which the means of classes are new


def soft_pairs(clean, robust, weights):
    """The distance of DKL as the paper writes it, with a term for each pair of classes."""
    pairs = [z[:, :, None] - z[:, None, :] for z in (clean, robust)]
    both = weights[:, :, None] * weights[:, None, :]
    return 0.25 * (both * (pairs[0] - pairs[1]) ** 2).sum((1, 2))


def torch_dkl(torch, means):
    """CE(clean) + 4 CE(robust, clean probabilities) + 20 times the distance."""
    from torch.nn import functional as f

    def loss(forward, learned, x, point, y):
        clean, robust = (forward(learned, z, True) for z in (x, point))
        soft = -(clean.softmax(1).detach() * robust.log_softmax(1)).sum(1).mean()
        distance = soft_pairs(clean, robust, means.now[y]).mean()
        means.add(clean.detach(), y)
        return f.cross_entropy(clean, y) + 4 * soft + 20 * distance

    return loss


class Means:
    """The mean probabilities of each class in the epoch before."""

    def __init__(self, torch):
        self.torch = torch
        self.now = torch.full((10, 10), 0.1, dtype=torch.float64)
        self.sums, self.steps = torch.zeros_like(self.now), 0

    def add(self, clean, y):
        for told, label in zip((clean / 4).softmax(1), y, strict=True):
            self.sums[label] += told
        self.steps += 1
        if self.steps % PER_EPOCH == 0:
            whole = self.sums.sum(1, keepdim=True)
            self.now = self.torch.where(whole > 0, self.sums / whole.clamp(min=1e-9), self.now)
            self.sums = self.torch.zeros_like(self.now)


def torch_hat(torch, first):
    """TRADES with beta 2.5, and half the cross-entropy of helper examples."""
    from torch.nn import functional as f

    def loss(forward, learned, x, point, y):
        seen = first(point).argmax(1)
        beyond = x + 2 * (point - x)
        clean, robust, helped = (forward(learned, z, True) for z in (x, point, beyond))
        divergence = f.kl_div(robust.log_softmax(1), clean.softmax(1), reduction="batchmean")
        return f.cross_entropy(clean, y) + 2.5 * divergence + 0.5 * f.cross_entropy(helped, seen)

    return loss


def beside_pytorch(test, objective, count):
    torch = parity.torch_or_skip(test)
    arrays = {k: torch.tensor(a) for k, a in small.weights().items()}
    frozen = {k: a.clone() for k, a in arrays.items()}
    learned = {k: a.requires_grad_() for k, a in arrays.items() if "running" not in k}
    sgd = torch.optim.SGD(learned.values(), lr=0.05, momentum=0.9, weight_decay=2e-4)
    forward, early = (small.torch_forward(torch, own) for own in (arrays, frozen))
    first = lambda x: early(frozen, x, False)  # noqa: E731
    made = {"dkl": lambda: torch_dkl(torch, Means(torch)), "hat": lambda: torch_hat(torch, first)}
    loss_of, final = made[objective](), {}
    recipe = RECIPE | {"objective": objective}
    for i, (state, metrics) in enumerate(small.updates(recipe, count, PER_EPOCH)):
        images, labels, start = small.update_data(i)
        x, point = (torch.tensor(a.transpose(0, 3, 1, 2).copy()) for a in (images, start))
        y = torch.tensor(labels).long()
        point = small.torch_point(torch, lambda z: forward(learned, z, False), x, point)
        sgd.zero_grad()
        loss = loss_of(forward, learned, x, point, y)
        norm = small.torch_step(torch, sgd, loss, learned, i)
        final = state.params | state.stats
        np.testing.assert_allclose(metrics["loss"], loss.item(), rtol=1e-9, err_msg=str(i))
        np.testing.assert_allclose(metrics["gradient_norm"], norm, rtol=1e-9)
    test.assertEqual(set(final), set(arrays))
    for key, array in final.items():
        expected = small.ours(arrays[key].detach().numpy())
        np.testing.assert_allclose(array, expected, rtol=0, atol=1e-9, err_msg=key)


class UpdatesTest(parameterized.TestCase):
    @parameterized.parameters("dkl", "hat")
    @pytest.mark.slow
    def test_twenty_updates(self, objective):
        """The learning rate falls twice in them, and means of classes are new three times."""
        with jax.enable_x64(True), standard():
            beside_pytorch(self, objective, 20)


class ImprovedKlTest(absltest.TestCase):
    def test_the_distance_is_that_of_all_pairs(self):
        random = np.random.default_rng(0)
        clean, robust = random.standard_normal((2, 5, 7)).astype(np.float32)
        weights = random.random((5, 7)).astype(np.float32)  # which do not sum to 1
        found = improved_kl.weighed_distance(*map(jnp.asarray, (clean, robust, weights)))
        np.testing.assert_allclose(found, soft_pairs(clean, robust, weights), rtol=1e-5)

    def test_a_class_without_images_keeps_its_means(self):
        own = improved_kl.memory(3, steps_per_epoch=2)
        state = step.TrainState(jnp.int32(0), {}, {}, {}, (), jax.random.key(0))
        sums = jnp.array([[1.0, 3.0, 0.0], [0.0, 0.0, 0.0], [2.0, 0.0, 2.0]])
        told = memory.Remembering((), own.init({}, {}))
        told, shown = own.learn(state, told, {"class_sums": sums, "loss": 1.0})
        self.assertEqual(shown, {"loss": 1.0})
        np.testing.assert_array_equal(told.memory["class_means"], np.full((3, 3), 1 / 3, "f"))
        state = state._replace(step=jnp.int32(1))
        told, _ = own.learn(state, told, {"class_sums": sums})
        expected = np.array([[0.25, 0.75, 0], [1 / 3] * 3, [0.5, 0, 0.5]], np.float32)
        np.testing.assert_allclose(told.memory["class_means"], expected, rtol=1e-6)
        self.assertEqual(float(told.memory["class_sums"].sum()), 0)


class RowTest(parameterized.TestCase):
    def test_passes(self):
        attacked = base().attack
        trades = objectives.passes("trades", attacked)
        self.assertEqual(objectives.passes("dkl", attacked), trades)
        self.assertEqual(objectives.passes("hat", attacked), trades + 3 + 1)

    @sweeps.rows(("both", 3.0), ("adversarial", 2.0))
    def test_statistics_of_hat_move_at_each_pass_or_at_the_attacked_images(self, which, expected):
        """Images and helper examples add 0.5 to the statistics here, the attacked images 2."""

        def apply(params, stats, x, *, train=False, key=None):
            moved = stats["moved"] + jnp.where(x.mean() == 0.5, 2.0, 0.5)
            return jnp.zeros((len(x), 3)), {"moved": moved}

        memory = {f"{hat_examples.HELPER}moved": jnp.zeros(())}
        batch = Batch(jnp.zeros((4, 2, 2, 3)), jnp.zeros(4, jnp.int32))
        _, (stats, _) = hat_examples.hat(1.0, 0.5, which).loss(
            Classifier(lambda key: ({}, {}), apply),
            {},
            {"moved": jnp.zeros(())} | memory,
            batch,
            jnp.full((4, 2, 2, 3), 0.5),
            None,
        )
        self.assertEqual(float(stats["moved"]), expected)

    def test_hat_needs_weights_to_start_from(self):
        config = small_config(train__objective="hat", attack__start="random")
        with self.assertRaisesRegex(
            ValueError, "train.objective='hat' takes labels from the initial weights"
        ):
            warnings.check_start(config, "train")
        config.init.weights = "weights.safetensors"
        warnings.check_start(config, "train")

    @sweeps.rows("dkl_alpha", "dkl_beta", "hat_beta", "hat_gamma")
    def test_weights_of_parts(self, key):
        objective = {"train__objective": key.partition("_")[0], "attack__start": "random"}
        config = small_config(**objective, **{f"train__{key}": -1.0})
        with self.assertRaisesRegex(ValueError, f"train.{key}=-1.0 must be at least 0"):
            build.phase(config, "train", 64)

    @parameterized.parameters("dkl", "hat")
    @pytest.mark.slow
    def test_a_phase_trains_and_keeps_its_helper(self, objective):
        """On two devices, in two parts; the network's statistics are those of the network."""
        how = {"train__objective": objective, "attack__start": "random", "train__batch_size": 8}
        config = small_config(
            **how, train__microbatches=2, model__name="resnet18", attack__name="pgd"
        )
        config.attack.steps = 1
        config.model.options = {"depths": (1, 1, 1, 1), "small_stem": True}
        with standard():
            phase = build.phase(config, "train", 64, devices=jax.devices()[:2], donate=False)
            state = phase.init(jax.random.key(0))
            after, metrics = phase.step(state, batch_of(), build.control(phase.mesh))
        self.assertEqual(set(after.stats), set(state.stats))
        self.assertEqual(metrics["skipped"], 0)
        told = after.opt_state.memory
        if objective == "hat":
            self.assertEqual(
                set(told), {hat_examples.HELPER + key for key in state.params | state.stats}
            )
            for key, array in state.params.items():
                np.testing.assert_array_equal(told[hat_examples.HELPER + key], array)
        else:
            self.assertGreater(float(told["class_sums"].sum()), 0)
