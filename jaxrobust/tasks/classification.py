"""One class for each image: the task that AutoAttack is for."""

from jaxrobust.attacks import Goal
from jaxrobust.attacks.losses import goal_of
from jaxrobust.tasks.task import Task


def classification() -> Task:
    """Make the task of logits f[B, K] and labels i32[B], which is also that of `task=None`."""
    goal: Goal = goal_of("ce")
    return Task("classification", goal)
