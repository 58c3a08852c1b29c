"""Random images and a small network with its labels, for the attacks that change a few pixels."""

import jax.numpy as jnp
import numpy as np

DRAW = np.random.default_rng(0)
COUNT, SIDE = 12, 8
IMAGES = DRAW.random((COUNT, SIDE, SIDE, 3))
W1, W2 = DRAW.normal(size=(SIDE * SIDE * 3, 32)) / 4, DRAW.normal(size=(32, 5))


def net(x):
    """Return logits f[B,5] of a small network."""
    w1, w2 = jnp.asarray(W1, x.dtype), jnp.asarray(W2, x.dtype)
    return jnp.tanh(x.reshape(len(x), -1) @ w1 / 4) @ w2


LABELS = np.asarray(net(jnp.asarray(IMAGES, jnp.float32)).argmax(1))
