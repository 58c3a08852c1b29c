"""AdamW as the paper's code sets it up: learning-rate curve, weight-decay masks, moving average."""

import math

import jax.numpy as jnp
import numpy as np
import optax

from jaxrobust.types import Array, Params


def learning_rate(
    *, peak: float, epochs: int, steps_per_epoch: int, warmup_epochs: int, final: float = 5e-6
) -> optax.Schedule:
    """Return step i32[] -> f32[]: warm-up from 1e-4 peak, then cosine to `final`.

    The curve is defined at whole epochs and interpolated linearly per iteration, as the authors'
    code does, so between epochs it is a chord of the cosine.
    Raises:
      ValueError: a length that is not positive, or a warm-up that leaves no epoch for the decay.
    Source: main.py of nmndeep/revisiting-at; parity: tests/training/test_optim.py.
    """
    if epochs < 1 or steps_per_epoch < 1:
        raise ValueError(
            f"epochs={epochs} and steps_per_epoch={steps_per_epoch} must be at least 1; with "
            "steps_per_epoch=0 the split holds fewer images than one batch"
        )
    if not 0 <= warmup_epochs < epochs:
        raise ValueError(f"warmup_epochs={warmup_epochs} must be at least 0 and below {epochs=}")

    def at(epoch: int) -> float:
        if epoch < warmup_epochs:
            return peak * (1e-4 + (1 - 1e-4) * epoch / warmup_epochs)
        angle = math.pi * (epoch - warmup_epochs) / (epochs - warmup_epochs)
        return final + (peak - final) / 2 * (1 + math.cos(angle))

    values = np.asarray([at(epoch) for epoch in range(epochs + 1)], np.float32)
    ticks = np.arange(epochs + 1, dtype=np.float32)

    def schedule(step):
        epoch = jnp.asarray(step, jnp.float32) / steps_per_epoch
        return jnp.interp(epoch, jnp.asarray(ticks), jnp.asarray(values))

    return schedule


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
}


def adamw(
    schedule: optax.Schedule, *, weight_decay: float, decay_mask: str, b2: float = 0.95
) -> optax.GradientTransformation:
    """Return AdamW with betas (0.9, b2), eps 1e-8, decoupled decay and no clipping, as in the
    paper.
    """
    if decay_mask not in DECAY_MASKS:
        raise ValueError(f"unknown decay_mask {decay_mask!r}; one of {sorted(DECAY_MASKS)}")
    rule = DECAY_MASKS[decay_mask]

    def mask(params):
        return {name: rule(name, array) for name, array in params.items()}

    return optax.adamw(schedule, b1=0.9, b2=b2, eps=1e-8, weight_decay=weight_decay, mask=mask)


def ema(average: Params, params: Params, decay: float) -> Params:
    """Return the moving average after one more step: no warm-up, no bias correction."""

    def step(mean: Array, new: Array) -> Array:
        return decay * mean + (1 - decay) * new

    return {name: step(average[name], params[name]) for name in params}
