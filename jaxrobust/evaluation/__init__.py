"""Robust accuracy: AutoAttack, its engine, its ledger and its checks."""

from jaxrobust.evaluation.autoattack import AutoAttackResult, autoattack
from jaxrobust.evaluation.cascade import Cost
from jaxrobust.evaluation.images import ImageSet
from jaxrobust.evaluation.verdicts import Verdicts

__all__ = ["AutoAttackResult", "Cost", "ImageSet", "Verdicts", "autoattack"]
