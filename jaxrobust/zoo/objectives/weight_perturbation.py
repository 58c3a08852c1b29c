"""Adversarial weight perturbation: a loss is minimised where weights that move make it worst."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from jaxrobust.models.kernels.primitives import widened
from jaxrobust.training.update import objectives
from jaxrobust.types import Params

GAMMA = 5e-3  # of each layer's norm: the authors' choice, of TRADES too


def perturbed(params: Params, ascent: Params, gamma: float) -> Params:
    """Move each layer's weights along the gradient of its loss, by `gamma` times their norm.

    Of layer l with the weights w and the gradient g that is w + gamma ||w|| g / ||g||. Biases,
    norms and other vectors stay, and so does a layer without a gradient.

    Args:
      params: float32 or float64, as `ascent`, the gradient of what is minimised.
    Raises:
      ValueError: weights of fewer digits, which would round most of the move away.
    """
    moved = dict(params)
    for name, array in params.items():
        if array.ndim < 2 or not name.endswith(("kernel", "weight")):
            continue
        if array.dtype not in (jnp.float32, jnp.float64):
            raise ValueError(
                f"a weight perturbation of {gamma:.2%} is mostly rounded away in {array.dtype}; "
                "set model.dtype=float32"
            )
        own, slope = widened(array, ascent[name])
        size = jnp.linalg.norm(own.ravel()) / (jnp.linalg.norm(slope.ravel()) + 1e-20)
        moved[name] = array + (gamma * size * slope).astype(array.dtype)
    return moved


def awp(gamma: float = GAMMA) -> Callable[[Params, Params], Params]:
    """Let an objective be minimised at perturbed weights (Wu et al. 2020, arXiv 2004.05884).

    As in their equations 7 to 10, with weights w, attacked images x' of the network itself and L
    the loss of the objective, whose `displaced` this is,

        min over w of L(w + v, x'),  v_l = gamma ||w_l|| g_l / ||g_l||,  g = gradient of L(w, x'),

    for each layer l: one step of the inner maximisation, as the authors have it. The gradient at
    w + v moves w; weight decay is of w, while the authors' is of w + v. Running statistics of batch
    norms are moved by the pass at w + v alone. Each update costs one more pass forward and back, of
    the images that pass at once: of all devices, and with microbatches of each part by itself.
    Parity: tests/zoo/objectives/test_weight_perturbation.py, 20 updates against PyTorch.
    """
    return lambda params, ascent: perturbed(params, ascent, gamma)


def _trades_awp(phase: Any, attack: Any) -> objectives.Objective:
    return objectives.named("trades").make(phase, attack)._replace(displaced=awp())


TRADES_AWP = objectives.named("trades")._replace(make=_trades_awp, displaces=True)
