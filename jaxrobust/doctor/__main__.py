"""Run `jaxrobust doctor` as `python -m jaxrobust.doctor`; see `commands.doctor`."""

from jaxrobust.__main__ import run

if __name__ == "__main__":
    run("doctor")
