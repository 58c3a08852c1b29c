"""`jaxrobust prepare NAME ...`: convert data sets to ArrayRecord, without TensorFlow.

NAME is imagenet (from its tar files, or any folder of images), cifar10 or cifar100 (which are
downloaded). generated makes shards from .npz files with tens of millions of images; pseudo-labelled
makes an .npz file from a pickle. `NAME --help` has the details.
"""

import functools
import sys
from collections.abc import Callable

from jaxrobust.data.prepare import cifar, generated, imagenet, pseudo_labelled
from jaxrobust.runtime.commandline.arguments import stop
from jaxrobust.runtime.text import spelling

COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "imagenet": imagenet.main,
    "cifar10": functools.partial(cifar.main, "cifar10"),
    "cifar100": functools.partial(cifar.main, "cifar100"),
    generated.NAME: generated.main,
    pseudo_labelled.NAME: pseudo_labelled.main,
}
_SPELLED = {spelling.dataset(name): name for name in COMMANDS}  # accepts other spellings


def main(argv: list[str] | None = None) -> None:
    """Run the command of a data set."""
    name, *words = (sys.argv[1:] if argv is None else argv) or [""]
    if name in ("-h", "--help"):
        print(__doc__)
    elif command := _SPELLED.get(spelling.dataset(name)):
        COMMANDS[command](words)
    else:
        problem = f"prepare does not support {name!r}" if name else "prepare needs a data set"
        stop(f"{problem}; choose one of {', '.join(COMMANDS)}, each of which has a --help", 2)
