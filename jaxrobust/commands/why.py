"""Show the sources of a config's values: a table, the authors' code, RobustBench or our own reason.

`jaxrobust why CONFIG` lists the keys with non-default values, `jaxrobust why CONFIG KEY` one key or
a section, with values and sources. The source of a key set by `--config.KEY=VALUE` is the command
line. "Ours" marks our own reasons, and "authors' code" values on which the paper is silent or
differs.

Exit codes: 0 done; 2 a mistake, with one sentence on stderr.
"""

import json
import shutil
import sys
from dataclasses import dataclass

from jaxrobust.commands.flags.shared import shared
from jaxrobust.doctor.estimate import changes
from jaxrobust.runtime.commandline import fields
from jaxrobust.runtime.commandline.arguments import ending
from jaxrobust.runtime.commandline.fields import flag
from jaxrobust.runtime.text import patience


@dataclass(frozen=True, kw_only=True)
class WhyFlags:
    """The config and the keys to explain."""

    config: str = flag("Config, such as configs/revisiting_at.py:vit_s.", word=True)
    key: str | None = flag("Key or section, such as train.lr or attack.", word=True, nargs="?")
    all: bool = flag("Also show keys with default values.", False)
    json: bool = shared("json", False)


def main() -> None:
    """Read the command line and print the keys."""
    words, changed = changes.divided(sys.argv[1:])
    flags = fields.read(
        WhyFlags,
        __doc__,
        words,
        usage="%(prog)s CONFIG [KEY] [--config.key=value ...] [flags]",
    )
    config = changes.configured(flags.config, changed)
    with patience.of(patience.LOADING):
        from jaxrobust.results import key_sources

    names = [word.partition("=")[0].lstrip("-").partition(".")[2] for word in changed]
    with ending("run the same command to start again"):
        sources = key_sources.of_recipe(flags.config)
        keys = key_sources.of_config(config, sources, [name for name in names if name])
        keys = key_sources.chosen(keys, flags.key, flags.all)
    if flags.json:
        return print(json.dumps({key.name: key._asdict() for key in keys}))
    print(key_sources.text(keys, shutil.get_terminal_size((100, 24)).columns))
