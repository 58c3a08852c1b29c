"""Robust accuracy: AutoAttack, its engine, its ledger and its checks."""

from jaxrobust.evaluation.engine.autoattack import AutoAttackResult, autoattack
from jaxrobust.evaluation.engine.outcome import Cost
from jaxrobust.evaluation.network.images import ImageSet
from jaxrobust.evaluation.questions.worst_case import WorstCaseResult, worst_case
from jaxrobust.evaluation.records.verdicts import Verdicts

__all__ = ["AutoAttackResult", "Cost", "ImageSet", "Verdicts", "WorstCaseResult"]
__all__ += ["autoattack", "worst_case"]
