"""Attacks as pure functions over a `logits_fn`, and the machines that they are made of.

Of a network as a function of images f32[B, H, W, C] in [0, 1], here that of a plane,

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

Underneath, it is a machine that asks for points and is told logits and gradients:

>>> machine = attacks.pgd_machine(norm="linf", epsilon=8 / 255, steps=1)
>>> state = machine.init(images, labels)
>>> machine.query(state).shape, bool(machine.finished(state).any())
((3, 4, 4, 1), False)
>>> state = attacks.advance(machine, lambda points, draw: logits_fn(points), state).state
>>> bool(machine.finished(state).all())
True
"""

from typing import Any

from jaxrobust import moved
from jaxrobust.attacks.apgd import ApgdState as ApgdState
from jaxrobust.attacks.apgd import apgd as apgd
from jaxrobust.attacks.apgd import apgd_machine as apgd_machine
from jaxrobust.attacks.apgd import apgd_run as apgd_run
from jaxrobust.attacks.apgd_radii import MultiRadiusState as MultiRadiusState
from jaxrobust.attacks.apgd_radii import apgd_multi_radius_machine as apgd_multi_radius_machine
from jaxrobust.attacks.fab import FabState as FabState
from jaxrobust.attacks.fab import fab as fab
from jaxrobust.attacks.fab import fab_machine as fab_machine
from jaxrobust.attacks.fab import fab_run as fab_run
from jaxrobust.attacks.geometry.balls import GEOMETRIES as GEOMETRIES
from jaxrobust.attacks.geometry.hyperplanes import (
    project_onto_hyperplane as project_onto_hyperplane,
)
from jaxrobust.attacks.geometry.l1_rules import L1_RULES as L1_RULES
from jaxrobust.attacks.inputs import STARTS as STARTS
from jaxrobust.attacks.inputs import Noise as Noise
from jaxrobust.attacks.inputs import image_keys as image_keys
from jaxrobust.attacks.losses import LOSSES as LOSSES
from jaxrobust.attacks.losses import ce_loss as ce_loss
from jaxrobust.attacks.losses import cw_loss as cw_loss
from jaxrobust.attacks.losses import dlr_loss as dlr_loss
from jaxrobust.attacks.losses import kl_loss as kl_loss
from jaxrobust.attacks.losses import targeted_dlr_loss as targeted_dlr_loss
from jaxrobust.attacks.machine import TALLIES as TALLIES
from jaxrobust.attacks.machine import advance as advance
from jaxrobust.attacks.machine import run as run
from jaxrobust.attacks.mim import mim as mim
from jaxrobust.attacks.pgd import PgdState as PgdState
from jaxrobust.attacks.pgd import fgsm as fgsm
from jaxrobust.attacks.pgd import pgd as pgd
from jaxrobust.attacks.pgd import pgd_machine as pgd_machine
from jaxrobust.attacks.registry import MACHINES as MACHINES
from jaxrobust.attacks.registry import ROWS as ROWS
from jaxrobust.attacks.registry import Row as Row
from jaxrobust.attacks.registry import Setting as Setting
from jaxrobust.attacks.registry import passes as passes
from jaxrobust.attacks.square import SquareState as SquareState
from jaxrobust.attacks.square import square as square
from jaxrobust.attacks.square import square_machine as square_machine
from jaxrobust.attacks.square import square_run as square_run


def __getattr__(name: str) -> Any:
    """Look a name of before up."""
    return moved.attribute(__name__, name)
