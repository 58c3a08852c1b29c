"""The package's own networks and configs, update after update, next to PyTorch in float64.

All of it goes the way of a run: the config, `build.phase`, the compiled step. What differs from the
config is written here: a small network, a few images, and as many epochs as show each change of the
learning rate.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from configs import cifar_aat, cifar_bat
from jaxrobust.attacks import image_keys
from jaxrobust.training import build
from jaxrobust.training.update.step import TrainState
from jaxrobust.types import Batch
from jaxrobust.weights.naming import convert
from tests.support.parity import torch_or_skip
from tests.support.steps import standard

BATCH, SIDE = 4, 8
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)
BASIC = {"depths": (1, 1), "planes": (8, 16)}
ROBUST = {"depths": (2, 1), "planes": (32, 64), "se_reduction": 16, "activation": "silu"}


class Case(NamedTuple):
    """A config, and what PyTorch is told of it."""

    argument: str  # of the config
    recipe: str
    options: dict[str, Any]
    std: float  # of the noise that the attack starts from; 0: uniform in the ball, and boxed


SAT = Case("wrn_28_10,objective=adversarial", "sat", BASIC, 2 / 255)
TRADES = Case("wrn_28_10,objective=trades", "trades", BASIC, 0.001)
MART = Case("wrn_28_10,objective=mart", "mart", BASIC, 2 / 255)
AAT = Case("wrn_a1", "aat", BASIC | {"activation": "silu"}, 0.0)
ROBUST_TRADES = TRADES._replace(argument="robustresnet_a1,objective=trades", options=ROBUST)
EPOCHS = {True: 5, False: 10}  # of the advanced recipe two updates each, of the others one


def config_of(case: Case):
    """The case's config, with what is written here."""
    advanced = case.recipe == "aat"
    config = (cifar_aat if advanced else cifar_bat).get_config(case.argument).unlock()
    config.model.update(image_size=SIDE, dtype="float64")
    config.model.options.update(case.options)
    config.train.update(batch_size=BATCH, epochs=EPOCHS[advanced])
    if advanced:
        config.train.update(warmup_epochs=2, ema_warmup_epochs=1)
    else:
        config.train.lr_steps = (5, 8)
    return config.lock()


def images_of(update: int):
    draw = np.random.default_rng(update)
    return draw.random((BATCH, SIDE, SIDE, 3)), draw.integers(0, 10, BATCH)


def start_of(state, images, std):
    """Where the attack of an update begins: the step's keys, and noise as the papers have it."""
    key, *_ = jax.random.split(jax.random.fold_in(state.key, state.step), 3)
    keys, shape = image_keys(key, BATCH), images.shape[1:]
    if std:
        draw = jax.vmap(lambda k: jax.random.normal(k, shape, jnp.float64))
        return np.asarray(images + std * draw(keys))
    draw = jax.vmap(lambda k: jax.random.uniform(k, shape, jnp.float64))
    return np.clip(images + 8 / 255 * (2 * np.asarray(draw(keys)) - 1), 0, 1)


def first_weights(module):
    """Weights of which each matters, the same in both; ours are what `from_torch` makes of them."""
    import torch

    generator = torch.Generator().manual_seed(0)
    for key, value in module.state_dict().items():
        if not value.is_floating_point():
            continue
        noise = torch.randn(value.shape, generator=generator, dtype=torch.float64)
        if value.ndim > 1:
            value.copy_(noise * (2 / value[0].numel()) ** 0.5)
        elif key.endswith("running_var"):
            value.copy_(0.5 + noise.abs())
        else:
            value.copy_(float(key.endswith("weight")) + 0.1 * noise)


def theirs_of(case: Case):
    """Their network, and their recipe."""
    from tests.support import torch_modules, torch_updates

    name = case.argument.partition(",")[0]
    module = torch_modules.network(name, img_size=SIDE, **case.options).double()
    first_weights(module)
    advanced = case.recipe == "aat"
    net = torch_updates.Net(module, MEAN if advanced else (0, 0, 0), STD if advanced else (1, 1, 1))
    if not advanced:
        rates = [0.1] * 5 + [0.01] * 3 + [0.001] * 2
        return net, torch_updates.Recipe(case.recipe, rates.__getitem__)
    rates, momenta = torch_updates.one_cycle(0.4, EPOCHS[True], 2)
    return net, torch_updates.Recipe(
        "trades", rates.__getitem__, momenta.__getitem__, advanced=True, smoothing=0.1,
        weight_decay=5e-4, clip=None, tau=0.995, warmup=2, length=2,
    )  # fmt: skip


def state_of(case: Case, phase, module):
    """The first state of a run from their weights, in float64."""
    from jaxrobust.publish.torch_networks import state_arrays

    name = case.argument.partition(",")[0]
    sizes = {"num_classes": 10, "image_size": SIDE}
    params, stats = convert.from_torch(name, state_arrays(module), **sizes, **case.options)
    if case.recipe == "aat":
        stats |= {"normalize.mean": np.float64(MEAN), "normalize.std": np.float64(STD)}

    def zeros(leaf):
        return np.zeros(leaf.shape, np.float64 if leaf.dtype == np.float32 else leaf.dtype)

    average = {key: (params | stats)[key].copy() for key in phase.abstract_state.ema}
    momentum = jax.tree.map(zeros, phase.abstract_state.opt_state)
    return TrainState(np.int32(0), params, stats, average, momentum, jax.random.key(3))


class OwnUpdatesTest(parameterized.TestCase):
    def test_three_updates(self):
        self.check(SAT._replace(options={"depths": (1,), "planes": (8,)}), 3)

    @parameterized.named_parameters(
        ("_sat", SAT), ("_trades", TRADES), ("_mart", MART), ("_aat", AAT)
    )
    @pytest.mark.slow  # 15 to 45 s, most of them for the compilation of up to six passes
    def test_ten_updates(self, case):
        self.check(case, 10)

    @pytest.mark.matrix  # compiles for minutes
    def test_ten_updates_of_robust_blocks(self):
        self.check(ROBUST_TRADES, 10)

    def check(self, case: Case, count: int):
        torch_or_skip(self)
        from tests.support import torch_updates

        net, recipe = theirs_of(case)
        config = config_of(case)
        length = 2 if case.recipe == "aat" else 1
        with jax.enable_x64(True), standard():
            phase = build.phase(config, "train", BATCH * length, devices=jax.devices()[:1])
            with jax.set_mesh(phase.mesh):
                state = state_of(case, phase, net.module)
                rows, told = [], build.control(phase.mesh)
                for i in range(count):
                    images, labels = images_of(i)
                    start = start_of(state, images, case.std)
                    batch = Batch(jnp.asarray(images), jnp.asarray(labels, jnp.int32))
                    state, metrics = phase.step(state, batch, told)
                    rows.append(((images, labels, start), jax.device_get((state, metrics))))
        self.assertEqual({p.dtype for p in rows[-1][1][0].params.values()}, {np.dtype("float64")})
        given = (row[0] for row in rows)
        for i, update in enumerate(torch_updates.updates(net, recipe, given)):
            state, metrics = rows[i][1]
            # Two orders of the same sums in float64, 1e-16 each, that 100 passes pass on.
            close = {"rtol": 1e-9, "err_msg": f"update {i}"}
            np.testing.assert_allclose(metrics["loss"], update.loss, **close)
            np.testing.assert_allclose(metrics["gradient_norm"], update.norm, **close)
            for ours, theirs in (
                (state.params | state.stats, net.module.state_dict()),
                (state.ema, update.average),
            ):
                self.same(case, ours, theirs, f"update {i}")

    def same(self, case: Case, ours, theirs, what: str):
        name, sizes = case.argument.partition(",")[0], {"num_classes": 10, "image_size": SIDE}
        arrays = {key: value.detach().numpy() for key, value in theirs.items()}
        params, stats = convert.from_torch(name, arrays, **sizes, **case.options)
        expected = {k: v for k, v in (params | stats).items() if not k.startswith("normalize.")}
        self.assertEqual(expected.keys(), {k for k in ours if not k.startswith("normalize.")})
        for key, value in expected.items():
            np.testing.assert_allclose(
                ours[key], value, rtol=1e-9, atol=1e-9, err_msg=f"{what} {key}"
            )
