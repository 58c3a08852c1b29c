"""The public names of `jaxrobust.publish.export_torch`."""

from jaxrobust.publish.export_torch import ExportSettings, export

__all__ = ["ExportSettings", "export"]
