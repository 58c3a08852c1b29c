"""Adversarial weight perturbation: updates beside PyTorch, and its rule of moving weights."""

from functools import partial
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from jax import lax

from jaxrobust.config import base, phase
from jaxrobust.models.kernels import batch_norms, layers
from jaxrobust.runtime.devices import sharding
from jaxrobust.training import build
from jaxrobust.training.update import averages, objectives, optim, step
from jaxrobust.training.update import weight_perturbation as perturbation
from jaxrobust.types import Batch, Classifier
from tests.support import parity
from tests.support.steps import small_config, standard

EPSILON, STEP, BETA = 8 / 255, 4 / 255, 6.0
SHAPES = {  # as PyTorch has them
    **{"conv1.weight": (4, 3, 3, 3), "bn.weight": (4,), "bn.bias": (4,)},
    **{"conv2.weight": (6, 4, 3, 3), "fc.weight": (10, 6), "fc.bias": (10,)},
}
RECIPE = dict(
    optimizer="sgd", weight_decay=2e-4, lr=0.1, final_lr=0.0, warmup_epochs=0, epochs=20,
    schedule="step", lr_steps=(12, 16), decay_mask="all", clip_norm=5.0, trades_beta=BETA,
    objective="trades-awp",
)  # fmt: skip


def weights() -> dict[str, np.ndarray]:
    """f64 draws, and the statistics of the batch norm."""
    random = np.random.default_rng(3)
    drawn = {k: 0.4 * random.standard_normal(shape) for k, shape in SHAPES.items()}
    drawn["bn.weight"] = 1 + 0.1 * drawn["bn.weight"]
    return drawn | {"bn.running_mean": np.zeros(4), "bn.running_var": np.ones(4)}


def update_data(i: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images f64[8,6,6,3], labels, and where the attack starts, of update i."""
    random = np.random.default_rng([5, i])
    images = random.random((8, 6, 6, 3))
    return images, random.integers(0, 10, 8), images + 0.01 * random.standard_normal(images.shape)


def ours(array: np.ndarray) -> jax.Array:
    axes = {4: (2, 3, 1, 0), 2: (1, 0)}.get(array.ndim)
    return jnp.asarray(array.transpose(axes) if axes else array)


def conv(x, kernel, stride):
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), [(1, 1)] * 2, dimension_numbers=numbers
    )


def network(norm: bool = True) -> Classifier:
    """Convolution, batch norm, SiLU, convolution, SiLU, mean, linear."""

    def apply(params, stats, images, *, train=False, key=None):
        x, moved = conv(images, params["conv1.weight"], 1), dict(stats)
        affine = params["bn.weight"], params["bn.bias"]
        names = ("bn.running_mean", "bn.running_var")
        if norm and train:
            x, *new = batch_norms.batch_norm_train(x, *affine)
            moved |= {k: 0.9 * stats[k] + 0.1 * v for k, v in zip(names, new, strict=True)}
        elif norm:
            x = batch_norms.batch_norm(x, *affine, *(stats[k] for k in names))
        x = jax.nn.silu(conv(jax.nn.silu(x), params["conv2.weight"], 2)).mean((1, 2))
        return layers.linear(x, params["fc.weight"], params["fc.bias"]), moved

    return Classifier(lambda key: ({}, {}), apply)


def attack(logits_fn, start, images, targets):
    """Two steps of sign ascent on TRADES' divergence."""

    def divergence(x):
        return -(targets * jax.nn.log_softmax(logits_fn(x))).sum()

    x = start
    for _ in range(2):
        x = x + STEP * jnp.sign(jax.grad(divergence)(x))
        x = x.clip(images - EPSILON, images + EPSILON).clip(0, 1)
    return x


def updates(count: int):
    """Yield state and metrics of updates of the train step itself."""
    p = phase(**RECIPE)
    _, tx = optim.of_phase(p, "train", decay_mask="not-bias", steps_per_epoch=1)
    objective = objectives.named(p.objective).make(p, None)

    def gradients(*given):
        how = {"net": network(), "attack": attack, "objective": objective, "attack_train": False}
        grads, stats, metrics = step.gradients(*given, **how)
        return grads, (stats, metrics)

    train_step = jax.jit(
        partial(
            step.train_step,
            augment=lambda key, batch: batch,
            gradients=gradients,
            tx=tx,
            average=averages.averaging(p, "train", steps_per_epoch=1),
            statistics=averages.running_statistics(p, "train"),
            given=lambda keys, start: start,
        )
    )
    params = {k: ours(a) for k, a in weights().items()}
    stats = {k: params.pop(k) for k in list(params) if "running" in k}
    state = step.TrainState(
        jnp.int32(0), params, stats, params | stats, tx.init(params), jax.random.key(0)
    )
    for i in range(count):
        images, labels, start = map(jnp.asarray, update_data(i))
        control = step.Control(jnp.zeros(1, jnp.int32), jnp.float64(1), start)
        state, metrics = train_step(state, Batch(images, labels.astype(jnp.int32)), control)
        yield state, metrics


def beside_pytorch(test, count: int) -> None:
    """As Wu et al. write it: a copy of the weights ascends, then those at the sum descend."""
    torch = parity.torch_or_skip(test)
    from torch.nn import functional as f

    arrays = {k: torch.tensor(a) for k, a in weights().items()}
    learned = {k: a.requires_grad_() for k, a in arrays.items() if "running" not in k}
    sgd = torch.optim.SGD(learned.values(), lr=0.1, momentum=0.9, weight_decay=2e-4)

    def forward(own, x, train, momentum=0.1):
        state = [arrays["bn.running_mean"], arrays["bn.running_var"]]
        state = state if momentum else [a.clone() for a in state]
        x = f.conv2d(x, own["conv1.weight"], padding=1)
        affine = own["bn.weight"], own["bn.bias"]
        x = f.batch_norm(x, *state, *affine, training=train, momentum=momentum)
        x = f.silu(f.conv2d(f.silu(x), own["conv2.weight"], stride=2, padding=1)).mean((2, 3))
        return f.linear(x, own["fc.weight"], own["fc.bias"])

    def trades(own, x, adversarial, y, momentum):
        clean, robust = (forward(own, z, True, momentum) for z in (x, adversarial))
        divergence = f.kl_div(robust.log_softmax(1), clean.softmax(1), reduction="batchmean")
        return f.cross_entropy(clean, y) + BETA * divergence

    final: dict = {}
    for i, (state, metrics) in enumerate(updates(count)):
        images, labels, start = update_data(i)
        x, point = (torch.tensor(a.transpose(0, 3, 1, 2).copy()) for a in (images, start))
        y = torch.tensor(labels).long()
        aim = forward(learned, x, False).softmax(1).detach()
        for _ in range(2):
            point = point.detach().requires_grad_()
            value = f.kl_div(forward(learned, point, False).log_softmax(1), aim, reduction="sum")
            (slope,) = torch.autograd.grad(value, point)
            point = (point.detach() + STEP * slope.sign()).clamp(x - EPSILON, x + EPSILON)
            point = point.clamp(0, 1)
        point = point.detach()
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
        expected = ours(arrays[key].detach().numpy())
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
        with mock.patch.object(build, "partial", wraps=partial) as made:
            build.phase(config, "train", 64)
        (call,) = [call for call in made.call_args_list if call.args[0] is step.gradients]
        self.assertIs(call.kwargs["mean"].func, lax.pmean)
        self.assertIsNotNone(call.kwargs["objective"].displaced)

    def test_what_a_phase_refuses(self):
        for changes, message in (
            ({"model__dtype": "bfloat16"}, "moves weights by less than bfloat16 tells apart; set"),
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
        params = {k: ours(a).astype(jnp.float32) for k, a in weights().items()}
        stats = {k: params.pop(k) for k in list(params) if "running" in k}
        images, labels, start = (jnp.asarray(a) for a in update_data(0))
        batch = Batch(images.astype(jnp.float32), labels.astype(jnp.int32))
        found = []
        for count in (1, 8):
            mesh = sharding.make_mesh(jax.devices()[:count])
            spread = sharding.spread(mesh, params)
            how = {"net": network(norm=False), "attack": attack, "objective": objective}
            gradients = partial(step.gradients, attack_train=False, mean=spread.mean, **how)
            of_device = partial(
                step.of_device,
                gradients=gradients,
                dtype=jnp.dtype("float32"),
                spread=spread,
                microbatches=1,
            )
            run = jax.jit(spread.each(of_device, whole=1, split=3, gradients=True))
            keys = jax.random.split(jax.random.key(0), 8)
            found.append(run(params, stats, batch, start.astype(jnp.float32), keys)[0])
        for key in ("conv1.weight", "conv2.weight", "fc.weight"):
            one, eight = (np.asarray(grads[key]) for grads in found)
            np.testing.assert_allclose(eight, one, rtol=1e-4, atol=1e-6, err_msg=key)


if __name__ == "__main__":
    absltest.main()
