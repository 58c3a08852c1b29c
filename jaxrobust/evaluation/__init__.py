"""Robust accuracy: AutoAttack, its engine, its ledger and its checks."""

from typing import Any

from jaxrobust.evaluation.engine.autoattack import AutoAttackResult, autoattack
from jaxrobust.evaluation.engine.outcome import Cost
from jaxrobust.evaluation.network.images import ImageSet
from jaxrobust.evaluation.records.verdicts import Verdicts
from jaxrobust.runtime import rooms

_PUBLIC = rooms.entries("PUBLIC_EVALUATION")
__all__ = ["AutoAttackResult", "Cost", "ImageSet", "Verdicts", "autoattack", *_PUBLIC]


def __getattr__(name: str) -> Any:
    """Import a public name of an optional package when it is first used."""
    if name in _PUBLIC:
        return rooms.resolve(_PUBLIC[name])
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
