"""`python -m jaxrobust.doctor` is `jaxrobust doctor`, which is in `commands.doctor`."""

from jaxrobust.__main__ import run

if __name__ == "__main__":
    run("doctor")
