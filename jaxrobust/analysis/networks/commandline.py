"""What the command lines of `analyse.py` and `landscape.py` share."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jaxrobust.runtime.commandline.arguments import Arguments, ending, quiet_libraries

# As jaxrobust.evaluate has them.
NETWORK = {
    "workdir": "Run to analyse: its network, data, norm and radius.",
    "phase": "Phase of the run; default: the last one that has weights.",
    "model": "Network of weights that do not say whose they are.",
    "weights": "Weights: a file, an imported folder, a URL, hf://ORG/REPO, a RobustBench or timm "
    "id.",
    "options": "Fields of the row of --model: {'stem_strides': (1,)}.",
    "dataset": "Data set; default: that of the run.",
    "split": "Split; default: the test split.",
    "classes": "List of the classes that are kept.",
    "data_dir": "Folder of data sets; default: that of the run, or $TFDS_DATA_DIR.",
    "preprocessing": "Preprocessing; default: that of the run's tests.",
}


def add_network(parser: Arguments, network: Mapping[str, str]) -> None:
    """Add the flags that name a network and its images: their name and help."""
    for name, text in network.items():
        parser.flag(name, help=text)
    for name in ("num_classes", "image_size"):
        parser.flag(name, type=int, help="As of jaxrobust.evaluate.")


def add_out(parser: Arguments) -> None:
    """Add the flag that says where the files go."""
    parser.flag("out", type=Path, help="Folder of both files; default: RUN/analyses, or analyses.")


def folder(args: Any) -> Path:
    """Return the folder in which the files go."""
    return args.out or (Path(args.workdir) / "analyses" if args.workdir else Path("analyses"))


def run(made: Callable[[], tuple[Path, Path]], interrupted: str) -> None:
    """Make two files and say which; or end with a sentence, after Ctrl-C with `interrupted`."""
    quiet_libraries()
    with ending(interrupted, ". With that solved, run the same command again"):
        print("\n".join(map(str, made())))
