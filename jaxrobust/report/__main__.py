"""`python -m jaxrobust.report` is `jaxrobust report`, which stands in `commands.report`."""

from jaxrobust.__main__ import run

if __name__ == "__main__":
    run("report")
