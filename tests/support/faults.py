"""A small network that is healthy, and the same with one of the usual faults each."""

import jax
import jax.numpy as jnp
import numpy as np

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet
PALETTE = np.random.default_rng(7).uniform(0.2, 0.8, (10, 3)).astype(np.float32)
ORDER = np.random.default_rng(3).permutation(10)
FAR = 0.12  # from all colors, where the gradient of `misled_far_off` turns around
RADIUS = 0.05


def colours(count=200, seed=0):
    """Noisy patches in one of ten colors, which are the classes."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 10, count)
    images = PALETTE[labels][:, None, None] + rng.normal(0, 0.1, (count, 4, 4, 3))
    return np.clip(images, 0, 1).astype(np.float32), labels


def normalise(x):
    return (x - jnp.asarray(MEAN)[None, None, None]) / jnp.asarray(STD)[None, None, None]


def inner(x):
    """A network of normalized images: 4 minus the distances to the colors, squared, as logits."""
    h = x.mean(axis=(1, 2))
    centres = normalise(PALETTE[None, None])[0, 0]
    return 4 * (h @ centres.T) - 2 * (centres**2).sum(1)[None]


def healthy(x):
    return inner(normalise(x))


def random(x):
    rng = np.random.default_rng()

    def noise(h):
        return rng.normal(size=h.shape).astype(np.float32)

    z = jax.lax.stop_gradient(healthy(x))
    return healthy(x) + jax.pure_callback(noise, jax.ShapeDtypeStruct(z.shape, z.dtype), z)


def called_back(x):
    """A network of another library, called from the host."""
    centres = (PALETTE - np.float32(MEAN)) / np.float32(STD)

    def on_the_host(images):
        h = (np.asarray(images).mean(axis=(1, 2)) - np.float32(MEAN)) / np.float32(STD)
        return (4 * h @ centres.T - 2 * (centres**2).sum(1)).astype(np.float32)

    return jax.pure_callback(on_the_host, jax.ShapeDtypeStruct((len(x), 10), jnp.float32), x)


def train_mode(x):
    """Batch norm with the statistics of the batch."""
    h = normalise(x)
    h = (h - h.mean((0, 1, 2), keepdims=True)) / (h.std((0, 1, 2), keepdims=True) + 1e-3)
    return inner(0.6 * h)


@jax.custom_jvp
def uphill_is_down(x):
    return x


uphill_is_down.defjvp(lambda primals, tangents: (primals[0], -tangents[0]))


def quantised(x):
    """Eight levels of gray, as a defense rounds them."""
    return healthy(jnp.round(x * 16) / 16)


def saturated(x):
    return 1e4 * healthy(x)


def shifted(x):
    """All logits grow with the brightness: nothing to a margin, but the most of what float32 leaves
    of the gradient of a saturated cross-entropy.
    """
    h = normalise(x).mean(axis=(1, 2))
    distances = (h**2).sum(axis=1, keepdims=True) - healthy(x) / 2
    logits = -12 * jnp.log(distances + 1e-3)
    return logits + 1e4 * (x**2).mean(axis=(1, 2, 3))[:, None]


@jax.custom_jvp
def turning(x):
    return x


@turning.defjvp
def _turned(primals, tangents):
    (x,), (dx,) = primals, tangents
    apart = x.mean(axis=(1, 2))[:, None, :] - jnp.asarray(PALETTE)[None]
    far = jnp.sqrt((apart**2).sum(-1)).min(axis=1) > FAR
    return x, jnp.where(far[:, None, None, None], -dx, dx)


def misled_far_off(x):
    """The gradient is right near the images, and misleads at large radii."""
    return healthy(turning(x))


FAULTS = {
    "determinism": random,
    "train-mode": train_mode,
    "finite-logits": lambda x: healthy(x) + 0 * jnp.log(x.mean(axis=(1, 2))[:, :1] - 0.3),
    "softmax": lambda x: jax.nn.softmax(healthy(x)),
    "input-range": lambda x: healthy(x / 255),
    "missing-normalisation": inner,
    "double-normalisation": lambda x: healthy(normalise(x)),
    "channel-order": lambda x: healthy(x[..., ::-1]),
    "label-order": lambda x: jnp.roll(healthy(x), 1, axis=1),
    "label-order, any": lambda x: healthy(x)[:, ORDER],
    "one-class": lambda x: healthy(x) + 1e3 * jax.nn.one_hot(3, 10)[None],
    "zero-gradients": quantised,
    "zero-gradients, saturated": saturated,
    "zero-gradients, no derivative": called_back,
    "dlr-against-ce": shifted,
    "radius": misled_far_off,
    "pgd-against-noise": lambda x: healthy(uphill_is_down(x)),
}
