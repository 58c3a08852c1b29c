"""Weights from timm and from RobustBench's files, and back: the public names of conversion."""

from jaxrobust.weights.convert import from_torch, to_torch

__all__ = ["from_torch", "to_torch"]
