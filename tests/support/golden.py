"""Golden arrays of attacks, and how results compare with them."""

import jax
import jax.numpy as jnp
import numpy as np

from tests.support import paths


def load(path) -> dict[str, np.ndarray]:
    with np.load(path) as data:
        return dict(data)


def assert_within(actual, expected, tolerance):
    """Like assert_allclose with an array of absolute tolerances, broadcast."""
    error = np.abs(np.asarray(actual) - np.asarray(expected))
    excess = np.max(error / tolerance)
    assert excess <= 1, f"the error is {excess:.3g} times the tolerance, {error.max():.3g} at most"


def _lax_conv(x, kernel):
    how = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}
    return jax.lax.conv_general_dilated(x, kernel, (2, 2), ((1, 1), (1, 1)), **how)


def golden_nets(dtype=None, conv_of=_lax_conv):
    """The two small networks of the golden arrays, `conv` and `lin`, in plain JAX.

    `conv_of(x, kernel)` is their convolution, of stride 2 and padding 1: within a loop on CPU that
    of XLA is 50 times slower than the package's.
    """
    w = {k: jnp.asarray(v, dtype) for k, v in load(paths.GOLDEN / "attacks/nets.npz").items()}

    def gelu(h):
        return jax.nn.gelu(h, approximate=False)

    def conv(x):
        h = (x - w["mean"][None, None, None]) / w["std"][None, None, None]
        for i in "123":
            kernel, bias = w[f"conv{i}_w_hwio"], w[f"conv{i}_b"][None, None, None]
            h = gelu(conv_of(h, kernel) + bias)
        h = gelu(h.reshape(h.shape[0], -1) @ w["fc1_w_hwc"] + w["fc1_b"][None])
        return h @ w["fc2_w"] + w["fc2_b"][None]

    def lin(x):
        return (x - 0.5).reshape(x.shape[0], -1) @ w["lin_w_hwc"] + w["lin_b"][None]

    return {"conv": conv, "lin": lin}


def norm_in_float64(delta, norm) -> np.ndarray:
    delta = np.abs(np.asarray(delta, np.float64).reshape(len(delta), -1))
    return {"linf": delta.max(1), "l2": np.sqrt((delta**2).sum(1)), "l1": delta.sum(1)}[norm]
