"""Weights from timm and from RobustBench's files, and back.

`from_torch` and `to_torch` convert names and layouts of arrays; the modules import, export and
compare whole networks: `import_torch`, `export_torch`, `certificate`.
"""

from jaxrobust.weights.convert import from_torch, to_torch

__all__ = ["from_torch", "to_torch"]
