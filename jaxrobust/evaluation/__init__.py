"""Robust accuracy: AutoAttack, its engine, its ledger and its checks."""

from typing import TYPE_CHECKING, Any

from jaxrobust.runtime import rooms

if TYPE_CHECKING:
    from jaxrobust.evaluation.engine.autoattack import AutoAttackResult, autoattack
    from jaxrobust.evaluation.engine.outcome import Cost
    from jaxrobust.evaluation.network.images import ImageSet
    from jaxrobust.evaluation.records.verdicts import Verdicts

_OF_ROOMS = rooms.entries("PUBLIC_EVALUATION")
__all__ = ["AutoAttackResult", "Cost", "ImageSet", "Verdicts", "autoattack", *_OF_ROOMS]
_PUBLIC = _OF_ROOMS | {  # imported when used: training needs no engine
    "AutoAttackResult": "jaxrobust.evaluation.engine.result:AutoAttackResult",
    "Cost": "jaxrobust.evaluation.engine.outcome:Cost",
    "ImageSet": "jaxrobust.evaluation.network.images:ImageSet",
    "Verdicts": "jaxrobust.evaluation.records.verdicts:Verdicts",
    "autoattack": "jaxrobust.evaluation.engine.autoattack:autoattack",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name in _PUBLIC:
        return rooms.resolve(_PUBLIC[name])
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
