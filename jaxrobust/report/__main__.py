"""Run `jaxrobust report` as `python -m jaxrobust.report`; see `commands.report`."""

from jaxrobust.__main__ import run

if __name__ == "__main__":
    run("report")
