"""The network of a run with one common fault each, as functions from images to logits.

    PLANTED_IN=runs/quickstart python -m jaxrobust.doctor tools/planted/networks.py:softmax \
        --dataset digits --epsilon 0.1

The environment variable PLANTED_IN names the run.
"""

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxrobust.config import network_of
from jaxrobust.data import Prepared
from jaxrobust.data.stream import pipeline
from jaxrobust.training.run import splits
from jaxrobust.types import Array, Threat
from jaxrobust.weights.naming.compose import NORMALIZATIONS
from jaxrobust.weights.trained import runs

RUN = Path(os.environ["PLANTED_IN"])
IMAGES = 200  # the first of the test split, used by `detector`
CONFIG = runs.run_config(RUN)
NET = network_of(CONFIG)
PARAMS, STATS = runs.run_weights(RUN)[1]


def _known_images() -> np.ndarray:
    source, size = splits.opened(CONFIG, "test_split"), CONFIG.model.image_size
    preprocessing = pipeline.preprocessing_id(source, size, CONFIG.data.preprocessing)
    prepared = Prepared(source, image_size=size, preprocessing=preprocessing, images=len(source))
    return prepared[np.arange(min(IMAGES, len(source)))]


KNOWN = _known_images()


def healthy(x: Array) -> Array:
    return NET.apply(PARAMS, STATS, x)[0]


def _per_channel(name: str) -> tuple[Array, Array]:
    mean, std = (jnp.asarray(v, jnp.float32) for v in NORMALIZATIONS[name])
    if KNOWN.shape[-1] == 1:
        mean, std = mean.mean(keepdims=True), std.mean(keepdims=True)
    return mean[None, None, None], std[None, None, None]


def in_0_to_255(x: Array) -> Array:
    """Divide by 255, although images are in [0, 1]."""
    return healthy(x / 255)


def not_normalised(x: Array) -> Array:
    """Feed images to the network without its ImageNet normalization."""
    mean, std = _per_channel("imagenet")
    return healthy(x * std + mean)


def normalised_twice(x: Array) -> Array:
    """Normalize with CIFAR-10's constants before a network that normalizes itself."""
    mean, std = _per_channel("cifar10")
    return healthy((x - mean) / std)


def train_mode(x: Array) -> Array:
    """Use batch statistics in batch norms or, if there are none, of the images."""
    if any(not name.startswith("normalize.") for name in STATS):
        return NET.apply(PARAMS, STATS, x, train=True, key=jax.random.key(0))[0]
    shape = (1, 1, 1, KNOWN.shape[-1])
    mean, std = (jnp.asarray(f(KNOWN, axis=(0, 1, 2))).reshape(shape) for f in (np.mean, np.std))
    own, spread = (f(x, axis=(0, 1, 2), keepdims=True) for f in (jnp.mean, jnp.std))
    return healthy((x - own) / (spread + 1e-3) * std + mean)


def softmax(x: Array) -> Array:
    return jax.nn.softmax(healthy(x))


def one_class(x: Array) -> Array:
    """Predict one class for nearly all images, like a network whose training collapsed."""
    logits = healthy(x)
    return logits.at[:, 0].add(1e4)


def noise(x: Array) -> Array:
    """Add new noise in each pass, as randomized defenses do."""
    rng = np.random.default_rng()

    def drawn(h: np.ndarray) -> np.ndarray:
        return rng.normal(0, 0.1, h.shape).astype(np.float32)

    shape = jax.ShapeDtypeStruct(x.shape, jnp.float32)
    return healthy(x + jax.pure_callback(drawn, shape, jax.lax.stop_gradient(x)))


def dropout_key(x: Array) -> Array:
    """Drop a tenth of the pixels, chosen by NumPy when the function is traced."""
    seed = int(np.random.default_rng().integers(2**31))
    return healthy(jnp.where(jax.random.uniform(jax.random.key(seed), x.shape) < 0.1, 0, x))


def other_order(x: Array) -> Array:
    """Use other numbers for the classes than the data set."""
    order = np.random.default_rng(3).permutation(CONFIG.model.num_classes)
    return healthy(x)[:, order]


def shifted_order(x: Array) -> Array:
    """Start class numbers at 1, with something else at 0."""
    return jnp.roll(healthy(x), 1, axis=1)


def bgr(x: Array) -> Array:
    return healthy(x[..., ::-1])


def rounded(x: Array) -> Array:
    return healthy(jnp.round(x * 16) / 16)


def saturated(x: Array) -> Array:
    """Scale the logits until the softmax is 0 or 1 in float32."""
    return 1e4 * healthy(x)


def not_a_number(x: Array) -> Array:
    """Overflow on bright images."""
    z = healthy(x)
    return z + 0 * jnp.exp(300 * x.mean(axis=(1, 2, 3)))[:, None]


def common_term(x: Array) -> Array:
    """Add a large number to all logits, where float32 loses the cross-entropy's gradient."""
    return 20 * healthy(x) + 1e4 * (x**2).mean(axis=(1, 2, 3))[:, None]


@jax.custom_jvp
def _reversed(x: Array) -> Array:
    return x


_reversed.defjvp(lambda primals, tangents: (primals[0], -tangents[0]))


def downhill(x: Array) -> Array:
    """Return the gradient of another function."""
    return healthy(_reversed(x))


@jax.custom_jvp
def _detected(x: Array) -> Array:
    return x


@_detected.defjvp
def _(primals, tangents):  # type: ignore[no-untyped-def]
    (x,), (dx,) = primals, tangents
    apart = jax.lax.map(lambda one: jnp.abs(x - one[None]).max(axis=(1, 2, 3)), jnp.asarray(KNOWN))
    far = apart.min(axis=0) > 1.2 * Threat.of(CONFIG.attack).epsilon
    return x, jnp.where(far[:, None, None, None], -dx, dx)


def detector(x: Array) -> Array:
    """Detect inputs further from all images than the radius, and reverse their gradient."""
    return healthy(_detected(x))
