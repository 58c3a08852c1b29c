"""The optional rooms: the core finds what they add by name and never imports them.

A room's `names.py` holds plain dicts, one per registry of the core, from a name to "module:OBJECT"
or "module"; a command's row also holds its help.
"""

import importlib
from typing import Any

ROOMS = ("zoo", "pytorch", "papers")


def entries(registry: str) -> dict[str, Any]:
    """Collect the rows that optional rooms add to a registry, without importing the rest of them.

    Raises:
      ValueError: two rooms use the same name.
    """
    merged: dict[str, Any] = {}
    for room in ROOMS:
        rows = getattr(optional(f"jaxrobust.{room}.names"), registry, {})
        if twice := sorted(merged.keys() & rows.keys()):
            raise ValueError(f"{registry}: jaxrobust/{room}/names.py repeats {', '.join(twice)}")
        merged |= rows
    return merged


def optional(module: str) -> Any:
    """Import a module that the wheel `jaxrobust-attacks` leaves out; None if it is missing."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if f"{module}.".startswith(f"{error.name}."):
            return None
        raise  # the module is there, but not what it imports


def resolve(entry: str) -> Any:
    """Import an entry's object, "module:OBJECT", or its module.

    Raises:
      ValueError: no such module or object.

    >>> resolve("math:sqrt")(9.0)
    3.0
    """
    module, _, name = entry.partition(":")
    try:
        imported = importlib.import_module(module)
        return getattr(imported, name) if name else imported
    except (ImportError, AttributeError) as error:
        raise ValueError(f"registry entry {entry!r} cannot be imported: {error}") from error
