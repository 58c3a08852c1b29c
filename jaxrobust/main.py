"""`python -m jaxrobust.main` is `jaxrobust train`, which stands in `commands.train`."""

from jaxrobust.__main__ import run

if __name__ == "__main__":
    run("train")
