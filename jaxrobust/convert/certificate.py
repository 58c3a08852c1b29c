"""The public names of `jaxrobust.publish.certificate`."""

from jaxrobust.publish.certificate import compare

__all__ = ["compare"]
