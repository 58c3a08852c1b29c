"""Output of the pages' shell cells: from running them or, without their data, from storage.

CIFAR-10 has to be downloaded, and a build downloads nothing. So the output of its cells is stored
in `docs/_kept`, with date and commit, and shown if the data set is missing. `python
tools/docs/build.py --keep` updates it on a machine with the data.
"""

import datetime
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
KEPT = ROOT / "docs" / "_kept" / "cifar10.json"
_WORD = "cifar10"  # in the cells that need it


class KeptOutput(NamedTuple):
    """The output of a cell, and its origin."""

    text: str
    commit: str
    day: str


def of_cell(cell: str) -> str:
    """Run a cell and return its output; without its data, return the stored output.

    Raises:
      CalledProcessError: a command fails; its message is on stderr.
      LookupError: its data is missing, and no output is stored for this cell.
    """
    if _WORD in cell and not is_here():
        return _repeated(cell)
    done = subprocess.run(["bash", "-ec", cell], capture_output=True, text=True)
    print(done.stderr, end="", file=sys.stderr)
    done.check_returncode()
    if _WORD in cell and (commit := os.environ.get("JAXROBUST_DOCS_KEEP")):
        keep(cell, done.stdout, commit)
    return done.stdout


def is_here() -> bool:
    """Tell whether CIFAR-10 is prepared on this machine."""
    folder = os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    return any(Path(folder).expanduser().glob(f"{_WORD}/*/dataset_info.json"))


def kept() -> dict[str, KeptOutput]:
    """Read the stored outputs by cell."""
    if not KEPT.is_file():
        return {}
    return {row.pop("cell"): KeptOutput(**row) for row in json.loads(KEPT.read_text())}


def keep(cell: str, text: str, commit: str) -> None:
    """Store the output of a cell, replacing earlier output.

    The commit is from the start of the build, because storing output changes the checkout.
    """
    now = datetime.datetime.now(datetime.UTC).date().isoformat()
    rows = kept() | {cell: KeptOutput(text, commit, now)}
    KEPT.parent.mkdir(exist_ok=True)
    made = [{"cell": name, **row._asdict()} for name, row in rows.items()]
    KEPT.write_text(json.dumps(made, indent=1) + "\n")


def _repeated(cell: str) -> str:
    row = kept().get(cell)
    if row is None:
        raise LookupError(
            "CIFAR-10 is missing, and no output of this cell is stored; run `jaxrobust prepare "
            "cifar10`, then `python tools/docs/build.py --keep`"
        )
    said = f"CIFAR-10 is not on the machine that made this page; printed on {row.day} by commit"
    return f"[{said} {row.commit[:10]}:]\n{row.text}"
