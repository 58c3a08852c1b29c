"""Say all that is wrong with a config at once, in seconds: `jaxrobust check CONFIG`.

Training ends with the first mistake; this lists every one, then what it would warn of and what the
doctor finds, and what a step takes of the memory. Images are opened and networks are traced;
nothing is compiled, trained or written. A config of another machine's data names what is missing.

Exit codes: 0 nothing is refused; 1 something is; 2 a mistake in the command or no config, with one
sentence on stderr; 3 it stopped for another reason that it names.
"""

import json
import sys
from dataclasses import dataclass

from jaxrobust.commands.flags.shared import shared
from jaxrobust.doctor.estimate import changes
from jaxrobust.runtime.commandline import arguments, fields
from jaxrobust.runtime.commandline.fields import flag
from jaxrobust.runtime.text import patience
from jaxrobust.runtime.text.spelling import counted


@dataclass(frozen=True, kw_only=True)
class CheckFlags:
    """Which config is looked through, and for what."""

    config: str = flag("Config, such as configs/quickstart.py.", word=True)
    devices: int | None = flag(
        "Number of devices that it is to train on; default: those that are here.", least=1
    )
    json: bool = shared("json", False)


def main() -> None:
    """Read the command line, look, and exit with 1 if something is refused."""
    arguments.quiet_libraries()
    words, changed = changes.divided(sys.argv[1:])
    usage = "%(prog)s CONFIG [--config.key=value ...] [flags]"
    flags = fields.read(CheckFlags, __doc__, words, usage=usage)
    with patience.of(patience.LOADING):
        import jax

        from jaxrobust.results.configs import refusals

    config = changes.configured(flags.config, changed)
    with arguments.ending("the same command starts again"), patience.of("looking at the config"):
        review = refusals.review(config, flags.devices or jax.device_count())
    counts = [counted(len(review.refused), "refusal"), counted(len(review.warned), "warning")]
    print(f"{flags.config}: {', '.join(counts)}")
    for kind, lines in (("refused", review.refused), ("warning", review.warned)):
        for line in lines:
            print(f"{kind}  {line}")
    for line in review.memory:
        print(f"memory   {line}")
    if flags.json:
        print(json.dumps(review.plain()))
    sys.exit(1 if review.refused else 0)
