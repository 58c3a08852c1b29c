"""What every architecture of equal blocks must do; shown on small networks, mostly in float64."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxrobust import models
from tests.support.parity import relative


def small(name: str, *, image_size: int, batch: int = 2, dtype="float64", **overrides):
    """(apply, params, stats, images) of a network with weights of which each one matters."""
    net = models.create(name, num_classes=5, image_size=image_size, dtype=dtype, **overrides)
    params, stats = jax.eval_shape(net.init, jax.random.key(0))
    random = np.random.default_rng(0)
    wide = np.float32 if dtype == "bfloat16" else dtype
    params = {
        k: jnp.asarray(random.normal(k.endswith(("scale", "gamma")), 0.3, p.shape), wide)
        for k, p in params.items()
    }
    stats = {k: jnp.full(s.shape, k.endswith("std"), wide) for k, s in stats.items()}
    images = jnp.asarray(random.random((1, image_size, image_size, 3)), wide)
    return net.apply, params, stats, jnp.concatenate([images] * batch)


def check_remat_and_scan(test, name: str, **tiny) -> None:
    """Recomputing blocks, or compiling one for all, changes neither value nor gradient."""

    def run(**how):
        apply, params, stats, images = small(name, drop_path=0.3, **tiny, **how)

        def total(params, images):
            key = jax.random.key(3)
            logits = apply(params, stats, images, train=True, key=key)[0]
            return (logits * jnp.arange(5.0, dtype=logits.dtype)[None]).sum()

        return jax.device_get(jax.jit(jax.value_and_grad(total, (0, 1)))(params, images))

    with jax.enable_x64(True):
        plain, (plain_params, plain_images) = run()
        for how in ({"scan": True}, {"remat": True}):
            value, (params, images) = run(**how)
            # The same operations, in another order at most.
            test.assertLess(abs(value / plain - 1), 1e-12)
            test.assertLess(relative(images, plain_images), 1e-12)
            for key in params:
                largest = max(np.abs(plain_params[key]).max(), 1e-3)
                test.assertLess(np.abs(params[key] - plain_params[key]).max(), 1e-11 * largest)


def check_drop_path(test, name: str, *, outcomes: int, **tiny) -> None:
    """Each branch of each block draws for itself, for each image; only in training, with a key.

    Copies of one image show it: `outcomes` different logits are 2 ** (branches that can be left
    out), and blocks that shared a key would have fewer.
    """
    with jax.enable_x64(True):
        apply, params, stats, images = small(name, drop_path=0.6, batch=2048, **tiny)
        plain = small(name, **tiny)[0]
        train = jax.jit(lambda key: apply(params, stats, images, train=True, key=key)[0])
        logits = np.asarray(train(jax.random.key(0)))
        test.assertLen(np.unique(logits.round(8), axis=0), outcomes)
        np.testing.assert_array_equal(train(jax.random.key(0)), logits)
        test.assertGreater(np.abs(np.asarray(train(jax.random.key(1))) - logits).max(), 1e-3)
        images = images[:2]
        np.testing.assert_array_equal(
            jax.jit(apply)(params, stats, images)[0], jax.jit(plain)(params, stats, images)[0]
        )
        with test.assertRaisesRegex(ValueError, "call apply with a key"):
            apply(params, stats, images, train=True)


def check_bfloat16(test, name: str, **tiny) -> None:
    """Computes in bfloat16, returns float32, and is near it."""
    outs = []
    for dtype in ("float32", "bfloat16"):
        apply, params, stats, images = small(name, dtype=dtype, **tiny)
        outs.append(jax.jit(apply)(params, stats, images)[0])
        test.assertEqual(outs[-1].dtype, jnp.float32)
    test.assertGreater(relative(outs[1], outs[0]), 0)
    # bfloat16 keeps 8 bits (4e-3 each rounding), through about 12 layers.
    test.assertLess(relative(outs[1], outs[0]), 0.05)
