"""`python -m jaxrobust.main` is `jaxrobust train`, which stands in `commands.train`."""

import runpy

if __name__ == "__main__":
    runpy.run_module("jaxrobust.commands.train", run_name="__main__", alter_sys=True)
