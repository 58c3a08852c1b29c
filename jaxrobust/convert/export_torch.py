"""The public names of `jaxrobust.publish.export_torch`."""

if __name__ == "__main__":  # before the imports below, which take seconds
    from jaxrobust.__main__ import run

    run("export")
    raise SystemExit

from jaxrobust.publish.export_torch import ExportSettings, export

__all__ = ["ExportSettings", "export"]
