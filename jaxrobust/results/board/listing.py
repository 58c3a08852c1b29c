"""The bundles of a board, and the file that names the network of each.

A bundle holds no network. The maintainer of a board lists them in a TOML file, `networks.toml` in
the folder of bundles: a section `[FOLDER]` holds the arguments for `jaxrobust verify`.
"""

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxrobust.evaluation.bundles import claims
from jaxrobust.runtime.text.spelling import meant

NETWORKS = "networks.toml"
# The keys of a bundle's section; these are flags of `jaxrobust verify`.
FLAGS = ("weights", "function", "dataset", "split", "classes", "data_dir", "frost")
WORDS = ("name", "data")  # display names of the network and the data set on the board
_FILES = (claims.ABOUT, claims.ROWS, claims.SUMS)  # a damaged bundle may lack two of them


class ListedBundle(NamedTuple):
    """A folder with a bundle, perhaps damaged, and the section about its network."""

    folder: Path
    given: dict[str, str]  # keys of `FLAGS` and `WORDS`; empty: there is no section

    @property
    def flags(self) -> dict[str, str]:
        """The flags for `jaxrobust verify`."""
        return {key: self.given[key] for key in FLAGS if key in self.given}


def find(paths: Sequence[Path], networks: Path | None = None) -> list[ListedBundle]:
    """List the bundles at `paths`, each a bundle or a folder of several, in this order.

    Args:
      networks: file of networks for all of them; None: `networks.toml` next to each bundle.
    Raises:
      ValueError: a folder is missing or holds no bundle, or a file of networks is invalid.
    """
    explicit = None if networks is None else read(networks)
    listed: dict[Path, ListedBundle] = {}
    for path in paths:
        if not path.is_dir():
            raise ValueError(f"{path} is not a folder; name bundles, or a folder of bundles")
        bundles = [path]
        if not _is_bundle(path):  # the bundles in it, except any being written
            inside = (p for p in path.iterdir() if p.name[0] != "." and _is_bundle(p))
            bundles = sorted(inside)
        if not bundles:
            raise ValueError(
                f"{path} holds no bundle; name folders that `jaxrobust evaluate --bundle` wrote, "
                "or a folder of bundles"
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
    """Read a file of networks; its sections are named after bundle folders."""
    try:
        networks: dict[str, Any] = tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; name a file of networks") from None
    except ValueError as error:
        raise ValueError(f"{path} is not TOML ({error}); correct it") from error
    for folder, values in networks.items():
        if not isinstance(values, dict):
            raise ValueError(
                f"{path}: {folder} is not a section; write [FOLDER], the folder of the bundle"
            )
        for key, value in values.items():
            if key not in (*FLAGS, *WORDS):
                near = meant(key, (*FLAGS, *WORDS))
                raise ValueError(f"{path}: [{folder}] has {key}; {near}")
            if not isinstance(value, str):
                raise ValueError(f"{path}: {key} of [{folder}] is {value!r}; write a string")
        if {"weights", "function"} <= values.keys():
            raise ValueError(
                f"{path}: [{folder}] names two networks; leave weights or function out"
            )
        if not {"weights", "function"} & values.keys():
            raise ValueError(f"{path}: [{folder}] names no network; give it weights or function")
    return networks
