"""`python -m jaxrobust.estimate` is `jaxrobust estimate`, which stands in `commands.estimate`."""

import runpy

if __name__ == "__main__":
    runpy.run_module("jaxrobust.commands.estimate", run_name="__main__", alter_sys=True)
