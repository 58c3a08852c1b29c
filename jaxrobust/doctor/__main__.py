"""`python -m jaxrobust.doctor` is `jaxrobust doctor`, which stands in `commands.doctor`."""

import runpy

if __name__ == "__main__":
    runpy.run_module("jaxrobust.commands.doctor", run_name="__main__", alter_sys=True)
