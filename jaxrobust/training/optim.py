"""The optimisers of the published recipes: AdamW, SGD, weight-decay masks, moving average."""

import math
from collections.abc import Callable
from typing import Any

import optax

from jaxrobust.training import schedules
from jaxrobust.types import Array, Params

# Which parameters are decayed, by name and shape; the references have one rule per group of
# networks. Their test is on timm's names; no name of ours differs in what the tests look at.
DECAY_MASKS = {
    # Everything but biases and `bn*`; LN scales, layer scale and `downsample.1` ARE decayed.
    "not-bias": lambda name, array: not name.endswith(".bias") and "bn" not in name,
    # Matrices; position embedding and class token ARE decayed.
    "matrices": lambda name, array: array.ndim > 1 and not name.endswith(".bias"),
    # Matrices but these two; XCiT's temperature, of shape (heads, 1, 1), IS decayed.
    "matrices-not-tokens": lambda name, array: (
        array.ndim > 1 and not name.endswith(".bias") and name not in ("cls_token", "pos_embed")
    ),
    # Everything, as PyTorch does without groups: biases and scales of norms too.
    "all": lambda name, array: True,
}


def adamw(
    schedule: optax.Schedule, *, weight_decay: float, decay_mask: str, b2: float = 0.95
) -> optax.GradientTransformation:
    """Return AdamW with betas (0.9, b2), eps 1e-8, decoupled decay and no clipping, as in the
    paper.
    """
    mask = _mask(decay_mask)
    return optax.adamw(schedule, b1=0.9, b2=b2, eps=1e-8, weight_decay=weight_decay, mask=mask)


def sgd(
    schedule: optax.Schedule,
    *,
    weight_decay: float,
    decay_mask: str,
    momentum: float = 0.9,
    nesterov: bool = False,
) -> optax.GradientTransformation:
    """Return PyTorch's SGD: the decay is part of the gradient, and of the momentum with it."""
    return optax.chain(
        optax.add_decayed_weights(weight_decay, _mask(decay_mask)),
        optax.sgd(schedule, momentum=momentum, nesterov=nesterov),
    )


def _mask(decay_mask: str) -> Callable[[Params], dict[str, bool]]:
    if decay_mask not in DECAY_MASKS:
        raise ValueError(f"unknown decay_mask {decay_mask!r}; one of {sorted(DECAY_MASKS)}")
    rule = DECAY_MASKS[decay_mask]
    return lambda params: {name: rule(name, array) for name, array in params.items()}


OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "adamw": lambda p, schedule, **decay: adamw(schedule, b2=p.b2, **decay),
    "sgd": lambda p, schedule, **decay: sgd(
        schedule, momentum=p.momentum, nesterov=p.nesterov, **decay
    ),
}


def of_phase(
    p: Any, name: str, *, decay_mask: str, steps_per_epoch: int
) -> tuple[optax.Schedule, optax.GradientTransformation]:
    """Return the learning rate and the optimiser of a phase's values.

    Args:
      p: as `config.phase` has them.
      name: of the phase, for messages.
      decay_mask: of the network's family; the phase may name another.
    Raises:
      ValueError: a value that cannot work, with what to set.
    """
    mask = decay_mask if p.decay_mask is None else p.decay_mask
    for key, value, rows in (
        ("optimizer", p.optimizer, OPTIMIZERS),
        ("schedule", p.schedule, schedules.SHAPES),
        ("decay_mask", mask, DECAY_MASKS),
    ):
        if value not in rows:
            raise ValueError(f"{name}.{key}={value!r}; one of {', '.join(map(repr, rows))}")
    start, steps = p.warmup_lr, p.lr_steps
    peak = f"and {name}.lr={p.lr}"
    ranges = {
        "lr": (0 < p.lr < math.inf, "above 0"),
        "final_lr": (0 <= p.final_lr <= p.lr, f"between 0 {peak}"),
        "warmup_lr": (start is None or 0 <= start <= p.lr, f"between 0 {peak}"),
        "lr_steps": (
            all(0 < s < p.epochs for s in steps) and bool(steps or p.schedule != "step"),
            f"epochs above 0 and below {name}.epochs={p.epochs}, or fractions of them below 1; "
            "schedule='step' needs at least one, such as (0.5, 0.75)",
        ),
        "lr_factor": (0 < p.lr_factor <= 1, "above 0, at most 1"),
        "weight_decay": (0 <= p.weight_decay < math.inf, "at least 0"),
        "b2": (0 <= p.b2 < 1, "at least 0 and below 1"),
        "momentum": (
            0 <= p.momentum < 1 and (p.momentum > 0 or not p.nesterov),
            "at least 0 and below 1; nesterov=True needs one above 0",
        ),
    }
    for key, (inside, wanted) in ranges.items():
        if not inside:
            raise ValueError(f"{name}.{key}={p[key]} must be {wanted}")
    schedule = schedules.learning_rate(
        peak=p.lr,
        epochs=p.epochs,
        steps_per_epoch=steps_per_epoch,
        warmup_epochs=p.warmup_epochs,
        final=p.final_lr,
        shape=p.schedule,
        warmup_lr=start,
        cooldown_epochs=p.cooldown_epochs,
        steps=steps,
        factor=p.lr_factor,
    )
    make = OPTIMIZERS[p.optimizer]
    return schedule, make(p, schedule, weight_decay=p.weight_decay, decay_mask=mask)


def ema(average: Params, params: Params, decay: float) -> Params:
    """Return the moving average after one more step: no warm-up, no bias correction."""

    def step(mean: Array, new: Array) -> Array:
        return decay * mean + (1 - decay) * new

    return {name: step(average[name], params[name]) for name in params}
