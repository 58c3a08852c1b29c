"""Which blocks take kernels for NVIDIA's Hopper GPUs; off by default, as no GPU has run them."""

import os
import re
from typing import Any

import jax
import jax.numpy as jnp

from jaxrobust.models.kernels import cuda
from jaxrobust.models.kernels.primitives import device_kind, takes_xla

FLAG = "JAXROBUST_HOPPER_KERNELS"
NOTE = f"{FLAG}=1 turns on kernels and layouts that compile, but have not been run on a GPU"
WIDTHS = (96, 128, 192)  # streaming larger weights takes longer than moving the hidden layer
TILE = 128  # pixels, and hidden channels, that a kernel processes at a time
_HOPPER = r"\bG?H\d+"  # in the names of chips
_OLDEST = (0, 12)  # JAX whose interpreter tests the kernels


def requested() -> bool:
    """Return whether the environment turns the kernels on."""
    return os.environ.get(FLAG) == "1"


def takes(x: jax.Array, channels: int, hidden: int) -> bool:
    """Return whether a block's MLP is a kernel; if requested but refused, say why once on a GPU."""
    if not requested():
        return False
    reason = refused(x, channels, hidden, device_kind())
    return not takes_xla("a ConvNeXt block", reason, "gpu")


def stores_slopes(x: jax.Array) -> bool:
    """Return whether an MLP's GELU stores its slopes for the backward pass.

    XLA then multiplies them in the kernel of the gradient's product.
    """
    hopper = requested() and re.search(_HOPPER, device_kind()) is not None
    return hopper and x.dtype == jnp.bfloat16


def takes_tokens(x: jax.Array, heads: int) -> bool:
    """Return whether a network pads its tokens f[B,N,D] once, for cuDNN's attention."""
    if not requested():
        return False
    reason = refused_tokens(x, heads, device_kind())
    return not takes_xla("attention without copies", reason, "gpu")


def refused_tokens(x: Any, heads: int, kind: str) -> str | None:
    """Say why `fused_attention.of_tokens` does not support these tokens; None: it does."""
    if not re.search(_HOPPER, kind):
        return f"{kind} is not a Hopper GPU"
    return cuda.fused_attention.refused(x.dtype, x.shape[2] // heads)


def refused(x: Any, channels: int, hidden: int, kind: str) -> str | None:
    """Say why the kernel does not support this block on this kind of device; None: it does."""
    if not re.search(_HOPPER, kind):
        return f"{kind} is not a Hopper GPU"
    if x.dtype != jnp.bfloat16:
        return f"{x.dtype} is not bfloat16"
    if channels not in WIDTHS:
        return f"the channel count {channels} is not one of {', '.join(map(str, WIDTHS))}"
    if hidden % TILE:
        return f"{hidden} hidden channels are not a multiple of {TILE}"
    if x.size // channels % TILE:
        return f"{x.size // channels} pixels are not a multiple of {TILE}"
    if jax.__version_info__[:2] < _OLDEST:
        return f"JAX {jax.__version__} is older than {'.'.join(map(str, _OLDEST))}"
    return None
