"""`python -m jaxrobust.models [--json | --parameters] [NAME ...]`: the table of architectures.

Exit codes: 0 done; 2 a mistake in the command, with one sentence on stderr.
"""

import json
import os
import shutil

from jaxrobust.runtime.commandline import arguments
from jaxrobust.runtime.commandline.arguments import Arguments, stop
from jaxrobust.runtime.text import patience


def main() -> None:
    """Print the table, or the parameters of networks."""
    parser = Arguments(__doc__, prog=arguments.program or "python -m jaxrobust.models")
    parser.add_argument("names", nargs="*", metavar="NAME", help="Networks; default: all.")
    parser.flag("json", action="store_true", help="Print one JSON object instead.")
    parser.flag("parameters", action="store_true", help="Print the table of their parameters.")
    flags = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing runs: an accelerator would only wait
    with patience.of(patience.LOADING):
        from jaxrobust import models
        from jaxrobust.models import table

    try:
        names = [models.known(name) for name in flags.names] or models.available()
    except ValueError as error:
        stop(error, 2)
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


if __name__ == "__main__":
    main()
