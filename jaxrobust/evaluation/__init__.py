"""Robust accuracy: AutoAttack, its engine, its ledger and its checks."""

from jaxrobust.evaluation.autoattack import AutoAttackResult, autoattack
from jaxrobust.evaluation.cascade import Cost
from jaxrobust.evaluation.images import ImageSet
from jaxrobust.evaluation.verdicts import Verdicts
from jaxrobust.evaluation.worst_case import WorstCaseResult, worst_case

__all__ = [
    "AutoAttackResult",
    "Cost",
    "ImageSet",
    "Verdicts",
    "WorstCaseResult",
    "autoattack",
    "worst_case",
]
