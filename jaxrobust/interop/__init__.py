"""The old place of `jaxrobust.pytorch`: `jaxrobust.interop.torch` stays."""
