"""Which files of a finished data set are checked, and against what."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxrobust.data.prepare import directory, shards
from jaxrobust.data.prepare.shards import Shard
from jaxrobust.data.splits.subsets import index_name


class Begun(NamedTuple):
    """A check: the data set, its shards to be read, what is wrong already, how many files it has.

    `damage` maps a file's name to what is wrong with it; where anything is, no shard is to be read.
    """

    folder: Path
    shards: list[Shard]
    damage: dict[str, str]
    files: int


def begun(out: str, name: str | None) -> Begun:
    """Find the one data set in a folder, and compare its small files with their sha256."""
    found = sorted(path.parent for path in Path(out).glob(f"{name or '*'}/*/{directory.SETTINGS}"))
    if len(found) != 1:
        names = ", ".join(str(path.relative_to(out)) for path in found) or "none"
        raise ValueError(
            f"{out} holds {names} of the data sets that this tool writes; "
            f"{'--name says which' if found else 'give the --out that it was written to'}"
        )
    folder = found[0]
    if not (folder / directory.INFO).exists():
        raise ValueError(f"{folder} is not finished; the command that began it continues")
    sums = directory.read_sums(folder)
    damage = {
        name: "is missing or has changed"
        for name, digest in sums.items()
        if ".array_record-" not in name
        and not ((folder / name).exists() and shards.sha256(folder / name) == digest)
    }
    return Begun(folder, [] if damage else _finished(folder, sums), damage, len(sums))


def _finished(folder: Path, sums: dict[str, str]) -> list[Shard]:
    """Return the shards of a finished directory, with the index of their split as the plan."""
    info = json.loads((folder / directory.INFO).read_text())
    found = []
    for split in info["splits"]:
        ends = np.cumsum([int(text) for text in split["shardLengths"]]).tolist()
        for i, (first, last) in enumerate(zip([0, *ends], ends, strict=False)):
            name = shards.file_name(info["name"], split["name"], i, len(ends))
            index = folder / index_name(split["name"])
            found.append(Shard(folder / name, index, folder, first, last, sums.get(name, "")))
    return found
