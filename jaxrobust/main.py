"""`python -m jaxrobust.main` is `jaxrobust train`, which is in `commands.train`."""

from jaxrobust.__main__ import run

if __name__ == "__main__":
    run("train")
