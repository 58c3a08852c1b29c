"""TRADES and SAT update after update, as the losses of residual networks' authors make them."""

import zlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from jax import lax

from jaxrobust import attacks
from jaxrobust.config import phase
from jaxrobust.models import batch_norms, layers
from jaxrobust.training import objectives, optim
from jaxrobust.types import Batch, Classifier
from tests.support import paths
from tests.support.golden import load
from tests.support.steps import standard


def _conv(x, kernel, stride=1):
    padding = [(kernel.shape[0] // 2,) * 2] * 2
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def wide_resnet() -> Classifier:
    """Three blocks before activation of widths 8, 16, 32, with the golden arrays' names."""

    def apply(params, stats, images, *, train=False, key=None):
        moved = dict(stats)

        def norm(name, x):
            running = [f"{name}.running_mean", f"{name}.running_var"]
            affine = params[f"{name}.weight"], params[f"{name}.bias"]
            if not train:
                return batch_norms.batch_norm(x, *affine, *(stats[key] for key in running))
            out, *new = batch_norms.batch_norm_train(x, *affine)
            for key, value in zip(running, new, strict=True):
                moved[key] = 0.9 * stats[key] + 0.1 * value
            return out

        x = _conv(images, params["stem_conv.weight"])
        for i, stride in enumerate((1, 2, 2)):
            block = f"blocks.{i}.layer.0"
            active = jax.nn.relu(norm(f"{block}.bn1", x))
            y = _conv(active, params[f"{block}.conv1.weight"], stride)
            y = _conv(jax.nn.relu(norm(f"{block}.bn2", y)), params[f"{block}.conv2.weight"])
            x = y + _conv(active, params[f"{block}.shortcut.0.weight"], stride)
        x = jax.nn.relu(norm("norm1", x)).mean((1, 2))
        return layers.linear(x, params["fc.weight"], params["fc.bias"]), moved

    return Classifier(lambda key: ({}, {}), apply)


def seeded(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The golden set's first weights: a draw that belongs to the array's name."""
    draw = np.random.RandomState(zlib.crc32(name.encode()) & 0x7FFFFFFF)
    r = draw.standard_normal(int(np.prod(shape))).reshape(shape)
    if name.endswith("running_var"):
        r = 1 + 0.1 * np.abs(r)
    elif len(shape) > 1:
        r = r / np.sqrt(r[0].size)
    elif name.endswith(".weight"):
        r = 1 + 0.1 * r
    else:
        r = 0.1 * r
    r = r.astype(np.float32).astype(np.float64)
    return 0.25 * r if name == "fc.weight" else r


def ours(array: np.ndarray) -> jax.Array:
    """A reference's array in our layout."""
    axes = {4: (2, 3, 1, 0), 2: (1, 0)}.get(array.ndim)
    return jnp.asarray(array.transpose(axes) if axes else array)


def first_weights(golden):
    """The network's parameters and running statistics before the first update."""
    shapes = [tuple(map(int, text.split(","))) for text in golden["wrn_shapes"]]
    rows = zip(golden["wrn_names"].tolist(), shapes, strict=True)
    arrays = {name: ours(seeded(name, shape)) for name, shape in rows}
    stats = {name: arrays.pop(name) for name in list(arrays) if "running" in name}
    return arrays, stats


# our objective, the attack's loss, and what the start's standard normal noise is multiplied by
OBJECTIVES = {
    "trades_wrn": (objectives.trades(6.0), "kl", 0.001),
    "sat_wrn": (objectives.adversarial(), "ce", 2 / 255),
}


@pytest.mark.computes
class GoldenUpdatesTest(parameterized.TestCase):
    @parameterized.parameters(*OBJECTIVES)
    @pytest.mark.slow  # 10 s, most of them for the compilation of six passes in float64
    def test_twenty_updates(self, name):
        golden = load(paths.GOLDEN / "updates/cifar_updates.npz")
        data = load(paths.GOLDEN / "attacks/aa_flags.npz")
        objective, loss_name, noise_std = OBJECTIVES[name]
        with jax.enable_x64(True), standard():
            params, stats = first_weights(golden)
            net = wide_resnet()
            machine = attacks.pgd_machine(
                norm="linf", epsilon=8 / 255, steps=10, step_size=2 / 255, loss=loss_name
            )
            # An update is an epoch here, as the schedule of the reference was made.
            p = phase(
                optimizer="sgd", weight_decay=2e-4, lr=0.1, final_lr=0.0, warmup_epochs=0,
                epochs=20, schedule="step", lr_steps=(12, 16), decay_mask="all",
            )  # fmt: skip
            _, tx = optim.of_phase(p, "train", decay_mask="not-bias", steps_per_epoch=1)

            @jax.jit
            def update(params, stats, opt_state, batch, start):
                def frozen(x):
                    return net.apply(params, stats, x)[0]

                targets = objective.attack_targets(frozen, batch)
                state = machine.init(batch.images, targets)._replace(points=start)  # not projected
                state = attacks.run(machine, frozen, state, gradient_steps=10, final_forward=False)
                images_adv = machine.result(state)
                loss = partial(
                    objective.loss, net, stats=stats, batch=batch, images_adv=images_adv, key=None
                )
                (value, (stats, _)), grads = jax.value_and_grad(loss, has_aux=True)(params)
                updates, opt_state = tx.update(grads, opt_state, params)
                params = {k: params[k] + updates[k] for k in params}
                return value, _norm(grads), params, stats, opt_state

            opt_state = tx.init(params)
            for i in range(20):
                rows = np.arange(8 * i, 8 * i + 8) % 128
                noise = np.random.RandomState(5000 + i).standard_normal((8, 3, 32, 32))
                x = data["images"][rows] / 255.0
                start = jnp.asarray(x + noise_std * noise.transpose(0, 2, 3, 1))
                batch = Batch(jnp.asarray(x), jnp.asarray(data["labels"][rows]))
                value, norm, params, stats, opt_state = update(
                    params, stats, opt_state, batch, start
                )
                # The reference's own spread: weights moved by 1e-14 move losses by 1e-14.
                for what, found in (
                    ("losses", value),
                    ("grad_norms", norm),
                    ("param_norms", _norm(params)),
                ):
                    expected = golden[f"{name}__{what}"][i]
                    np.testing.assert_allclose(found, expected, rtol=1e-9, err_msg=f"{what} {i}")
            for key, array in (params | stats).items():
                if f"{name}__{key}" in golden:  # ... and final weights by 3e-13
                    expected = ours(golden[f"{name}__{key}"])
                    np.testing.assert_allclose(array, expected, atol=1e-8, err_msg=key)


def _norm(arrays):
    return jnp.sqrt(sum((a * a).sum() for a in arrays.values()))


if __name__ == "__main__":
    absltest.main()
