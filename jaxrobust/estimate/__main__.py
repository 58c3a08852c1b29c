"""`python -m jaxrobust.estimate` is `jaxrobust estimate`, which stands in `commands.estimate`."""

from jaxrobust.__main__ import run

if __name__ == "__main__":
    run("estimate")
