"""What the shell cells of pages print: they are run, and where their data is missing, repeated.

CIFAR-10 is on no machine that has not downloaded it, and a build downloads nothing. So what its
cells printed is kept in `docs/_kept`, with when and from which code that was, and shown where the
data set is not there. `python tools/docs/build.py --keep` rewrites that where the data is.
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
    """What a cell printed, and who was asked."""

    text: str
    commit: str
    day: str


def of_cell(cell: str) -> str:
    """Run a cell, and return what it prints; without its data, return what it printed once.

    Raises:
      CalledProcessError: a command fails; its words are on stderr.
      LookupError: its data is missing, and nothing is kept of this cell.
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
    """Look for CIFAR-10 among the data sets that are prepared on this machine."""
    folder = os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    return any(Path(folder).expanduser().glob(f"{_WORD}/*/dataset_info.json"))


def kept() -> dict[str, KeptOutput]:
    """Read what is kept, by cell."""
    if not KEPT.is_file():
        return {}
    return {row.pop("cell"): KeptOutput(**row) for row in json.loads(KEPT.read_text())}


def keep(cell: str, text: str, commit: str) -> None:
    """Keep what a cell printed just now, in the place of what it or another state printed.

    The commit is that of the build's beginning: what is kept changes the checkout.
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
            "CIFAR-10 is not here, and nothing is kept of this cell; run `jaxrobust prepare "
            "cifar10`, then `python tools/docs/build.py --keep`"
        )
    said = f"CIFAR-10 is not on the machine that made this page; printed on {row.day} by commit"
    return f"[{said} {row.commit[:10]}:]\n{row.text}"
