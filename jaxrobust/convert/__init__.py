"""Weights from timm and from RobustBench's files, and back.

`from_torch` and `to_torch` convert names and layouts of arrays; the modules import, export and
compare whole networks: `import_torch`, `export_torch`, `certificate`.
"""

from typing import Any

__all__ = ["from_torch", "to_torch"]


def __getattr__(name: str) -> Any:
    """Import what converts when it is first used: a command says something before that."""
    if name not in __all__:
        raise AttributeError(f"module 'jaxrobust.convert' has no attribute {name!r}")
    from jaxrobust.weights.naming import convert

    return getattr(convert, name)
