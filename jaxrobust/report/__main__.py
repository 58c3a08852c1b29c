"""`python -m jaxrobust.report` is `jaxrobust report`, which stands in `commands.report`."""

import runpy

if __name__ == "__main__":
    runpy.run_module("jaxrobust.commands.report", run_name="__main__", alter_sys=True)
