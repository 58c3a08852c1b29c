"""TRADES, SAT, MART and the advanced recipe, update after update, as their authors make them."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from jaxrobust import attacks
from jaxrobust.config import phase
from jaxrobust.training.update import memory, mixing, objectives, optim, step
from jaxrobust.types import Batch
from tests.support import paths
from tests.support import residual_nets as nets
from tests.support.golden import load
from tests.support.parity import torch_or_skip
from tests.support.small_updates import step_of
from tests.support.steps import standard

EPSILON, STEP = 8 / 255, 2 / 255
SHARED = paths.SHARED / "golden/cifar/cifar_updates.npz"


def gauss(std):
    """Noise on the images of update i, before it is in any box."""

    def start(i, images):
        noise = np.random.RandomState(5000 + i).standard_normal((8, 3, 32, 32))
        return images + std * noise.transpose(0, 2, 3, 1)

    return start


def uniform_boxed(i, images):
    noise = np.random.RandomState(6000 + i).uniform(-EPSILON, EPSILON, (8, 3, 32, 32))
    return (images + noise.transpose(0, 2, 3, 1)).clip(0, 1)


class Recipe(NamedTuple):
    """A run of the golden set: what is ours in it."""

    objective: objectives.Objective
    attack_loss: str
    start: Any  # (update, images) -> points
    changes: dict[str, Any] = {}  # of the phase  # noqa: RUF012
    steps_per_epoch: int = 1
    attack_train: bool = False
    smoothing: float = 0.0


# An update is an epoch here, as the schedule of the reference was made.
BASELINE = dict(
    optimizer="sgd", weight_decay=2e-4, lr=0.1, final_lr=0.0, warmup_epochs=0, epochs=20,
    schedule="step", lr_steps=(12, 16), decay_mask="all", clip_norm=5.0,
)  # fmt: skip
ADVANCED = dict(
    optimizer="sgd", nesterov=True, cycle_momentum=True, weight_decay=5e-4, schedule="one-cycle",
    lr=0.4, warmup_lr=0.016, final_lr=1.6e-6, warmup_epochs=2, epochs=10,
    decay_mask="not-bn-named", objective="trades", bn_statistics="adversarial",
    bn_momentum=(1.0, 0.01), ema_decay=0.995, ema_warmup_epochs=1, ema_statistics="copied",
)  # fmt: skip
TRADES = Recipe(objectives.trades(6.0), "kl", gauss(0.001), BASELINE)
AAT = Recipe(
    objectives.trades(6.0, "adversarial"), "kl", uniform_boxed, ADVANCED,
    steps_per_epoch=2, attack_train=True, smoothing=0.1,
)  # fmt: skip
MART = Recipe(objectives.mart(6.0), "ce", gauss(STEP), BASELINE)
RECIPES = {
    "trades_wrn": TRADES,
    "trades_wrn_clip0.5": TRADES._replace(changes=BASELINE | {"clip_norm": 0.5}),
    "trades_robust": TRADES,
    "sat_wrn": Recipe(objectives.adversarial(), "ce", gauss(STEP), BASELINE),
    "aat_wrn": AAT,
    "aat_robust_silu": AAT,
}
SOON = "trades_wrn_clip0.5", "aat_wrn"
NETS = {
    "wrn": partial(nets.network, nets.basic),
    "robust": partial(nets.network, nets.robust),
    "silu": partial(nets.network, nets.robust, jax.nn.silu),
}


def image_rows(i):
    return np.arange(8 * i, 8 * i + 8) % 128


def updates(recipe: Recipe, made, shapes):
    """Yield update for update the state and its metrics, of the train step itself."""
    net = made(momentum=1.0) if recipe.changes.get("bn_momentum") else made()
    data = load(paths.GOLDEN / "attacks/aa_flags.npz")
    length = recipe.steps_per_epoch
    p = phase(**recipe.changes)
    _, tx = optim.of_phase(p, "train", decay_mask="not-bias", steps_per_epoch=length)
    machine = attacks.pgd_machine(
        norm="linf", epsilon=EPSILON, steps=10, step_size=STEP, loss=recipe.attack_loss
    )

    def attack(logits_fn, keys, images, targets, epsilon_share):
        state = machine.init(images, targets)._replace(points=epsilon_share)  # not projected
        state = attacks.run(machine, logits_fn, state, gradient_steps=10, final_forward=False)
        return machine.result(state)

    parts = step.GradientParts(net, attack, recipe.objective, recipe.attack_train)
    train_step = step_of(p, memory.remembering(tx), parts, steps_per_epoch=length)
    params, stats = nets.first_weights(shapes)
    state = step.TrainState(
        jnp.int32(0), params, stats, params | stats, tx.init(params), jax.random.key(0)
    )
    for i in range(20):
        images = data["images"][image_rows(i)] / 255.0
        labels = jnp.asarray(data["labels"][image_rows(i)])
        start = jnp.asarray(recipe.start(i, images))
        if recipe.smoothing:  # as `mixing.smoothed`, whose numbers are float32
            off = recipe.smoothing / 10
            soft = jnp.where(
                labels[:, None] == jnp.arange(10)[None], 1 - recipe.smoothing + off, off
            )
            np.testing.assert_allclose(soft, mixing.smoothed(labels, 10, 0.1), rtol=1e-7)
            labels = soft
        control = step.Control(jnp.zeros(1, jnp.int32), jnp.float64(1), start)
        state, metrics = train_step(state, Batch(jnp.asarray(images), labels), control)
        yield state, metrics


@pytest.mark.computes
class GoldenUpdatesTest(parameterized.TestCase):
    @parameterized.parameters(*SOON)
    @pytest.mark.slow  # 20 s, most of them for the compilation of six passes in float64
    def test_twenty_updates(self, name):
        self.check(name)

    @parameterized.parameters(*(name for name in RECIPES if name not in SOON))
    @pytest.mark.matrix  # aat_robust_silu compiles for minutes
    def test_twenty_updates_of_the_others(self, name):
        self.check(name)

    def check(self, name):
        golden = load(paths.GOLDEN / "updates/cifar_updates.npz")
        network = name.partition("_clip")[0].rpartition("_")[2]
        if SHARED.exists():
            golden |= load(SHARED)
        elif network != "wrn":
            self.skipTest(paths.NO_SHARED)
        if network == "wrn":
            shapes = [tuple(map(int, text.split(","))) for text in golden["wrn_shapes"]]
            shapes = dict(zip(golden["wrn_names"].tolist(), shapes, strict=True))
        else:
            found = {k.partition("__")[2]: v.shape for k, v in golden.items() if k.startswith(name)}
            shapes = {k: v for k, v in found.items() if "." in k}
        with jax.enable_x64(True), standard():
            for i, (state, metrics) in enumerate(updates(RECIPES[name], NETS[network], shapes)):
                # The reference's own spread: weights moved by 1e-14 move losses by 1e-14.
                for what, found in (
                    ("losses", metrics["loss"]),
                    ("grad_norms", metrics["gradient_norm"]),
                    ("param_norms", _norm(state.params)),
                ):
                    if f"{name}__{what}" in golden:
                        expected = golden[f"{name}__{what}"][i]
                        np.testing.assert_allclose(
                            found, expected, rtol=1e-9, err_msg=f"{what} {i}"
                        )
            final = state.params | state.stats
            arrays = {f"{name}__{key}": value for key, value in final.items()}
            arrays |= {f"{name}_ema__{key}": value for key, value in state.ema.items()}
            compared = arrays.keys() & golden.keys()
            self.assertGreaterEqual(len(compared), 4)
            for key in compared:  # ... and final weights by 3e-13
                expected = nets.ours(golden[key])
                np.testing.assert_allclose(arrays[key], expected, atol=1e-8, err_msg=key)
            if "clip" in name:  # it is active in every update
                self.assertGreater(golden[f"{name}__grad_norms"].min(), 0.5)

    @parameterized.parameters(5.0, 0.5)
    @pytest.mark.slow  # 15 s, as the others
    def test_mart_is_that_of_pytorch(self, largest):
        """Written down in PyTorch's own operators: the golden set's run of it is not there."""
        torch = torch_or_skip(self)
        from torch.nn import functional as f

        golden = load(paths.GOLDEN / "updates/cifar_updates.npz")
        data = load(paths.GOLDEN / "attacks/aa_flags.npz")
        shapes = [tuple(map(int, text.split(","))) for text in golden["wrn_shapes"]]
        shapes = dict(zip(golden["wrn_names"].tolist(), shapes, strict=True))
        arrays = {k: torch.tensor(nets.seeded(k, shape)) for k, shape in shapes.items()}
        learned = [a.requires_grad_() for k, a in arrays.items() if "running" not in k]
        sgd = torch.optim.SGD(learned, lr=0.1, momentum=0.9, weight_decay=2e-4)
        recipe = MART._replace(changes=BASELINE | {"clip_norm": largest})
        with jax.enable_x64(True), standard():
            final = {}
            for i, (state, metrics) in enumerate(updates(recipe, NETS["wrn"], shapes)):
                final = state.params | state.stats
                images = data["images"][image_rows(i)] / 255.0
                x = torch.tensor(images.transpose(0, 3, 1, 2))
                y = torch.tensor(data["labels"][image_rows(i)]).long()
                point = torch.tensor(recipe.start(i, images).transpose(0, 3, 1, 2).copy())
                for _ in range(10):
                    point = point.detach().requires_grad_()
                    value = f.cross_entropy(nets.torch_apply(arrays, point, False), y)
                    (slope,) = torch.autograd.grad(value, point)
                    point = (point.detach() + STEP * slope.sign()).clamp(x - EPSILON, x + EPSILON)
                    point = point.clamp(0, 1)
                clean, robust = (nets.torch_apply(arrays, z, True) for z in (x, point.detach()))
                p, q = clean.softmax(1), robust.softmax(1)
                rival = q.detach().scatter(1, y[:, None], -1.0).argmax(1)
                loss = f.cross_entropy(robust, y) + f.nll_loss((1.0001 - q + 1e-12).log(), rival)
                divergence = f.kl_div((q + 1e-12).log(), p, reduction="none").sum(1)
                unsure = 1.0000001 - p.gather(1, y[:, None])[:, 0]
                loss = loss + 6.0 * (divergence * unsure).mean()
                for group in sgd.param_groups:
                    group["lr"] = 0.1 * 0.1 ** ((i >= 12) + (i >= 16))
                sgd.zero_grad()
                loss.backward()
                norm = torch.nn.utils.clip_grad_norm_(learned, largest)
                sgd.step()
                np.testing.assert_allclose(metrics["loss"], loss.item(), rtol=1e-9)
                np.testing.assert_allclose(metrics["gradient_norm"], norm.item(), rtol=1e-9)
            if largest < 1:
                self.assertGreater(norm.item(), largest)
            for key, array in final.items():
                expected = nets.ours(arrays[key].detach().numpy())
                np.testing.assert_allclose(array, expected, atol=1e-8, err_msg=key)


def _norm(arrays):
    return jnp.sqrt(sum((a * a).sum() for a in arrays.values()))
