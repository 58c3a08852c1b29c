"""`python -m jaxrobust.evaluate` is `jaxrobust evaluate`, which stands in `commands.evaluate`."""

import runpy

if __name__ == "__main__":
    runpy.run_module("jaxrobust.commands.evaluate", run_name="__main__", alter_sys=True)
