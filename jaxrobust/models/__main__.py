"""`python -m jaxrobust.models` is `jaxrobust models`, implemented in `commands.models`."""

from jaxrobust.__main__ import run

if __name__ == "__main__":
    run("models")
