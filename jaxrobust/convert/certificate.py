"""The public names of `jaxrobust.publish.certificate`."""

if __name__ == "__main__":  # before the imports below, which take seconds
    from jaxrobust.__main__ import run

    run("certificate")
    raise SystemExit

from jaxrobust.publish.certificate import compare

__all__ = ["compare"]
