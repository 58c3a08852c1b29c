"""`jaxrobust estimate CONFIG --on cpu|gpu|v5e:8x8|h100:8`: what a run will cost.

Prints hours, chip-hours, images/s and memory of each phase and of AutoAttack after it, and the
price if `--price` gives that of a chip-hour. On devices of this machine the programs are compiled
and run briefly. For other devices the model's operations are divided by the chips' peak and an
assumed utilization; for TPUs the step is also compiled if libtpu is installed, for H100s and
H200s if JAX's CUDA plug-in is.

`jaxrobust estimate --target 65 --dataset cifar10` answers the reverse question: which network and
how many images, epochs and chip-hours reach this AutoAttack accuracy, according to a scaling law of
published runs.

Set keys of the config as for training: --config.train.epochs=20.

Exit codes: 0 done; 2 a mistake, with one sentence on stderr; 3 another reason, which is printed.
"""

import sys
import time
from dataclasses import dataclass

from jaxrobust.commands.flags.shared import shared
from jaxrobust.doctor.estimate import changes, command
from jaxrobust.runtime import rooms
from jaxrobust.runtime.commandline import arguments, fields

BEGUN = time.perf_counter()


@dataclass(frozen=True, kw_only=True)
class EstimateFlags(command.EstimateSettings):
    """The settings of an estimate, and its output."""

    json: bool = shared("json", False)


def main() -> None:
    """Read the command line and print the estimated cost of the run."""
    words, changed = changes.divided(sys.argv[1:])
    again = "nothing is lost; run the same command to start again"
    if any(word.partition("=")[0].lstrip("-") == "target" for word in words):
        law = rooms.resolve(rooms.entries("ESTIMATES")["target"])
        asked = fields.read(
            law.TargetSettings, __doc__, words, usage="%(prog)s --target 65 [flags]"
        )
        arguments.answer(law.answer, asked, again)
        return
    flags = fields.read(
        EstimateFlags,
        __doc__,
        words,
        usage="%(prog)s CONFIG --on DEVICES [--config.key=value ...] [flags]",
        usual="on price batch images fast json",
    )
    arguments.answer(lambda settings: command.answer(settings, changed, BEGUN), flags, again)
