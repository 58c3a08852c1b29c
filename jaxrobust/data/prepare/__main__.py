"""`python -m jaxrobust.data.prepare` is `jaxrobust prepare`, which stands in `commands.prepare`."""

import runpy

if __name__ == "__main__":
    runpy.run_module("jaxrobust.commands.prepare", run_name="__main__", alter_sys=True)
