"""The steps in a checkpoint directory, without Orbax, whose import takes a second."""

import re
from pathlib import Path
from typing import Any

from jaxrobust.runtime.files import buckets

MARKER = "commit_success.txt"  # Orbax's, in each complete step in a bucket
UNFINISHED = ".orbax-checkpoint-tmp"  # suffix of a folder on disk, of a note in a bucket


def place_of(directory: Path) -> Any:
    """Return the absolute path of checkpoints, in the bucket if the directory follows one."""
    if not isinstance(directory, Path):
        return directory
    if address := buckets.address(directory):
        from etils import epath

        return epath.Path(address)
    return directory.absolute()  # Orbax refuses relative ones


def steps(directory: Path) -> list[int]:
    """List the steps in a checkpoint directory, in order, without unfinished ones."""
    place = place_of(directory)
    names = {path.name for path in place.glob("*")}
    numbers = [name for name in names if re.fullmatch("0|[1-9][0-9]*", name)]
    return sorted(
        int(name)
        for name in numbers
        if (place / name).is_dir()
        and (name + UNFINISHED not in names or (place / name / MARKER).exists())
    )
