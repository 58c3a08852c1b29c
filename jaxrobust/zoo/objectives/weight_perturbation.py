"""Adversarial weight perturbation: minimize a loss at its worst nearby weights."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from jaxrobust.models.kernels.primitives import widened
from jaxrobust.training.update import objectives
from jaxrobust.types import Params

GAMMA = 5e-3  # of each layer's norm: the authors' choice, of TRADES too


def perturbed(params: Params, ascent: Params, gamma: float) -> Params:
    """Move each layer's weights along the loss gradient, by `gamma` times their norm.

    A layer with weights w and gradient g becomes w + gamma ||w|| g / ||g||. Biases, norms and other
    vectors do not change, nor do layers without a gradient.

    Args:
      params: float32 or float64, like `ascent`, the gradient of the minimized loss.
    Raises:
      ValueError: weights of lower precision, where rounding would remove most of the move.
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
        weights, slope = widened(array, ascent[name])
        size = jnp.linalg.norm(weights.ravel()) / (jnp.linalg.norm(slope.ravel()) + 1e-20)
        moved[name] = array + (gamma * size * slope).astype(array.dtype)
    return moved


def awp(gamma: float = GAMMA) -> Callable[[Params, Params], Params]:
    """Minimize an objective at perturbed weights (Wu et al. 2020, arXiv 2004.05884).

    As in their equations 7 to 10, with weights w, adversarial images x' of the network at w, and
    the objective's loss L, whose `displaced` this is,

        min over w of L(w + v, x'),  v_l = gamma ||w_l|| g_l / ||g_l||,  g = gradient of L(w, x'),

    for each layer l: one step of the inner maximization, like the authors. The gradient at w + v
    updates w; weight decay uses w, while the authors' uses w + v. Only the pass at w + v updates
    running statistics of batch norms. Each update costs one more pass forward and back, over the
    images that pass at once: those of all devices, and with microbatches each part separately.
    Parity: tests/zoo/objectives/test_weight_perturbation.py, 20 updates against PyTorch.
    """
    return lambda params, ascent: perturbed(params, ascent, gamma)


def _trades_awp(phase: Any, attack: Any) -> objectives.Objective:
    return objectives.named("trades").make(phase, attack)._replace(displaced=awp())


TRADES_AWP = objectives.named("trades")._replace(make=_trades_awp, displaces=True)
