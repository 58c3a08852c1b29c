"""TRADES update after update, as its authors' loss for residual networks makes them."""

import zlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from jax import lax

from jaxrobust import attacks
from jaxrobust.models import batch_norms, layers
from jaxrobust.runtime import sharding
from jaxrobust.training import objectives, step
from jaxrobust.types import Batch, Classifier
from tests.support import paths


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


@pytest.mark.slow  # 10 s, most of them for the compilation of six passes in float64
@pytest.mark.computes
class GoldenUpdatesTest(absltest.TestCase):
    def test_twenty_updates(self):
        golden, data = paths.SHARED / "golden/cifar/cifar_updates.npz", paths.SHARED / "golden"
        if not golden.exists():
            self.skipTest(paths.NO_SHARED)
        prefix = "trades_wrn__"
        with np.load(golden) as file:
            golden = {k[len(prefix) :]: file[k] for k in file.files if k.startswith(prefix)}
        with np.load(data / "data.npz") as file:
            images, labels = file["images_u8"], file["labels"].astype(np.int64)
        losses = golden.pop("losses")
        norms = [golden.pop("grad_norms"), golden.pop("param_norms")]
        with jax.enable_x64(True):
            first = {name: ours(seeded(name, a.shape)) for name, a in golden.items()}
            stats = {name: first.pop(name) for name in golden if "running" in name}
            params, momentum = first, jax.tree.map(jnp.zeros_like, first)
            net, objective = wide_resnet(), objectives.trades(6.0)
            machine = attacks.pgd_machine(
                norm="linf", epsilon=8 / 255, steps=10, step_size=2 / 255, loss="kl"
            )

            @jax.jit
            def update(params, stats, momentum, batch, start, lr):
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
                norm = jnp.sqrt(sum((g * g).sum() for g in grads.values()))
                momentum = {k: 0.9 * momentum[k] + g + 2e-4 * params[k] for k, g in grads.items()}
                params = {k: p - lr * momentum[k] for k, p in params.items()}
                return value, norm, params, stats, momentum

            for i, lr in enumerate([0.1] * 12 + [0.01] * 4 + [0.001] * 4):
                rows = np.arange(8 * i, 8 * i + 8) % 128
                noise = np.random.RandomState(5000 + i).standard_normal((8, 3, 32, 32))
                x = images[rows] / 255.0
                start = jnp.asarray(x + 0.001 * noise.transpose(0, 2, 3, 1))
                batch = Batch(jnp.asarray(x), jnp.asarray(labels[rows]))
                value, norm, params, stats, momentum = update(
                    params, stats, momentum, batch, start, lr
                )
                # The reference's own spread: weights moved by 1e-14 move losses by 1e-14.
                np.testing.assert_allclose(value, losses[i], rtol=1e-9, err_msg=f"update {i}")
                np.testing.assert_allclose(norm, norms[0][i], rtol=1e-9, err_msg=f"update {i}")
            for name, array in (params | stats).items():
                # ... and final weights by 3e-13.
                np.testing.assert_allclose(array, ours(golden[name]), atol=1e-8, err_msg=name)


def noisy() -> Classifier:
    """Logits are the pixels, of one line, plus what an image's key draws when it trains."""

    def apply(params, stats, images, *, train=False, key=None):
        logits = images[:, 0, 0] * params["scale"]
        return logits + (drawn(key) if train else 0), stats

    return Classifier(lambda key: ({"scale": jnp.ones(())}, {}), apply)


@jax.jit
def drawn(keys):
    return jax.vmap(lambda key: jax.random.normal(key, (5,)))(keys)


def divergence(p_logits, q_logits) -> float:
    p, q = (np.asarray(jax.nn.log_softmax(x), np.float64) for x in (p_logits, q_logits))
    return (np.exp(p) * (p - q)).sum(-1).mean()


class PassesTest(parameterized.TestCase):
    """What TRADES shows the network, and with which draws."""

    def setUp(self):
        super().setUp()
        rng = np.random.default_rng(0)
        images = jnp.asarray(rng.random((6, 1, 1, 5), dtype=np.float32))
        self.batch = Batch(images, jnp.asarray(rng.integers(0, 5, 6), jnp.int32))
        self.keys = attacks.image_keys(jax.random.key(3), 6)

    @parameterized.parameters(0, 3, 6)
    def test_batch_norms_normalise_apart_and_move_twice(self, group):
        shape = (6, 2, 2, 3)
        images, images_adv = np.random.default_rng(1).random((2, *shape), np.float32)
        images_adv = 0.5 * images_adv
        running = {"mean": jnp.full(3, 0.2), "var": jnp.full(3, 0.7)}

        def apply(params, stats, x, *, train=False, key=None):
            x, mean, var = batch_norms.batch_norm_train(x, jnp.ones(3), jnp.zeros(3), group=group)
            new = {"mean": mean, "var": var}
            moved = {name: 0.9 * stats[name] + 0.1 * new[name] for name in stats}
            return (x * x * x).mean((1, 2)), moved

        batch = Batch(jnp.asarray(images), self.batch.labels % 3)
        net = Classifier(lambda key: ({}, {}), apply)
        _, (stats, metrics) = objectives.trades(6.0).loss(
            net, {}, running, batch, jnp.asarray(images_adv), None
        )

        def by_hand(x):
            parts = x.astype(np.float64).reshape(-1, group or 6, *shape[1:])
            mean, var = parts.mean((1, 2, 3), keepdims=True), parts.var((1, 2, 3), keepdims=True)
            normal = ((parts - mean) / np.sqrt(var + 1e-5)).reshape(shape)
            count = parts[0].size // 3
            unbiased = var.mean(0).reshape(3) * count / (count - 1)
            return (normal**3).mean((1, 2)), mean.mean(0).reshape(3), unbiased

        (clean, *first), (robust, *second) = map(by_hand, (images, images_adv))
        # float32 sums of a few cubes.
        np.testing.assert_allclose(metrics["kl"], divergence(clean, robust), rtol=1e-4)
        for name, one, two in zip(("mean", "var"), first, second, strict=True):
            expected = 0.81 * np.asarray(running[name]) + 0.09 * one + 0.1 * two
            np.testing.assert_allclose(stats[name], expected, rtol=1e-5, err_msg=name)

    def test_noise_outside_of_the_pixels_is_no_divergence(self):
        """Random erasing leaves [0, 1]; the attack's points do not."""
        batch = self.batch._replace(images=4 * self.batch.images - 2)
        inside = batch.images.clip(0, 1)
        self.assertGreater(float(jnp.abs(inside - batch.images).max()), 0.5)
        objective = objectives.trades(6.0)
        params, _ = noisy().init(jax.random.key(0))
        plain = noisy()._replace(
            apply=lambda params, stats, x, train, key: noisy().apply(params, stats, x)
        )
        _, (_, metrics) = objective.loss(plain, params, {}, batch, inside, None)
        self.assertEqual(metrics["kl"], 0)
        targets = objective.attack_targets(lambda x: x[:, 0, 0], batch)
        np.testing.assert_allclose(targets, jax.nn.softmax(inside[:, 0, 0]), rtol=1e-6)

    def test_an_image_draws_twice_as_the_attack_sees(self):
        objective, net = objectives.trades(6.0), noisy()
        one, two = objective.draws(self.keys)
        first, second = drawn(one), drawn(two)
        self.assertGreater(float(jnp.abs(first - second).min(1).max()), 0.01)
        again, _ = objective.draws(self.keys[3:])  # of an image, whatever its batch
        np.testing.assert_array_equal(drawn(again), first[3:])

        def attack(logits_fn, keys, images, targets):
            return (logits_fn(jnp.zeros_like(images)) + targets)[:, None, None]

        mesh = sharding.make_mesh(jax.devices()[:1])
        params, stats = net.init(jax.random.key(0))
        spread = sharding.spread(mesh, params)
        gradients = partial(
            step.gradients,
            net=net,
            attack=attack,
            objective=objective,
            attack_train=True,
        )
        given = {"gradients": gradients, "dtype": jnp.dtype("float32"), "microbatches": 2}
        of_device = partial(step.of_device, spread=spread, **given)
        of_all = jax.jit(spread.each(of_device, whole=1, split=3, gradients=True))
        _, (_, metrics) = of_all(params, stats, self.batch, self.keys, self.keys)
        clean = self.batch.images[:, 0, 0] + first
        robust = 2 * second + jax.nn.softmax(clean)
        np.testing.assert_allclose(metrics["kl"], divergence(clean, robust), rtol=1e-5)


if __name__ == "__main__":
    absltest.main()
