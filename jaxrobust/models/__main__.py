"""`python -m jaxrobust.models [--json | --parameters] [NAME ...]`: the table of architectures.

Exit codes: 0 done; 2 a mistake in the command, with one sentence on stderr.
"""

import contextlib
import json
import multiprocessing
import os
import shutil
from collections.abc import Iterator, Sequence

from jaxrobust.runtime import commandline
from jaxrobust.runtime.commandline import Arguments, stop


def main() -> None:
    """Print the table, line by line as the networks are counted."""
    parser = Arguments(__doc__, prog=commandline.program or "python -m jaxrobust.models")
    parser.add_argument("names", nargs="*", metavar="NAME", help="Networks; default: all.")
    parser.flag("json", action="store_true", help="Print one JSON object instead.")
    parser.flag("parameters", action="store_true", help="Print the table of their parameters.")
    flags = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing runs: an accelerator would only wait
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
    width, rows = shutil.get_terminal_size((100, 24)).columns, []
    with _mapped(table.architecture, names) as found:
        if flags.json:
            print(json.dumps({"architectures": [table.record(row) for row in found]}))
            return
        print(table.HEAD)
        for row in found:
            rows.append(row)
            print(table.line(row, width), flush=True)
    print(table.checkpoints(rows) if flags.names else table.NOTES)


@contextlib.contextmanager
def _mapped(function, names: Sequence[str]) -> Iterator[Iterator]:
    """Yield the values of a function in order, as they come; many are traced on all cores."""
    if len(names) < 10:
        yield map(function, names)
        return
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        yield pool.imap(function, names)


if __name__ == "__main__":
    main()
