"""The public names of `jaxrobust.publish.import_torch`."""

if __name__ == "__main__":  # before the imports below, which take seconds
    from jaxrobust.__main__ import run

    run("import")
    raise SystemExit

from jaxrobust.publish.import_torch import import_weights

__all__ = ["import_weights"]
