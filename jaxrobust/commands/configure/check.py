"""List everything wrong with a config at once, in seconds: `jaxrobust check CONFIG`.

After the mistakes, it lists the warnings of training, the findings of the doctor, the memory that a
step needs and, if nothing is refused, an estimate of the training time on this machine. Images are
opened and networks are traced; no network is compiled, trained or written. Data that is missing on
this machine is reported.

Exit codes: 0 nothing is refused; 1 something is; 2 a mistake in the command or no config, with one
sentence on stderr; 3 it stopped for another reason, which is printed.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from jaxrobust.commands.flags.shared import shared
from jaxrobust.doctor.estimate import changes
from jaxrobust.runtime.commandline import arguments, fields
from jaxrobust.runtime.commandline.fields import flag
from jaxrobust.runtime.text import patience
from jaxrobust.runtime.text.spelling import counted


@dataclass(frozen=True, kw_only=True)
class CheckFlags:
    """The config to check, and the devices."""

    config: str = flag("Config, such as configs/quickstart.py.", word=True)
    devices: int | None = flag(
        "Number of devices to train on; default: all of this machine's.", least=1
    )
    json: bool = shared("json", False)


def main() -> None:
    """Read the command line, check the config, and exit with 1 if something is refused."""
    arguments.quiet_libraries()
    words, changed = changes.divided(sys.argv[1:])
    usage = "%(prog)s CONFIG [--config.key=value ...] [flags]"
    flags = fields.read(CheckFlags, __doc__, words, usage=usage)
    config = changes.configured(flags.config, changed)
    with patience.of(patience.LOADING):
        import jax

        from jaxrobust.results.configs import refusals
        from jaxrobust.results.stages import checks

    again = "run the same command to start again"
    with arguments.ending(again), patience.of("checking the config"):
        review = refusals.review(config, flags.devices or jax.device_count())
        costs = [] if review.refused else checks.lines(config, (), Path("runs/check"))
    counts = [counted(len(review.refused), "refusal"), counted(len(review.warned), "warning")]
    print(f"{flags.config}: {', '.join(counts)}")
    for kind, lines in (("refused", review.refused), ("warning", review.warned)):
        for line in lines:
            print(f"{kind}  {line}")
    for line in review.memory:
        print(f"memory   {line}")
    for line in costs:
        print(f"time     {line}")
    if flags.json:
        print(json.dumps(review.plain()))
    sys.exit(1 if review.refused else 0)
