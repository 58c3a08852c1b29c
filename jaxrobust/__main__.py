"""`jaxrobust COMMAND ...`, or `python -m jaxrobust COMMAND ...`: the commands by their names."""

import errno
import functools
import importlib.util
import os
import runpy
import select
import sys
from collections.abc import Callable
from typing import NamedTuple

from jaxrobust import __version__
from jaxrobust.runtime import rooms
from jaxrobust.runtime.commandline import arguments
from jaxrobust.runtime.processes.launch import keep_large_buffers, use_every_core
from jaxrobust.runtime.text import patience
from jaxrobust.runtime.text.spelling import meant


class Command(NamedTuple):
    """A module, `.name` of `jaxrobust.commands` or in full, its usage, and what it does."""

    module: str
    usage: str
    does: str


COMMANDS = {
    "new": Command(".configure.new", "birds.py --data DIR", "writes a config for your images"),
    "check": Command(".configure.check", "CONFIG", "lists everything wrong with a config"),
    "train": Command(".train", "CONFIG", "trains a network, or resumes training"),
    "evaluate": Command(".evaluate", "TARGET", "attacks a network and records the result"),
    "doctor": Command(".doctor", "RUN", "checks a network or config for common problems"),
    "estimate": Command(".estimate", "CONFIG --on v5e:8x8", "estimates what a run will cost"),
    "why": Command(".why", "CONFIG", "shows where the values of a config come from"),
    "report": Command(".report", "RUN", "shows runs and evaluations as one HTML file"),
    "select": Command(".select", "RUN", "selects a run's weights on held-out images"),
    "compare": Command(".compare", "A B", "tests whether two evaluations really differ"),
    "runs": Command(".results.runs", "[FOLDER]", "lists training runs and evaluations"),
    "verify": Command(".verify", "BUNDLE --weights W", "checks a claimed robust accuracy"),
    "board": Command(".results.board", "BUNDLES --out SITE", "ranks verified bundles on a page"),
    "models": Command(".models", "", "lists architectures and published checkpoints"),
    "import": Command(
        *(".conversion.import_weights", "SOURCE --out DIR"),
        "imports weights: a file, URL, Hub or timm",
    ),
    "export": Command(
        ".conversion.export_weights", "TARGET", "exports weights for PyTorch and RobustBench"
    ),
    "certificate": Command(
        ".conversion.certificate", "--model M", "compares a network with its reference"
    ),
    "prepare": Command(".prepare", "cifar10 --out DIR", "prepares data sets for training"),
}
COMMANDS |= {name: Command(*row) for name, row in rooms.entries("COMMANDS").items()}
# Of absl: they run as `__main__`, whose document and flags its --help shows.
_ABSL = ("train", "evaluate", "doctor")
_LOADING = functools.partial(patience.begin, patience.LOADING)  # a config imports the package too
_SEARCHING = (keep_large_buffers, use_every_core)  # as AutoAttack does and, where it can, training
_BEFORE: dict[str, tuple[Callable[[], None], ...]] = {  # a command's module is imported
    "train": (keep_large_buffers, _LOADING),
    "evaluate": (*_SEARCHING, _LOADING),
    "doctor": (*_SEARCHING, _LOADING),
    "estimate": _SEARCHING,
    "verify": (*_SEARCHING, arguments.quiet_libraries),
    "board": (*_SEARCHING, arguments.quiet_libraries),
    # The accelerator is the training's.
    **dict.fromkeys(
        ("report", "figure", "runs"), (functools.partial(os.environ.update, JAX_PLATFORMS="cpu"),)
    ),
    **dict.fromkeys(("select", "analyse", "landscape"), (keep_large_buffers,)),
}


def module_of(name: str) -> str:
    """Return the full name of the module that a command is."""
    return importlib.util.resolve_name(COMMANDS[name].module, "jaxrobust.commands")


def run(name: str) -> None:
    """Run a command on the words after its name, `sys.argv[1:]`."""
    arguments.program = f"jaxrobust {name}"
    for prepare in _BEFORE.get(name, ()):
        prepare()
    if name in _ABSL:
        runpy.run_module(module_of(name), run_name="__main__", alter_sys=True)
    elif code := importlib.import_module(module_of(name)).main():
        sys.exit(code)


def main() -> None:
    """Run the command that is named; without one, say what there is."""
    name, *argv = sys.argv[1:] or ["--help"]
    try:
        if name in ("--help", "-h", "help"):
            print(_overview())
        elif name == "--version":
            print(f"jaxrobust {__version__}")
        elif name not in COMMANDS:
            arguments.stop(f"{name} is not a command; {meant(name, COMMANDS)}", 2)
        else:
            sys.argv[1:] = argv
            patience.begin(patience.LOADING)  # the packages of some commands need it
            run(name)
        sys.stdout.flush()
    except BrokenPipeError:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        if not any(event & select.POLLERR for _, event in poll.poll(0)):  # somebody reads
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes at exit
        sys.exit(141)  # as of a program that SIGPIPE ends
    except OSError as error:
        if error.errno != errno.ENOSPC or error.filename:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        arguments.stop("cannot write the output: no space left on the device", 3)


def _overview() -> str:
    usages = {f"{name} {row.usage}".strip(): row.does for name, row in COMMANDS.items()}
    width = max(map(len, usages))
    rows = "\n".join(f"  {usage:{width}}  {does}" for usage, does in usages.items())
    return (
        f"jaxrobust {__version__}, adversarially robust image classifiers in JAX\n\n"
        f"jaxrobust COMMAND ..., where COMMAND is one of\n\n{rows}\n\n"
        "For details, run jaxrobust COMMAND --help. README.md has a quickstart."
    )


if __name__ == "__main__":
    main()
