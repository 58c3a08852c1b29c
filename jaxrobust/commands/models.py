"""`jaxrobust models [--json | --parameters] [NAME ...]`: the table of architectures.

Exit codes: 0 done; 2 a mistake in the command, with one sentence on stderr.
"""

import json
import os
import shutil
from dataclasses import dataclass

from jaxrobust.runtime.commandline import fields
from jaxrobust.runtime.commandline.arguments import ending
from jaxrobust.runtime.commandline.fields import flag
from jaxrobust.runtime.text import patience


@dataclass(frozen=True, kw_only=True)
class ModelsFlags:
    """The networks to show, and the format."""

    names: tuple[str, ...] = flag(
        "Networks; default: all.", (), word=True, nargs="*", metavar="NAME"
    )
    json: bool = flag("Print one JSON object instead.", False)
    parameters: bool = flag("Print the parameters of each network as a table.", False)


def main() -> None:
    """Print the table, or the parameters of networks."""
    flags = fields.read(ModelsFlags, __doc__)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing runs, so do not occupy an accelerator
    with patience.of(patience.LOADING):
        from jaxrobust import models
        from jaxrobust.models import table

    with ending("run the same command to start again"):
        names = [models.known(name) for name in flags.names] or models.available()
    if flags.parameters:
        for name in names:
            print(f"{name}\n{table.parameters(name)}\n")
        return
    width, rows = shutil.get_terminal_size((100, 24)).columns, [*map(table.architecture, names)]
    if flags.json:
        print(json.dumps({"architectures": [table.record(row) for row in rows]}))
        return
    print("\n".join([table.HEAD, *(table.line(row, width) for row in rows)]))
    print(table.checkpoints(rows) if flags.names else table.NOTES)
