"""Networks with the same arrays and the same logits that are not the same computation."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

Partial = jax.tree_util.Partial


def linear(weights, x):
    return x.reshape(len(x), -1) @ weights


def rounded(x):
    """To 8 bits, as an image file holds pixels: no gradient passes."""
    return jnp.round(x * 255) / 255


@jax.custom_vjp
def straight_through(x):
    return rounded(x)


straight_through.defvjp(lambda x: (rounded(x), None), lambda _, g: (g,))


@jax.custom_vjp
def halved(x):
    return rounded(x)


halved.defvjp(lambda x: (rounded(x), None), lambda _, g: (g / 2,))


def detached(x):
    return x + jax.lax.stop_gradient(rounded(x) - x)


@jax.custom_jvp
def tangent(x):
    return rounded(x)


tangent.defjvp(lambda x, t: (rounded(x[0]), t[0]))


def network(front: Callable, weights) -> Partial:
    return Partial(lambda w, x: linear(w, front(x)), weights)


# By name: what stands in front of a network.
FRONTS = {
    "masked": rounded,
    "straight through": straight_through,
    "half the gradient": halved,
    "detached": detached,
    "a tangent of its own": tangent,
}


def through_python(scale: float) -> Callable:
    """A network of which JAX sees a call to Python, and not what that computes."""

    def forward(x):
        shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return jax.pure_callback(lambda y: np.asarray(scale * np.asarray(y)), shape, x)

    @jax.custom_vjp
    def called(x):
        return forward(x)

    called.defvjp(lambda x: (forward(x), None), lambda _, g: (g,))
    return called
