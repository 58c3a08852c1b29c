"""The core's knowledge of PyTorch networks: their names, and where a run stores their programs.

`jaxrobust.pytorch` runs them; it is imported when such a name is used.
"""

from pathlib import Path
from typing import Any

from jaxrobust.runtime import rooms

PREFIX, TIMM = "torch:", "timm/"  # prefixes of names: torch:my_nets.py:build and torch:timm/NAME
FOLDER, PROGRAMS = "torch_program", "programs.json"  # in a run; the file written last


def is_name(name: str) -> bool:
    """Return True for the name of a PyTorch network, such as `torch:my_nets.py:build`."""
    return name.startswith(PREFIX)


def has_programs(folder: Path) -> bool:
    """Return True if a folder holds both programs of a PyTorch network."""
    return (folder / PROGRAMS).is_file()


def find(task: str) -> Any:
    """Import the function for a task, which is a key of `TORCH` in `jaxrobust/pytorch/names.py`."""
    return rooms.resolve(rooms.entries("TORCH")[task])
