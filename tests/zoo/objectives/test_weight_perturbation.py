"""Adversarial weight perturbation: updates next to PyTorch, and its rule of moving weights."""

from functools import partial
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from jax import lax

from jaxrobust.config import base, phase
from jaxrobust.runtime.devices import sharding
from jaxrobust.training import build
from jaxrobust.training.update import objectives, step
from jaxrobust.types import Batch
from jaxrobust.zoo.objectives import weight_perturbation as perturbation
from tests.support import parity
from tests.support import small_updates as small
from tests.support.steps import small_config, standard

BETA = 6.0
RECIPE = dict(
    optimizer="sgd", weight_decay=2e-4, lr=0.1, final_lr=0.0, warmup_epochs=0, epochs=20,
    schedule="step", lr_steps=(12, 16), decay_mask="all", clip_norm=5.0, trades_beta=BETA,
    objective="trades-awp",
)  # fmt: skip


def beside_pytorch(test, count: int) -> None:
    """As Wu et al. write it: a copy of the weights ascends, then those at the sum descend."""
    torch = parity.torch_or_skip(test)
    from torch.nn import functional as f

    arrays = {k: torch.tensor(a) for k, a in small.weights().items()}
    learned = {k: a.requires_grad_() for k, a in arrays.items() if "running" not in k}
    sgd = torch.optim.SGD(learned.values(), lr=0.1, momentum=0.9, weight_decay=2e-4)

    forward = small.torch_forward(torch, arrays)

    def trades(own, x, adversarial, y, momentum):
        clean, robust = (forward(own, z, True, momentum) for z in (x, adversarial))
        divergence = f.kl_div(robust.log_softmax(1), clean.softmax(1), reduction="batchmean")
        return f.cross_entropy(clean, y) + BETA * divergence

    final: dict = {}
    for i, (state, metrics) in enumerate(small.updates(RECIPE, count)):
        images, labels, start = small.update_data(i)
        x, point = (torch.tensor(a.transpose(0, 3, 1, 2).copy()) for a in (images, start))
        y = torch.tensor(labels).long()
        point = small.torch_point(torch, lambda z: forward(learned, z, False), x, point)
        slopes = torch.autograd.grad(trades(learned, x, point, y, 0.0), list(learned.values()))
        moved = {}
        for (name, w), g in zip(learned.items(), slopes, strict=True):
            far = 0.005 * w.detach().norm() * g / g.norm() if w.ndim > 1 else 0.0
            moved[name] = (w.detach() + far).requires_grad_()
        loss = trades(moved, x, point, y, 0.1)
        for group in sgd.param_groups:
            group["lr"] = 0.1 * 0.1 ** ((i >= 12) + (i >= 16))
        for w, g in zip(
            learned.values(), torch.autograd.grad(loss, list(moved.values())), strict=True
        ):
            w.grad = g
        norm = torch.nn.utils.clip_grad_norm_(learned.values(), 5.0)
        sgd.step()
        final = state.params | state.stats
        np.testing.assert_allclose(metrics["loss"], loss.item(), rtol=1e-9, err_msg=str(i))
        np.testing.assert_allclose(metrics["gradient_norm"], norm.item(), rtol=1e-9)
    for key, array in final.items():
        expected = small.ours(arrays[key].detach().numpy())
        np.testing.assert_allclose(array, expected, rtol=0, atol=1e-9, err_msg=key)


class UpdatesTest(absltest.TestCase):
    def test_ten_updates(self):
        with jax.enable_x64(True), standard():
            beside_pytorch(self, 10)

    @pytest.mark.slow
    def test_twenty_updates(self):
        """The learning rate falls twice in them."""
        with jax.enable_x64(True), standard():
            beside_pytorch(self, 20)


class RuleTest(parameterized.TestCase):
    def test_each_layer_moves_by_a_share_of_its_norm_along_its_gradient(self):
        random = np.random.default_rng(0)
        shapes = {"a.kernel": (3, 3, 2, 4), "b.weight": (4, 5), "b.bias": (5,), "pos": (1, 4)}
        params, ascent = (
            {k: jnp.asarray(random.standard_normal(s), jnp.float32) for k, s in shapes.items()}
            for _ in range(2)
        )
        moved = perturbation.perturbed(params, ascent, 0.25)
        for key in ("a.kernel", "b.weight"):
            far = np.asarray(moved[key] - params[key]).ravel()
            own, slope = (np.asarray(part[key]).ravel() for part in (params, ascent))
            np.testing.assert_allclose(np.linalg.norm(far), 0.25 * np.linalg.norm(own), rtol=1e-5)
            cosine = far @ slope / np.linalg.norm(far) / np.linalg.norm(slope)
            self.assertGreater(cosine, 1 - 1e-6)
        for key in ("b.bias", "pos"):
            np.testing.assert_array_equal(moved[key], params[key])
        still = perturbation.perturbed(params, jax.tree.map(jnp.zeros_like, ascent), 0.25)
        jax.tree.map(np.testing.assert_array_equal, still, params)

    def test_half_precision_is_refused(self):
        half = {"a.kernel": jnp.ones((2, 2), jnp.bfloat16)}
        with self.assertRaisesRegex(
            ValueError, "of 0.50% is mostly rounded away in bfloat16; set model.dtype=float32"
        ):
            perturbation.perturbed(half, half, 0.005)

    def test_row(self):
        row, plain = objectives.named("trades-awp"), objectives.named("trades")
        self.assertEqual(row.weights, plain.weights)
        attacked = base().attack
        passes = objectives.passes("trades", attacked)
        self.assertEqual(objectives.passes("trades-awp", attacked), passes + 6)


class DevicesTest(absltest.TestCase):
    def test_a_phase_averages_over_its_devices(self):
        config = small_config(train__objective="trades-awp", attack__start="random")
        with mock.patch.object(step, "GradientParts", wraps=step.GradientParts) as parts:
            build.phase(config, "train", 64)
        (call,) = parts.call_args_list
        self.assertEqual(call.kwargs["mean_over_devices"].args, (lax.pmean,))
        self.assertIsNotNone(call.kwargs["objective"].displaced)

    def test_what_a_phase_refuses(self):
        for changes, message in (
            (
                {"model__dtype": "bfloat16"},
                "perturbs weights by amounts that bfloat16 cannot represent; set",
            ),
            ({"attack__start": "image"}, "start"),  # as TRADES does, whose gradient is 0 there
        ):
            config = small_config(
                **{"train__objective": "trades-awp", "attack__start": "random"} | changes
            )
            with self.assertRaisesRegex(ValueError, message):
                build.phase(config, "train", 64)

    @pytest.mark.slow
    def test_weights_move_along_the_gradient_of_all_devices(self):
        """Else the update of eight devices would be another one than that of one."""
        objective = objectives.named("trades-awp").make(phase(**RECIPE), None)
        params = {k: small.ours(a).astype(jnp.float32) for k, a in small.weights().items()}
        stats = {k: params.pop(k) for k in list(params) if "running" in k}
        images, labels, start = (jnp.asarray(a) for a in small.update_data(0))
        batch = Batch(images.astype(jnp.float32), labels.astype(jnp.int32))
        start, found = start.astype(jnp.float32), []

        def attack(logits_fn, start, images, targets):  # keys are split as the images are
            return small.attack(logits_fn, None, images, targets, start)

        for count in (1, 8):
            mesh = sharding.make_mesh(jax.devices()[:count])
            spread = sharding.spread(mesh, params)
            parts = step.GradientParts(
                small.network(norm=False), attack, objective, mean_over_devices=spread.mean
            )
            of_device = partial(step.device_gradients, parts=parts, spread=spread, microbatches=1)
            run = jax.jit(spread.each(of_device, copies=2, split=2, gradients=True))
            keys = step.ImageKeys(start, jax.random.split(jax.random.key(0), 8))
            found.append(run(params, stats, {}, batch, keys)[0])
        for key in ("conv1.weight", "conv2.weight", "fc.weight"):
            one, eight = (np.asarray(grads[key]) for grads in found)
            np.testing.assert_allclose(eight, one, rtol=1e-4, atol=1e-6, err_msg=key)
