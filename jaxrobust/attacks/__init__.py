"""Attacks as pure functions of a `logits_fn`, and the machines they are built from.

For a network that is a function of images f32[B, H, W, C] in [0, 1], here a linear one,

>>> import jax, jax.numpy as jnp
>>> from jaxrobust import attacks
>>> weights = jnp.array([[1.0, -1.0]])
>>> logits_fn = lambda images: images.mean((1, 2)) @ weights
>>> images, labels = jnp.full((3, 4, 4, 1), 0.5), jnp.array([0, 0, 1])

an attack is a function `(logits_fn, key, images, labels) -> images_adv`:

>>> attack = attacks.apgd(norm="linf", epsilon=8 / 255, steps=5)
>>> images_adv = attack(logits_fn, jax.random.key(0), images, labels)
>>> (images_adv - images)[:, 0, 0, 0].round(4).tolist()
[-0.03139999881386757, -0.03139999881386757, 0.03139999881386757]

Your own loss is a function of the network's outputs and of targets, for any task:

>>> total = lambda outputs, targets: (outputs * targets).sum(axis=1)
>>> attack = attacks.apgd(epsilon=8 / 255, steps=5, loss=total, info=True)
>>> images_adv, info = attack(logits_fn, None, images, jnp.ones((3, 2)))
>>> info.loss.shape, info.steps.tolist()
((3,), [6, 6, 6])

Underneath, an attack is a machine that asks for points and is told losses, scores, gradients:

>>> machine = attacks.pgd_machine(norm="linf", epsilon=8 / 255, steps=1)
>>> state = machine.init(images, labels)
>>> machine.query(state).shape, bool(machine.finished(state).any())
((3, 4, 4, 1), False)
>>> state = attacks.advance(machine, lambda points, draw: logits_fn(points), state).state
>>> bool(machine.finished(state).all())
True
"""

import importlib
from typing import Any

from jaxrobust.attacks.apgd import ApgdState, apgd, apgd_machine, apgd_run
from jaxrobust.attacks.apgd_radii import MultiRadiusState, apgd_multi_radius_machine
from jaxrobust.attacks.fab import FabState, fab, fab_machine, fab_run
from jaxrobust.attacks.geometry.balls import GEOMETRIES
from jaxrobust.attacks.geometry.hyperplanes import project_onto_hyperplane
from jaxrobust.attacks.geometry.l1_rules import L1_RULES
from jaxrobust.attacks.inputs import STARTS, Noise, image_keys
from jaxrobust.attacks.losses import (
    LOSSES,
    Goal,
    ce_loss,
    cw_loss,
    dlr_loss,
    kl_loss,
    targeted_dlr_loss,
)
from jaxrobust.attacks.machine import TALLIES, AttackInfo, advance, run
from jaxrobust.attacks.mim import mim as mim
from jaxrobust.attacks.pgd import PgdState, fgsm, pgd, pgd_machine
from jaxrobust.attacks.registry import MACHINES, ROWS, NamedAttack, Setting, passes
from jaxrobust.attacks.square import SquareState, square, square_machine, square_run

__all__ = ["GEOMETRIES", "L1_RULES", "LOSSES", "MACHINES", "ROWS", "STARTS", "TALLIES"]
__all__ += ["ApgdState", "FabState", "MultiRadiusState"]
__all__ += ["NearestState", "PgdState", "SparsePgdState", "SparseRsState", "SquareState"]
__all__ += ["AttackInfo", "Goal", "NamedAttack", "Noise", "Setting"]
__all__ += ["advance", "image_keys", "passes", "run"]
__all__ += ["apgd", "apgd_machine", "apgd_multi_radius_machine", "apgd_run"]
__all__ += ["ddn", "ddn_machine", "ddn_run", "fmn", "fmn_machine", "fmn_run"]
__all__ += ["fab", "fab_machine", "fab_run", "fgsm", "pgd", "pgd_machine"]
__all__ += ["project_onto_hyperplane", "sparse_pgd", "sparse_pgd_machine"]
__all__ += ["sparse_rs", "sparse_rs_machine", "square", "square_machine", "square_run"]
__all__ += ["ce_loss", "cw_loss", "dlr_loss", "kl_loss", "targeted_dlr_loss"]

# Attacks that training never needs are imported at their first use.
_LAZY = {
    "minimum_norm.ddn": "ddn ddn_machine ddn_run",
    "minimum_norm.fmn": "fmn fmn_machine fmn_run",
    "minimum_norm.nearest": "NearestState",
    "sparse.sparse_pgd": "SparsePgdState sparse_pgd sparse_pgd_machine",
    "sparse.sparse_rs": "SparseRsState sparse_rs sparse_rs_machine",
}


def __getattr__(name: str) -> Any:
    """Import an attack at its first use."""
    for module, names in _LAZY.items():
        if name in names.split():
            return getattr(importlib.import_module(f"jaxrobust.attacks.{module}"), name)
    raise AttributeError(f"module 'jaxrobust.attacks' has no attribute {name!r}")
