"""Attacks as pure functions over a `logits_fn`."""

from jaxrobust.attacks.apgd import (
    ApgdState,
    MultiRadiusState,
    apgd,
    apgd_machine,
    apgd_multi_radius_machine,
    apgd_run,
)
from jaxrobust.attacks.balls import BALLS
from jaxrobust.attacks.fab import FabState, fab_machine, fab_run, project_onto_hyperplane
from jaxrobust.attacks.losses import (
    LOSSES,
    ce_loss,
    cw_loss,
    dlr_loss,
    kl_loss,
    targeted_dlr_loss,
)
from jaxrobust.attacks.machine import image_keys, run
from jaxrobust.attacks.pgd import PgdState, fgsm, pgd, pgd_machine
from jaxrobust.attacks.square import SquareState, square_machine, square_run

__all__ = [
    "BALLS",
    "LOSSES",
    "ApgdState",
    "FabState",
    "MultiRadiusState",
    "PgdState",
    "SquareState",
    "apgd",
    "apgd_machine",
    "apgd_multi_radius_machine",
    "apgd_run",
    "ce_loss",
    "cw_loss",
    "dlr_loss",
    "fab_machine",
    "fab_run",
    "fgsm",
    "image_keys",
    "kl_loss",
    "pgd",
    "pgd_machine",
    "project_onto_hyperplane",
    "run",
    "square_machine",
    "square_run",
    "targeted_dlr_loss",
]
