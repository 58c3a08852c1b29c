"""`python -m jaxrobust.data.prepare imagenet ...`: data sets become ArrayRecord, no TensorFlow."""

import sys
from collections.abc import Callable

from jaxrobust.data.prepare import imagenet
from jaxrobust.runtime.commandline import stop

COMMANDS: dict[str, Callable[[list[str]], None]] = {"imagenet": imagenet.main}


def main(argv: list[str] | None = None) -> None:
    """Run the command of a data set."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or [""]
    if name not in COMMANDS:
        stop(f"prepare {name or 'what'}? write one of {', '.join(COMMANDS)}; each has a --help", 2)
    COMMANDS[name](rest)


if __name__ == "__main__":
    main()
