"""`jaxrobust COMMAND ...`, or `python -m jaxrobust COMMAND ...`: the commands by their names."""

import runpy
import sys
from typing import NamedTuple

from jaxrobust import __version__
from jaxrobust.runtime.commandline import arguments
from jaxrobust.runtime.text import patience
from jaxrobust.runtime.text.spelling import meant


class Command(NamedTuple):
    """A module that `python -m` runs too, how it is used, and what it does."""

    module: str
    usage: str
    does: str


COMMANDS = {
    "train": Command(
        "jaxrobust.commands.train", "--config FILE", "trains a network, or continues to"
    ),
    "evaluate": Command(
        "jaxrobust.commands.evaluate", "--workdir RUN", "attacks a network and keeps the record"
    ),
    "doctor": Command(
        "jaxrobust.commands.doctor",
        "RUN",
        "looks for the usual faults of a network, a run or a config",
    ),
    "estimate": Command(
        "jaxrobust.commands.estimate", "CONFIG --on v5e:8x8", "says what a run will cost"
    ),
    "report": Command(
        "jaxrobust.commands.report",
        "runs/quickstart",
        "shows runs and evaluations as one HTML file",
    ),
    "select": Command(
        "jaxrobust.commands.select",
        "RUN",
        "chooses the weights of a run on images that test nothing",
    ),
    "compare": Command(
        "jaxrobust.commands.compare",
        "A B",
        "tells whether two evaluations differ by more than chance",
    ),
    "verify": Command(
        "jaxrobust.commands.verify",
        "BUNDLE --weights W",
        "checks a claimed robust accuracy, one pass an image",
    ),
    "models": Command(
        "jaxrobust.commands.models", "", "lists the architectures and the checkpoints that load"
    ),
    "scaling": Command(
        "jaxrobust.commands.scaling",
        "5e9",
        "says how deep and wide a robust residual network should be",
    ),
    "import": Command(
        "jaxrobust.convert.import_torch",
        "SOURCE --out DIR",
        "takes weights of files, URLs, hub or timm",
    ),
    "export": Command(
        "jaxrobust.convert.export_torch",
        "--workdir RUN",
        "writes them for us, PyTorch or RobustBench",
    ),
    "certificate": Command(
        "jaxrobust.convert.certificate", "--model M", "compares a network with its reference"
    ),
    "prepare": Command(
        "jaxrobust.commands.prepare", "cifar10 --out DIR", "writes data sets as training reads them"
    ),
    "analyse": Command(
        "jaxrobust.commands.analysis.analyse",
        "ANALYSIS --workdir RUN",
        "draws what a network has learnt, and how attacks fare",
    ),
    "landscape": Command(
        "jaxrobust.commands.analysis.landscape",
        "--workdir RUN",
        "draws the loss around the weights of a network",
    ),
    "sparsity": Command(
        "jaxrobust.commands.analysis.sparsity",
        "--workdir RUN",
        "draws how many weights are next to nothing",
    ),
    "reproduce": Command(
        "jaxrobust.commands.reproduce",
        "RUN --paper P",
        "shows the papers' tables beside our records",
    ),
}


def main() -> None:
    """Run the command that is named, as `python -m` would; without one, say what there is."""
    name, *rest = sys.argv[1:] or ["--help"]
    if name in ("--help", "-h", "help"):
        return print(_overview())
    if name == "--version":
        return print(f"jaxrobust {__version__}")
    if name not in COMMANDS:
        arguments.stop(f"{name} is no command; {meant(name, COMMANDS)}", 2)
    arguments.program = f"jaxrobust {name}"
    sys.argv[1:] = rest
    patience.begin(patience.LOADING)  # the packages of some commands need it
    runpy.run_module(COMMANDS[name].module, run_name="__main__", alter_sys=True)


def _overview() -> str:
    usages = {f"jaxrobust {name} {row.usage}": row.does for name, row in COMMANDS.items()}
    width = max(map(len, usages))
    rows = "\n".join(f"{usage:{width}}  {does}" for usage, does in usages.items())
    return (
        f"jaxrobust {__version__}, adversarially robust image classifiers in JAX\n\n{rows}\n\n"
        "Each command says more with --help; README.md shows them in the order of their use."
    )


if __name__ == "__main__":
    main()
