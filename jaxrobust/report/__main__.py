"""`python -m jaxrobust.report` is `jaxrobust report`, which is in `commands.report`."""

from jaxrobust.__main__ import run

if __name__ == "__main__":
    run("report")
