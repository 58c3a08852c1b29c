"""`jaxrobust COMMAND ...`, or `python -m jaxrobust COMMAND ...`: the commands by their names."""

import runpy
import sys
from typing import NamedTuple

from jaxrobust import __version__
from jaxrobust.runtime import commandline, patience
from jaxrobust.runtime.spelling import meant


class Command(NamedTuple):
    """A module that `python -m` runs too, how it is used, and what it does."""

    module: str
    usage: str
    does: str


COMMANDS = {
    "train": Command("jaxrobust.main", "--config FILE", "trains a network, or continues to"),
    "evaluate": Command(
        "jaxrobust.evaluate", "--workdir RUN", "attacks a network and keeps the record"
    ),
    "doctor": Command(
        "jaxrobust.doctor", "RUN", "looks for the usual faults of a network, a run or a config"
    ),
    "estimate": Command(
        "jaxrobust.estimate.__main__", "CONFIG --on v5e:8x8", "says what a run will cost"
    ),
    "report": Command(
        "jaxrobust.report", "runs/quickstart", "shows runs and evaluations as one HTML file"
    ),
    "models": Command(
        "jaxrobust.models", "", "lists the architectures and the checkpoints that load"
    ),
    "scaling": Command(
        "jaxrobust.scaling", "5e9", "says how deep and wide a robust residual network should be"
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
    "prepare": Command(
        "jaxrobust.data.prepare", "cifar10 --out DIR", "writes data sets as training reads them"
    ),
    "certificate": Command(
        "jaxrobust.convert.certificate", "--model M", "compares a network with its reference"
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
        commandline.stop(f"{name} is no command; {meant(name, COMMANDS)}", 2)
    commandline.program = f"jaxrobust {name}"
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
