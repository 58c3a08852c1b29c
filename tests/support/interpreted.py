"""Kernels for TPUs on any platform, run by JAX's interpreter."""

import functools
from unittest import mock

from jaxrobust.models.kernels.tpu import (
    batch_stem,
    channel_attention,
    conv_stem,
    convnext_block,
    depthwise_norm,
    norm_halving,
    talking_heads,
    token_attention,
    token_interaction,
    token_norm,
)

KERNELS = token_attention, channel_attention, depthwise_norm, conv_stem, token_interaction
KERNELS = *KERNELS, batch_stem, convnext_block, norm_halving, token_norm, talking_heads
CALLS = {"forward", "backward", "parameter_gradients", "first", "second", "sums", "gradient"}
CALLS |= {"third", "first_sums", "second_sums", "all_gradients"}


def on_tpu(*modules):
    """Take the rules of TPUs on this platform, with interpreted kernels."""
    stack = [mock.patch.object(m, "lax", PlatformRules(m.lax, "tpu")) for m in modules]
    for module in KERNELS:
        for name in CALLS & {*vars(module)}:
            interpreted = functools.partial(getattr(module, name), interpret=True)
            stack.append(mock.patch.object(module, name, interpreted))
    return stack


class PlatformRules:
    """`jax.lax` whose `platform_dependent` takes the rule of one platform."""

    def __init__(self, lax, platform):
        self.lax, self.platform = lax, platform

    def __getattr__(self, name):
        return getattr(self.lax, name)

    def platform_dependent(self, *operands, **rules):
        return rules.get(self.platform, rules["default"])(*operands)
