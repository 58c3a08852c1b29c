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

__all__ = [
    "BALLS",
    "LOSSES",
    "ApgdState",
    "MultiRadiusState",
    "PgdState",
    "apgd",
    "apgd_machine",
    "apgd_multi_radius_machine",
    "apgd_run",
    "ce_loss",
    "cw_loss",
    "dlr_loss",
    "fgsm",
    "image_keys",
    "kl_loss",
    "pgd",
    "pgd_machine",
    "run",
    "targeted_dlr_loss",
]
