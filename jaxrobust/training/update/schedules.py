"""Learning-rate curves of the published recipes: warm-up, decay, and lookup times."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxrobust.config import PhaseSection
from jaxrobust.training.update.value_checks import must_be

# (epoch, cosine function) -> learning rate; a piece applies from its epoch to the next one's.
Piece = tuple[float, Callable[[Any, Callable[[Any], Any]], Any]]


class Shape(NamedTuple):
    """A row of the table."""

    looked_up: str  # every "iteration" | "epoch" | "chord": linear between whole epochs
    ends: bool = True  # whether it ends at `final_lr`, where the cool-down continues
    least_warmup: int = 0


SHAPES = {
    # nmndeep/revisiting-at: main.py defines whole epochs and interpolates.
    "chord-cosine": Shape("chord"),
    "cosine": Shape("iteration"),
    # timm's CosineLRScheduler, in epochs: DeiT, XCiT, the light recipe.
    "epoch-cosine": Shape("epoch"),
    # DIG-Beihang/RobustART, cifar10/train.py: GradualWarmupScheduler, then CosineAnnealingLR.
    "late-cosine": Shape("epoch", ends=False),
    "linear": Shape("iteration"),
    "step": Shape("epoch", ends=False),  # PyTorch's MultiStepLR
    # PyTorch's OneCycleLR, once an epoch: cosines that end with the last epoch's value.
    "one-cycle": Shape("epoch", ends=False, least_warmup=2),
}


def _flat(begin: float, value: float) -> Piece:
    return begin, lambda epoch, cos: value


def _cosine(begin: float, length: float, peak: float, final: float) -> Piece:
    def value(epoch: Any, cos: Callable[[Any], Any]) -> Any:
        return final + (peak - final) / 2 * (1 + cos(math.pi * (epoch - begin) / length))

    return begin, value


def _pieces(p: PhaseSection) -> list[Piece]:
    peak, final, warmup, end = p.lr, p.final_lr, p.warmup_epochs, p.epochs - p.cooldown_epochs
    start = 1e-4 if p.warmup_lr is None else p.warmup_lr / peak  # warm-up's start / peak
    top = warmup - 1  # of "one-cycle"
    rise = (0, lambda epoch, cos: peak * (start + (1 - start) * epoch / warmup))
    match p.schedule:
        case "chord-cosine" | "cosine":
            pieces = [rise, _cosine(warmup, end - warmup, peak, final)]
        case "epoch-cosine":  # starts at epoch 0, during the warm-up, which ends below the peak
            pieces = [rise, (warmup, _cosine(0, end, peak, final)[1])]
        case "late-cosine":  # one more epoch at the peak, then a cosine cut off above its end
            pieces = [rise, _flat(warmup, peak), _cosine(warmup + 1, end, peak, final)]
        case "linear":
            slope = (final - peak) / (end - warmup)
            pieces = [rise, (warmup, lambda epoch, cos: peak + slope * (epoch - warmup))]
        case "step":
            falls = sorted(s * p.epochs if s < 1 else s for s in p.lr_steps)
            rates = [_flat(begin, peak * p.lr_factor**n) for n, begin in enumerate(falls, 1)]
            pieces = [rise, _flat(warmup, peak), *rates]
        case _:
            pieces = [_cosine(0, top, start * peak, peak), _cosine(top, end - 1 - top, peak, final)]
    return pieces + ([_flat(end, final)] if p.cooldown_epochs else [])


def learning_rate(p: PhaseSection, name: str, *, steps_per_epoch: int) -> Callable[[Any], Any]:
    """Build step i32[] -> f32[] (f64[] in x64 mode): the learning rate of an update.

    `name`: of the phase, for messages.
    Parity: tests/training/update/test_schedules.py, against PyTorch, timm and golden curves.
    """
    _check_lengths(p, name, steps_per_epoch)
    pieces = _pieces(p)
    values = _table(pieces, p.epochs)
    ticks = np.arange(p.epochs + 1.0)

    def epoch_of(step: Any) -> Any:
        return jnp.asarray(step, jnp.result_type(float)) / steps_per_epoch

    def iteration(step: Any) -> Any:
        epoch = epoch_of(step)
        value = pieces[0][1](epoch, jnp.cos)
        for begin, piece in pieces[1:]:
            value = jnp.where(epoch >= begin, piece(epoch, jnp.cos), value)
        return value

    return {
        "chord": lambda step: jnp.interp(epoch_of(step), *map(jnp.asarray, (ticks, values))),
        "epoch": _each_epoch(values, steps_per_epoch),
        "iteration": iteration,
    }[SHAPES[p.schedule].looked_up]


def cycled_momentum(p: PhaseSection, *, steps_per_epoch: int) -> Callable[..., Any]:
    """Build step i32[] -> f32[], SGD's momentum for "one-cycle": from 0.95 down to 0.85 while the
    rate rises, and back, once an epoch, as by default in PyTorch's OneCycleLR.
    """
    top = p.warmup_epochs - 1
    pieces = [_cosine(0, top, 0.95, 0.85), _cosine(top, p.epochs - 1 - top, 0.85, 0.95)]
    return _each_epoch(_table(pieces, p.epochs), steps_per_epoch)


def _table(pieces: Sequence[Piece], epochs: int) -> np.ndarray:
    def at(epoch: int) -> float:
        return [piece for begin, piece in pieces if begin <= epoch][-1](epoch, math.cos)

    return np.asarray([at(epoch) for epoch in range(epochs + 1)])


def _each_epoch(values: np.ndarray, steps_per_epoch: int) -> Callable[[Any], Any]:
    return lambda step: jnp.asarray(values)[jnp.asarray(step) // steps_per_epoch]


def _check_lengths(p: PhaseSection, name: str, steps_per_epoch: int) -> None:
    epochs, warmup, cooldown, shape = p.epochs, p.warmup_epochs, p.cooldown_epochs, p.schedule
    if epochs < 1 or steps_per_epoch < 1:
        raise ValueError(
            f"{name}.epochs={epochs} and steps_per_epoch={steps_per_epoch} must be at least 1; "
            "steps_per_epoch=0 means that the split holds fewer images than one batch"
        )
    least = SHAPES[shape].least_warmup
    wanted = f"at least {least} and below {epochs=}"
    if warmup >= epochs:
        shorter = f"shorten it to {epochs - 1} or less" if epochs > 1 else "set it to 0"
        wanted += f"; {shorter}, or train longer"
    must_be(f"{name}.warmup_epochs", warmup, least <= warmup < epochs, wanted)
    if cooldown and not SHAPES[shape].ends:
        raise ValueError(
            f"{name}.cooldown_epochs={cooldown} needs a schedule with a final value, which "
            f"schedule={shape!r} lacks; set cooldown_epochs=0"
        )
    inside = not cooldown or 0 <= cooldown < epochs - warmup
    wanted = f"at least 0 and below epochs - warmup_epochs = {epochs - warmup}"
    must_be(f"{name}.cooldown_epochs", cooldown, inside, wanted)
