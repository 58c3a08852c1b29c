"""Robust accuracy: AutoAttack, its engine, its ledger and its checks."""

from jaxrobust.evaluation.autoattack import AutoAttackResult, autoattack
from jaxrobust.evaluation.cascade import Cost

__all__ = ["AutoAttackResult", "Cost", "autoattack"]
