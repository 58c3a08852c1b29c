"""`python -m jaxrobust.models` is `jaxrobust models`, which stands in `commands.models`."""

import runpy

if __name__ == "__main__":
    runpy.run_module("jaxrobust.commands.models", run_name="__main__", alter_sys=True)
