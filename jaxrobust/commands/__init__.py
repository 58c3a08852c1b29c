"""The commands, one file each: `jaxrobust COMMAND ...`."""

import sys

# `python -m` imports this before it runs a command's module, which would do nothing by itself.
if sys.argv[:1] == ["-m"] and any(word.startswith(f"{__name__}.") for word in sys.orig_argv):
    sys.exit(
        "jaxrobust: run a command as `python -m jaxrobust COMMAND`; without COMMAND it lists all"
    )
