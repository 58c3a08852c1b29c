"""`jaxrobust estimate CONFIG --on cpu|gpu|v5e:8x8|h100:8`: what a run will cost.

Prints hours, chip-hours, images/s and memory of each phase and of the AutoAttack after it, and the
money where `--price` says what an hour of a chip costs. On devices that are here the programs are
compiled and run for a moment; for others the operations of the model are divided by the chips' peak
and an assumed utilisation, and for TPUs the step is compiled too, where libtpu is installed.

Exit codes: 0 done; 2 a mistake, with one sentence on stderr; 3 another reason that is named.
"""

import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

from jaxrobust.commands.flags.shared import shared
from jaxrobust.estimate import changes, command
from jaxrobust.runtime.commandline import arguments, fields
from jaxrobust.runtime.commandline.arguments import answer, number
from jaxrobust.runtime.commandline.fields import flag

BEGUN = time.perf_counter()


@dataclass(frozen=True, kw_only=True)
class EstimateFlags:
    """What is estimated, on which devices, and what is assumed."""

    config: str = flag(
        "Config, as for training: its file, or FILE:ARGUMENTS.", word=True, required=True
    )
    on: str = flag(
        "Devices: cpu, gpu or tpu for those that are here, or chips such as v5e:8x8 or h100:8.",
        required=True,
        metavar="DEVICES",
    )
    price: float | None = flag("Price of one chip for one hour, in any currency.", reads=number)
    utilisation: float | None = flag(
        f"Assumed share of the chips' bfloat16 peak; default: {command.UTILISATION}. A step never "
        "counts as faster than the roofline of its executable, where that is known.",
        reads=number,
    )
    batch: int | None = flag("Images per chip and step; default: the config's.")
    fsdp: int | None = flag("Number of devices that share the state; 0: all.")
    seconds: float = flag(
        "Seconds for which each step and each attack is measured; default: 3.", 3.0
    )
    robust: float = flag("Share of images that is assumed to be robust.", "0.5", reads=number)
    images: int | None = flag("Number of images of AutoAttack; 0: leave it out.")
    fast: bool = flag("Do not compile for TPUs that are not here.", False)
    json: bool = shared("json", False)


def main() -> None:
    """Read the command line and print what the run will cost."""
    words, changed = changes.divided(sys.argv[1:])
    flags = fields.read(
        EstimateFlags,
        __doc__,
        words,
        prog=arguments.program or "jaxrobust estimate",
        usage="%(prog)s CONFIG --on DEVICES [--config.key=value ...] [flags]",
        epilog="Any key of the config is set as for training: --config.train.epochs=20.",
    )

    def run(flags: EstimateFlags) -> dict[str, Any]:
        given = asdict(flags)
        del given["json"]
        return command.answer(command.Settings(changes=changed, **given), BEGUN)

    answer(run, flags, "nothing is lost; the same command begins again")


if __name__ == "__main__":
    from jaxrobust.runtime.processes.launch import keep_large_buffers, use_every_core

    keep_large_buffers()
    use_every_core()  # as AutoAttack and, where it can, training do
    main()
