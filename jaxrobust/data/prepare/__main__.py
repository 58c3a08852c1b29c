"""`python -m jaxrobust.data.prepare` is `jaxrobust prepare`, implemented in `commands.prepare`."""

from jaxrobust.__main__ import run

if __name__ == "__main__":
    run("prepare")
