"""The commands, one file each: `jaxrobust COMMAND ...`."""

import sys

# `python -m` imports this before it runs a command's module, which would do nothing by itself.
if sys.argv[:1] == ["-m"] and any(word.startswith(f"{__name__}.") for word in sys.orig_argv):
    sys.exit(
        "jaxrobust: start a command as `python -m jaxrobust COMMAND`; without one it lists them"
    )
