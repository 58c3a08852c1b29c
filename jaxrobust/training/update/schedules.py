"""Learning-rate curves of the published recipes: warm-up, decay, and where they are looked up."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxrobust.training.update.value_checks import must_be


class Span(NamedTuple):
    """What the curves are made of; lengths in epochs."""

    peak: float
    final: float
    start: float  # of the warm-up, as a share of the peak
    warmup: int
    end: int  # from here on, `final`
    steps: tuple[float, ...]
    factor: float


# (epoch, cosine function) -> learning rate; a piece holds from its epoch to the next one's.
Piece = tuple[float, Callable[[Any, Callable[[Any], Any]], Any]]


def _warmup(s: Span) -> Piece:
    return 0, lambda epoch, cos: s.peak * (s.start + (1 - s.start) * epoch / s.warmup)


def _decay(s: Span, begin: float, length: float) -> Piece:
    return (
        begin,
        lambda epoch, cos: (
            s.final + (s.peak - s.final) / 2 * (1 + cos(math.pi * (epoch - begin) / length))
        ),
    )


def _flat(begin: float, value: float) -> Piece:
    return begin, lambda epoch, cos: value


def _cosine(s: Span) -> list[Piece]:
    return [_warmup(s), _decay(s, s.warmup, s.end - s.warmup)]


def _unshifted_cosine(s: Span) -> list[Piece]:
    """timm's: the cosine begins at epoch 0, under the warm-up, which ends below the peak."""
    _, decay = _decay(s, 0, s.end)
    return [_warmup(s), (s.warmup, decay)]


def _late_cosine(s: Span) -> list[Piece]:
    """RobustART's: one more epoch at the peak, then a cosine that is cut off above its end."""
    return [_warmup(s), _flat(s.warmup, s.peak), _decay(s, s.warmup + 1, s.end)]


def _linear(s: Span) -> list[Piece]:
    slope = (s.final - s.peak) / (s.end - s.warmup)
    return [_warmup(s), (s.warmup, lambda epoch, cos: s.peak + slope * (epoch - s.warmup))]


def _steps(s: Span) -> list[Piece]:
    falls = [_flat(step, s.peak * s.factor**n) for n, step in enumerate(sorted(s.steps), 1)]
    return [_warmup(s), _flat(s.warmup, s.peak), *falls]


def _one_cycle(s: Span) -> list[Piece]:
    """PyTorch's OneCycleLR, once an epoch: cosines, whose last value is that of the last epoch."""
    top = s.warmup - 1
    rise, fall = s._replace(peak=s.start * s.peak, final=s.peak), _decay(s, top, s.end - 1 - top)
    return [_decay(rise, 0, top), fall]


class Shape(NamedTuple):
    """One row of the table."""

    pieces: Callable[[Span], list[Piece]]
    looked_up: str  # every "iteration" | "epoch" | "chord": linear between whole epochs
    ends: bool = True  # at `final`, where the cool-down goes on
    least_warmup: int = 0


SHAPES = {
    # nmndeep/revisiting-at: main.py defines whole epochs, and interpolates.
    "chord-cosine": Shape(_cosine, "chord"),
    "cosine": Shape(_cosine, "iteration"),
    # timm's CosineLRScheduler, in epochs: DeiT, XCiT, the light recipe.
    "epoch-cosine": Shape(_unshifted_cosine, "epoch"),
    # DIG-Beihang/RobustART, cifar10/train.py: GradualWarmupScheduler, then CosineAnnealingLR.
    "late-cosine": Shape(_late_cosine, "epoch", ends=False),
    "linear": Shape(_linear, "iteration"),
    "step": Shape(_steps, "epoch", ends=False),  # PyTorch's MultiStepLR
    "one-cycle": Shape(_one_cycle, "epoch", ends=False, least_warmup=2),
}


def learning_rate(
    *,
    peak: float,
    epochs: int,
    steps_per_epoch: int,
    warmup_epochs: int,
    final: float = 5e-6,
    shape: str = "chord-cosine",
    warmup_lr: float | None = None,
    cooldown_epochs: int = 0,
    steps: Sequence[float] = (),
    factor: float = 0.1,
) -> Callable[[Any], Any]:
    """Build step i32[] -> f32[] (f64[] where JAX computes so): the learning rate of an update.

    Args:
      epochs: of all, warm-up and cool-down included.
      final: where the decay ends; "step" does not read it.
      warmup_lr: at epoch 0, from where it rises linearly; default 1e-4 peak.
      cooldown_epochs: the last ones, at `final`.
      steps: of "step": epochs, or below 1 fractions of `epochs`, from which on the rate is
        multiplied by `factor`.
    Parity: tests/training/update/test_schedules.py, against PyTorch, timm and golden curves.
    """
    if epochs < 1 or steps_per_epoch < 1:
        raise ValueError(
            f"epochs={epochs} and steps_per_epoch={steps_per_epoch} must be at least 1; with "
            "steps_per_epoch=0 the split holds fewer images than one batch"
        )
    row = SHAPES[shape]
    _check_lengths(row, shape, epochs, warmup_epochs, cooldown_epochs)
    start = 1e-4 if warmup_lr is None else warmup_lr / peak
    end, at = epochs - cooldown_epochs, [s * epochs if s < 1 else s for s in steps]
    span = Span(peak, final, start, warmup_epochs, end, tuple(at), factor)
    pieces = row.pieces(span) + ([_flat(end, final)] if cooldown_epochs else [])

    values = _table(pieces, epochs)
    ticks = np.arange(epochs + 1.0)

    def within(step: Any) -> Any:
        return jnp.asarray(step, jnp.result_type(float)) / steps_per_epoch

    def iteration(step: Any) -> Any:
        epoch = within(step)
        value = pieces[0][1](epoch, jnp.cos)
        for begin, of in pieces[1:]:
            value = jnp.where(epoch >= begin, of(epoch, jnp.cos), value)
        return value

    return {
        "chord": lambda step: jnp.interp(within(step), *map(jnp.asarray, (ticks, values))),
        "epoch": _each_epoch(values, steps_per_epoch),
        "iteration": iteration,
    }[row.looked_up]


def cycled_momentum(*, epochs: int, steps_per_epoch: int, warmup_epochs: int) -> Callable[..., Any]:
    """Build step i32[] -> f32[], SGD's momentum beside "one-cycle": from 0.95 down to 0.85 while
    the rate rises, and back, as PyTorch's OneCycleLR has it by default, once an epoch.
    """
    top = warmup_epochs - 1
    down = Span(0.95, 0.85, 0.0, warmup_epochs, epochs, (), 1.0)
    up = down._replace(peak=0.85, final=0.95)
    values = _table([_decay(down, 0, top), _decay(up, top, epochs - 1 - top)], epochs)
    return _each_epoch(values, steps_per_epoch)


def _table(pieces: Sequence[Piece], epochs: int) -> np.ndarray:
    def at(epoch: int) -> float:
        return [of for begin, of in pieces if begin <= epoch][-1](epoch, math.cos)

    return np.asarray([at(epoch) for epoch in range(epochs + 1)])


def _each_epoch(values: np.ndarray, steps_per_epoch: int) -> Callable[[Any], Any]:
    return lambda step: jnp.asarray(values)[jnp.asarray(step) // steps_per_epoch]


def _check_lengths(
    row: Shape, shape: str, epochs: int, warmup_epochs: int, cooldown_epochs: int
) -> None:
    wanted = f"at least {row.least_warmup} and below {epochs=}"
    if warmup_epochs >= epochs:
        shorter = f"shorten it to {epochs - 1} or less" if epochs > 1 else "set it to 0"
        wanted += f"; {shorter}, or train longer"
    inside = row.least_warmup <= warmup_epochs < epochs
    must_be("warmup_epochs", warmup_epochs, inside, wanted)
    if cooldown_epochs and not row.ends:
        raise ValueError(
            f"cooldown_epochs={cooldown_epochs} has no final value to stay at with "
            f"schedule={shape!r}; set cooldown_epochs=0"
        )
    left = epochs - warmup_epochs
    wanted = f"at least 0 and below epochs - warmup_epochs = {left}, of which it is a part"
    must_be("cooldown_epochs", cooldown_epochs, 0 <= cooldown_epochs < left, wanted)
