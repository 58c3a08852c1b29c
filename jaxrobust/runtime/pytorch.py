"""Modules of PyTorch as the core sees them: their names, and the folder that holds their programs.

All that computes with them is in `jaxrobust.pytorch`, which is imported when such a name is used.
"""

from pathlib import Path
from typing import Any

from jaxrobust.runtime import rooms

PREFIX, TIMM = "torch:", "timm/"  # of names: torch:my_nets.py:build and torch:timm/NAME
FOLDER, PROGRAMS = "torch_program", "programs.json"  # of a run, and what is written there last


def is_name(name: str) -> bool:
    """Tell whether a name is that of a module of PyTorch's."""
    return name.startswith(PREFIX)


def has_programs(folder: Path) -> bool:
    """Tell whether a folder holds a module's programs, all of them."""
    return (folder / PROGRAMS).is_file()


def find(task: str) -> Any:
    """Import what does a task for the core: a row of `TORCH` in `jaxrobust/pytorch/names.py`."""
    return rooms.resolve(rooms.entries("TORCH")[task])
