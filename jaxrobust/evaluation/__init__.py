"""Robust accuracy: AutoAttack, its engine, its ledger and its checks."""

from jaxrobust.evaluation.autoattack import AutoAttackResult, Cost, autoattack

__all__ = ["AutoAttackResult", "Cost", "autoattack"]
