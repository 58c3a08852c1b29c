"""`python -m jaxrobust.evaluate` is `jaxrobust evaluate`, which is in `commands.evaluate`."""

from jaxrobust.__main__ import run

if __name__ == "__main__":
    run("evaluate")
