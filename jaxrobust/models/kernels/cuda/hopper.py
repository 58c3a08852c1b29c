"""Which blocks take kernels for NVIDIA's Hopper GPUs; off by default, as no GPU has run them."""

import functools
import os
import re
from typing import Any

import jax
import jax.numpy as jnp

from jaxrobust.runtime.text.progress import say

FLAG = "JAXROBUST_HOPPER_KERNELS"
NOTE = f"{FLAG}=1 turns on kernels that are compiled and simulated, but have not run on a GPU"
WIDTHS = (96, 128, 192)  # streaming larger weights takes longer than moving the hidden layer
TILE = 128  # pixels, and hidden channels, that a kernel processes at a time
_OLDEST = (0, 12)  # JAX whose interpreter tests the kernels


def requested() -> bool:
    """Return whether the environment turns the kernels on."""
    return os.environ.get(FLAG) == "1"


def takes(x: jax.Array, channels: int, hidden: int) -> bool:
    """Return whether a block's MLP is a kernel; if requested but refused, say why once on a GPU."""
    if not requested():
        return False
    described = jax.sharding.get_abstract_mesh().abstract_device
    kind = described.device_kind if described else jax.devices()[0].device_kind
    if reason := refused(x, channels, hidden, kind):
        _say_once(f"a block of ConvNeXt takes XLA's path: {reason}")
    return reason is None


def refused(x: Any, channels: int, hidden: int, kind: str) -> str | None:
    """Say why the kernel does not support this block on this kind of device; None: it does."""
    if not re.search(r"\bG?H\d+", kind):
        return f"{kind} is not a Hopper GPU"
    if x.dtype != jnp.bfloat16:
        return f"{x.dtype} is not bfloat16"
    if channels not in WIDTHS:
        return f"{channels} channels are not one of {', '.join(map(str, WIDTHS))}"
    if hidden % TILE:
        return f"{hidden} hidden channels are not a multiple of {TILE}"
    if x.size // channels % TILE:
        return f"{x.size // channels} pixels are not a multiple of {TILE}"
    if jax.__version_info__[:2] < _OLDEST:
        return f"JAX {jax.__version__} is older than {'.'.join(map(str, _OLDEST))}"
    return None


@functools.cache
def _say_once(sentence: str) -> None:
    if jax.default_backend() == "gpu":
        say(sentence)
