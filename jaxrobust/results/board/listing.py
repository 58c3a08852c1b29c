"""The bundles of a board, and the file that says which network each is of.

A bundle holds no network. The keeper of a board names them in a file of TOML, `networks.toml` of
the folder of bundles: `[FOLDER]`, and under it what `jaxrobust verify` is to be given.
"""

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxrobust.evaluation.bundles import claims
from jaxrobust.runtime.text.spelling import meant

NETWORKS = "networks.toml"
# What is said of a bundle: the first ones are flags of `jaxrobust verify`.
FLAGS = ("weights", "function", "dataset", "split", "classes", "data_dir", "frost")
WORDS = ("name", "data")  # of the network and of the data set, as the board is to write them
_FILES = (claims.ABOUT, claims.ROWS, claims.SUMS)  # of which a damaged bundle may lack two


class ListedBundle(NamedTuple):
    """A folder that is, or was, a bundle, and what was said of its network."""

    folder: Path
    given: dict[str, str]  # keys of `FLAGS` and `WORDS`; empty: nothing was said

    @property
    def flags(self) -> dict[str, str]:
        """Take what `jaxrobust verify` is given."""
        return {key: self.given[key] for key in FLAGS if key in self.given}


def find(paths: Sequence[Path], networks: Path | None = None) -> list[ListedBundle]:
    """List the bundles of folders, each a bundle or a folder of several, in the given order.

    Args:
      networks: file of networks for all of them; None: `networks.toml` next to each bundle.
    Raises:
      ValueError: a folder is not there or holds no bundle, or a file of networks is not valid.
    """
    explicit = None if networks is None else read(networks)
    listed: dict[Path, ListedBundle] = {}
    for path in paths:
        if not path.is_dir():
            raise ValueError(f"{path} is not a folder; name bundles, or a folder of several")
        bundles = [path]
        if not _is_bundle(path):  # those in it, without those that are being written
            inside = (p for p in path.iterdir() if p.name[0] != "." and _is_bundle(p))
            bundles = sorted(inside)
        if not bundles:
            raise ValueError(
                f"{path} holds no bundle; name folders that `jaxrobust evaluate --bundle` wrote, "
                "or a folder of several"
            )
        for folder in bundles:
            networks_file = folder.resolve().parent / NETWORKS
            networks_of = (
                read(networks_file)
                if explicit is None and networks_file.is_file()
                else explicit or {}
            )
            facts = networks_of.get(str(folder)) or networks_of.get(folder.resolve().name) or {}
            listed.setdefault(folder.resolve(), ListedBundle(folder, facts))
    return list(listed.values())


def _is_bundle(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _FILES)


def read(path: Path) -> dict[str, dict[str, str]]:
    """Read a file of networks, by the folders of bundles that its sections name."""
    try:
        networks: dict[str, Any] = tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{path} is not there; name a file of networks") from None
    except ValueError as error:
        raise ValueError(f"{path} is not TOML ({error}); correct it") from error
    for folder, values in networks.items():
        if not isinstance(values, dict):
            raise ValueError(f"{path}: {folder} is not a section; write [FOLDER] of the bundle")
        for key, value in values.items():
            if key not in (*FLAGS, *WORDS):
                near = meant(key, (*FLAGS, *WORDS))
                raise ValueError(f"{path}: [{folder}] has {key}; {near}")
            if not isinstance(value, str):
                raise ValueError(f"{path}: {key} of [{folder}] is {value!r}; write a text")
        if {"weights", "function"} <= values.keys():
            raise ValueError(
                f"{path}: [{folder}] names two networks; leave weights or function out"
            )
        if not {"weights", "function"} & values.keys():
            raise ValueError(f"{path}: [{folder}] names no network; give it weights or function")
    return networks
