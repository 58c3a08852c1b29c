"""`jaxrobust doctor (RUN | WEIGHTS | my_net.py:logits_fn | --config FILE) ...`.

Checks a network, with the flags of jaxrobust evaluate, or a config, with its --config.key=value,
for common problems; for a run, it checks both. Prints one line per check: green, yellow or red,
with cause, remedy and paper. It takes a minute or two, attacks a hundred images with ten steps of
PGD, and writes only the compilation cache.

Exit codes: 0 nothing is red; 1 something is; 2 a mistake in the command or the data, with one
sentence on stderr; 3 another reason, which is printed (network, disk); 130 interrupted.
"""

import json
import os
import shutil
import sys
from dataclasses import asdict, dataclass

from absl import flags
from ml_collections import config_flags

from jaxrobust.commands.flags.shared import SubjectFlags, shared
from jaxrobust.doctor.findings import RED, Finding, line
from jaxrobust.runtime.commandline import arguments, fields
from jaxrobust.runtime.commandline.fields import flag
from jaxrobust.runtime.text import patience, terminal
from jaxrobust.runtime.threats import NORMS


@dataclass(frozen=True, kw_only=True)
class DoctorFlags(SubjectFlags):
    """The network to examine in addition to a config."""

    epsilon: float | None = shared(
        "epsilon", default="from the run, or 8/255, 0.5 or 12 depending on the norm"
    )
    n: int = flag("Number of images, drawn from the whole split; from 32 to 1000.", 200)
    seed: int = shared("seed", 0)
    devices: int | None = flag(
        "Number of devices to train a config on; default: all of this machine's.", least=1
    )
    json: bool = flag("Whether to print one JSON object instead.", False)


_CONFIG = config_flags.DEFINE_config_file("config", None, arguments.CONFIG_HELP, lock_config=True)
fields.define(DoctorFlags)


def main(argv: list[str]) -> None:
    """Read the flags, run the checks, and exit with 1 if something is red."""
    if len(argv) > 2:
        arguments.stop(f"unexpected argument {argv[2]!r}; name one run, weights or function", 2)
    arguments.quiet_libraries()
    again = "run the same command to start again"
    with arguments.ending(again, ". Once this is fixed, run the same command again"):
        values = asdict(fields.given(DoctorFlags))
        devices, as_json = values.pop("devices"), values.pop("json")
        if not 32 <= values["n"] <= 1000:
            raise ValueError(f"--n={values['n']} must be between 32 and 1000; omit it to use 200")
        if values["norm"] not in (None, *NORMS):
            names = ", ".join(NORMS)
            raise ValueError(f"--norm={values['norm']} is unknown; choose one of {names}")
        name = None
        if _CONFIG.value is not None:
            name = arguments.config_name(config_flags.get_config_filename(flags.FLAGS["config"]))
        with patience.of(patience.LOADING):
            from jaxrobust.doctor import command  # after the flags: --help needs no JAX

        on_terminal = sys.stdout.isatty()
        columns = shutil.get_terminal_size().columns if on_terminal else None
        coloured = on_terminal and not os.environ.get("NO_COLOR")  # https://no-color.org

        def tell(text: Finding | str) -> None:
            if not as_json:
                if isinstance(text, Finding):
                    text = line(text, coloured=coloured, columns=columns)
                else:
                    text = terminal.fitted(text, columns)
                print(text, flush=True)

        place = argv[1] if len(argv) == 2 else None
        config = {"config": _CONFIG.value, "config_name": name, "devices": devices}
        examinations = command.answer(values, place, **config, tell=tell)
        red = any(f.result.level == RED for one in examinations for f in one.findings)
        if as_json:
            rows = [
                {"of": one.of, "findings": [f.plain() for f in one.findings]}
                for one in examinations
            ]
            print(json.dumps({"red": red, "examined": rows}), flush=True)
    sys.exit(int(red))


if __name__ == "__main__":
    usual = "config dataset split norm epsilon n json"
    arguments.run(main, __doc__, usual=usual, hint="--help-all lists the flags")
