"""The optimizers of the published recipes: AdamW, SGD, weight-decay masks, clipping."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxrobust.config import PhaseSection
from jaxrobust.training.update import schedules
from jaxrobust.training.update.value_checks import must_be, one_of
from jaxrobust.types import Array, Params

# Which parameters decay, by name and shape; the references have one rule per group of networks.
# They test timm's names; ours agree in everything that the tests look at.
DECAY_MASKS = {
    # All but biases and `bn*`; LN scales, layer scale and `downsample.1` ARE decayed.
    "not-bias": lambda name, array: not name.endswith(".bias") and "bn" not in name,
    # Matrices; position embedding and class token ARE decayed.
    "matrices": lambda name, array: array.ndim > 1 and not name.endswith(".bias"),
    # Matrices except these two; XCiT's temperature, of shape (heads, 1, 1), IS decayed.
    "matrices-not-tokens": lambda name, array: (
        array.ndim > 1 and not name.endswith(".bias") and name not in ("cls_token", "pos_embed")
    ),
    # Everything, as in PyTorch without parameter groups, including biases and norm scales.
    "all": lambda name, array: True,
    # Everything not named so: a last batch norm called `norm1`, and biases, ARE decayed.
    "not-bn-named": lambda name, array: "bn" not in name and "batchnorm" not in name,
}


def adamw(
    schedule: optax.Schedule, *, weight_decay: float, decay_mask: str, b2: float = 0.95
) -> optax.GradientTransformationExtraArgs:
    """Build AdamW with betas (0.9, b2), eps 1e-8, decoupled decay, no clipping, as in the paper."""
    mask = _mask(decay_mask)
    return optax.adamw(schedule, b1=0.9, b2=b2, eps=1e-8, weight_decay=weight_decay, mask=mask)


def sgd(
    schedule: optax.Schedule,
    *,
    weight_decay: float,
    decay_mask: str,
    momentum: float | optax.Schedule = 0.9,
    nesterov: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Build PyTorch's SGD: the decay is added to the gradient, and so enters the momentum.

    `momentum` may be a function of the step.
    """
    return optax.chain(
        optax.add_decayed_weights(weight_decay, _mask(decay_mask)),
        _scheduled_trace(momentum, nesterov)
        if callable(momentum)
        else optax.trace(momentum, nesterov),
        optax.scale_by_learning_rate(schedule),
    )


def clipped(largest: float) -> optax.GradientTransformationExtraArgs:
    """Scale all gradients by min(1, largest / (their norm + 1e-6)): PyTorch's `clip_grad_norm_`.

    The step passes the `norm`, computed in the way that suits its devices.
    """

    def update(
        grads: Params, state: Any, params: Any = None, *, norm: Array | None = None, **extra: Any
    ) -> tuple[Params, Any]:
        del params, extra
        total = optax.tree.norm(grads) if norm is None else norm
        factor = jnp.minimum(1, largest / (total + 1e-6))
        return jax.tree.map(lambda g: factor.astype(g.dtype) * g, grads), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)  # type: ignore[arg-type]


class _Trace(NamedTuple):
    steps: Array
    trace: Params


def _scheduled_trace(momentum: optax.Schedule, nesterov: bool) -> optax.GradientTransformation:
    """Like `optax.trace`, but with a decay that depends on the step."""

    def init(params: Params) -> _Trace:
        return _Trace(jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params))

    def update(grads: Params, state: _Trace, params: Any = None) -> tuple[Params, _Trace]:
        del params

        def mixed(grad: Array, trace: Array) -> Array:
            return grad + jnp.asarray(momentum(state.steps), grad.dtype) * trace

        trace = jax.tree.map(mixed, grads, state.trace)
        updates = jax.tree.map(mixed, grads, trace) if nesterov else trace
        return updates, _Trace(state.steps + 1, trace)

    return optax.GradientTransformation(init, update)  # type: ignore[arg-type]


def _mask(decay_mask: str) -> Callable[[Params], dict[str, bool]]:
    if decay_mask not in DECAY_MASKS:
        raise ValueError(f"unknown decay_mask {decay_mask!r}; choose one of {sorted(DECAY_MASKS)}")
    rule = DECAY_MASKS[decay_mask]
    return lambda params: {name: rule(name, array) for name, array in params.items()}


def of_phase(
    p: PhaseSection, name: str, *, decay_mask: str, steps_per_epoch: int
) -> tuple[optax.Schedule, optax.GradientTransformationExtraArgs]:
    """Build learning rate and optimizer of the phase `name`; `decay_mask` is its network's.

    Raises:
      ValueError: an invalid value; says what to set.
    """
    mask = decay_mask if p.decay_mask is None else p.decay_mask
    for key, value, rows in (
        ("optimizer", p.optimizer, ("adamw", "sgd")),
        ("schedule", p.schedule, schedules.SHAPES),
        ("decay_mask", mask, DECAY_MASKS),
    ):
        one_of(f"{name}.{key}", value, rows)
    start, steps = p.warmup_lr, p.lr_steps
    peak = f"and {name}.lr={p.lr}"
    most = p.lr if p.lr > 0 else math.inf  # a wrong rate is one mistake, not three
    ranges = {
        "lr": (0 < p.lr < math.inf, "above 0"),
        "final_lr": (0 <= p.final_lr <= most, f"between 0 {peak}"),
        "warmup_lr": (start is None or 0 <= start <= most, f"between 0 {peak}"),
        "lr_steps": (
            all(0 < s < p.epochs for s in steps) and bool(steps or p.schedule != "step"),
            f"epochs above 0 and below {name}.epochs={p.epochs}, or fractions below 1; "
            "schedule='step' needs at least one, such as (0.5, 0.75)",
        ),
        "lr_factor": (0 < p.lr_factor <= 1, "above 0, at most 1"),
        "weight_decay": (0 <= p.weight_decay < math.inf, "at least 0"),
        "b2": (0 <= p.b2 < 1, "at least 0 and below 1"),
        "momentum": (
            0 <= p.momentum < 1 and (p.momentum > 0 or not p.nesterov),
            "at least 0 and below 1; nesterov=True needs a value above 0",
        ),
        "clip_norm": (
            p.clip_norm is None or 0 < p.clip_norm < math.inf,
            "above 0, or None for no clipping",
        ),
    }
    for key, (inside, wanted) in ranges.items():
        must_be(f"{name}.{key}", p[key], inside, wanted)
    schedule = schedules.learning_rate(p, name, steps_per_epoch=steps_per_epoch)
    momentum: float | optax.Schedule = p.momentum
    if p.cycle_momentum:
        if (p.schedule, p.optimizer) != ("one-cycle", "sgd"):
            raise ValueError(
                f"{name}.cycle_momentum=True needs schedule='one-cycle' and optimizer='sgd', not "
                f"{p.schedule!r} and {p.optimizer!r}; set {name}.cycle_momentum=False"
            )
        momentum = schedules.cycled_momentum(p, steps_per_epoch=steps_per_epoch)
    decay: dict[str, Any] = {"weight_decay": p.weight_decay, "decay_mask": mask}
    if p.optimizer == "adamw":
        tx = adamw(schedule, b2=p.b2, **decay)
    else:
        tx = sgd(schedule, momentum=momentum, nesterov=p.nesterov, **decay)
    return schedule, tx if p.clip_norm is None else optax.chain(clipped(p.clip_norm), tx)
