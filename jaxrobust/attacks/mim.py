"""Momentum FGSM: steps along the sum of all gradients so far (Dong et al. 2018)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp

from jaxrobust.attacks.geometry.balls import l1_norm, per_image, usable
from jaxrobust.attacks.inputs import Noise, check_noise
from jaxrobust.attacks.losses import Goal
from jaxrobust.attacks.machine import as_attack
from jaxrobust.attacks.pgd import PgdState, pgd_machine
from jaxrobust.attacks.registry import Fixed, MachineFacts, NamedAttack, StandardSettings, add
from jaxrobust.types import Array, Attack, Machine, Points, check_number

_DECAY = 1.0


class MimState(NamedTuple):
    """The state of momentum FGSM; the first axis of every array is the image."""

    run: PgdState
    momentum: Points

    @property
    def labels(self) -> Any:
        """Return the labels, for the check of classes."""
        return self.run.labels

    @property
    def iteration(self) -> Array:
        """Count the steps taken."""
        return self.run.iteration


def mim(
    *,
    norm: str = "linf",
    epsilon: float | Array,
    steps: int,
    step_size: float | None = None,
    random_start: bool | Noise = False,
    loss: str | Callable[..., Array] | Goal = "ce",
    decay: float = _DECAY,
    kept_fraction: float = 0.05,
    l1_rule: str = "sparse",
    info: bool = False,
) -> Attack:
    """Make momentum FGSM, returning the last iterate (Dong et al. 2018, arXiv 1710.06081, alg. 1).

    Each gradient is divided by its L1 norm before it is added, as in the paper; foolbox 3.3.4 adds
    it as it is. Arguments as in `pgd`, but `step_size` defaults to epsilon / K. `decay` >= 0 is the
    factor of the momentum in each step; 0 gives iterative FGSM.

    >>> import jax, jax.numpy as jnp
    >>> logits_fn = lambda images: images.mean((1, 2)) @ jnp.array([[1.0, -1.0]])
    >>> images, labels = jnp.full((1, 4, 4, 1), 0.5), jnp.array([0])
    >>> attack = mim(norm="linf", epsilon=0.25, steps=4)
    >>> images_adv = attack(logits_fn, None, images, labels)
    >>> float(images_adv.min())
    0.25
    """
    check_noise(random_start, norm)
    settings: dict[str, Any] = {"loss": loss, "kept_fraction": kept_fraction, "l1_rule": l1_rule}
    machine = mim_machine(
        norm=norm, epsilon=epsilon, steps=steps, step_size=step_size, decay=decay, **settings
    )
    return as_attack(machine, random_start=random_start, info=info, gradient_steps=steps)


def mim_machine(
    *,
    norm: str,
    epsilon: float | Array,
    steps: int,
    step_size: float | None = None,
    decay: float = _DECAY,
    **settings: Any,
) -> Machine:
    """Make momentum FGSM a `types.Machine`: PGD that is told the momentum instead of a gradient."""
    if not 0 <= check_number("decay", decay) < float("inf"):
        raise ValueError(f"decay={decay} must be a number >= 0, such as 1.0")
    pgd = pgd_machine(norm=norm, epsilon=epsilon, steps=steps, step_size=step_size, **settings)

    def init(images: Any, labels: Any, **options: Any) -> MimState:
        run = pgd.init(images, labels, **options)
        if step_size is None:
            run = run._replace(step=run.epsilon / steps)
        return MimState(run, jnp.zeros_like(run.points))

    def tell(state: MimState, loss: Any, score: Any, gradient: Points) -> MimState:
        gradient = usable(gradient)
        size = jnp.maximum(l1_norm(gradient), jnp.finfo(gradient.dtype).tiny)
        momentum = decay * state.momentum + gradient / per_image(size, gradient)
        return MimState(pgd.tell(state.run, loss, score, momentum), momentum)

    return pgd._replace(
        init=init,
        query=lambda state: pgd.query(state.run),
        loss=lambda state, outputs: pgd.loss(state.run, outputs),
        tell=tell,
        finished=lambda state: pgd.finished(state.run),
        result=lambda state: pgd.result(state.run),
    )


def _searching(setting: Any, epsilon: Any) -> Machine:
    machine = mim_machine(norm=setting.norm, epsilon=epsilon, steps=setting.steps)
    return machine._replace(finished=lambda state: state.run.iteration > state.run.steps)


_FACTS = MachineFacts(
    machine="mim",
    make=_searching,
    rule="a fixed length along the sum of all gradients so far",
    starts=("image", "random"),
    least={"steps": 1, "restarts": 1, "eot": 1},
)
add(
    _FACTS,
    NamedAttack(
        *("mim", "FGSM with momentum", _FACTS),
        searches=StandardSettings(number=6, steps=20),
        fixed=Fixed(start="image"),
        trains=True,
        make=mim,
        length=1.0,
    ),
)
