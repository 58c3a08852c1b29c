"""The public names of `jaxrobust.publish.import_torch`."""

from jaxrobust.publish.import_torch import import_weights

__all__ = ["import_weights"]
