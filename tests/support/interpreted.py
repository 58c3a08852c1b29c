"""Kernels for TPUs on any platform, run by JAX's interpreter."""

from unittest import mock

from jaxrobust.models.kernels import tpu


def on_tpu(*modules):
    """Take the rules of TPUs on this platform, with interpreted kernels."""
    rules = [mock.patch.object(m, "lax", PlatformRules(m.lax, "tpu")) for m in modules]
    return [*rules, tpu.interpreted(True)]


class PlatformRules:
    """`jax.lax` whose `platform_dependent` takes the rule of one platform."""

    def __init__(self, lax, platform):
        self.lax, self.platform = lax, platform

    def __getattr__(self, name):
        return getattr(self.lax, name)

    def platform_dependent(self, *operands, **rules):
        return rules.get(self.platform, rules["default"])(*operands)
