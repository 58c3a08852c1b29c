"""Which blocks take kernels for NVIDIA's Hopper GPUs: off by default, as no GPU has run them."""

import functools
import os
import re
from typing import Any

import jax
import jax.numpy as jnp

from jaxrobust.runtime.text.progress import say

FLAG = "JAXROBUST_HOPPER_KERNELS"
NOTE = f"{FLAG}=1 takes kernels that were compiled for an H100 and interpreted, never timed"
WIDTHS = (96, 128, 192)  # larger weights take longer to stream than the hidden layer
TILE = 128  # pixels, and hidden channels, that a kernel processes at a time
_OLDEST = (0, 12)  # JAX whose interpreter tests the kernels


def requested() -> bool:
    """Return whether the environment switches the kernels on."""
    return os.environ.get(FLAG) == "1"


def takes(x: jax.Array, channels: int, hidden: int) -> bool:
    """Return whether a block's MLP is a kernel; if one is requested in vain, say why on a GPU."""
    reason = refused(x, channels, hidden) if requested() else None
    if reason:
        _say_once(f"a block of ConvNeXt takes XLA's path: {reason}")
    return requested() and reason is None


def refused(x: Any, channels: int, hidden: int) -> str | None:
    """Say why the kernel does not support this block; None: it does."""
    if jax.__version_info__[:2] < _OLDEST:
        return f"JAX {jax.__version__} is older than {'.'.join(map(str, _OLDEST))}"
    if not re.search(r"\bG?H\d+", kind := _device_kind()):
        return f"{kind} is not a Hopper GPU"
    if x.dtype != jnp.bfloat16:
        return f"{x.dtype} is not bfloat16"
    if channels not in WIDTHS or hidden % TILE:
        return f"{channels} channels with {hidden} hidden ones are not {WIDTHS} with {TILE} n"
    if x.size // channels % TILE:
        return f"{x.size // channels} pixels are not a multiple of {TILE}"
    return None


def _device_kind() -> str:
    described = jax.sharding.get_abstract_mesh().abstract_device
    return described.device_kind if described else jax.devices()[0].device_kind


@functools.cache
def _say_once(sentence: str) -> None:
    if jax.default_backend() == "gpu":
        say(sentence)
