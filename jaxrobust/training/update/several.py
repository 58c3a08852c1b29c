"""Several norms at once: which attack of a step's norms it trains on, and what that costs."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxrobust import attacks
from jaxrobust.attacks.mixes import EXTREME, MIXES, at_once, norms_of
from jaxrobust.config import AttackSection
from jaxrobust.resolved import Values
from jaxrobust.training.update.memory import Memory
from jaxrobust.training.update.value_checks import one_of
from jaxrobust.types import Array, Attack, Threat, threats

STEEPEST = "pgd"  # the attack whose steps norms can choose between
_OF_TURNS = 2  # of the draws of a step that are not split from its key; the alarm's are 1


class TurnKeys(NamedTuple):
    """What an attack that takes turns is given in place of keys."""

    keys: Any  # Keys [B], or what an attack whose radius grows is given in their place
    turn: Array  # i32[B], the same everywhere: which of the trained norms attacks


def alone(attack: AttackSection) -> list[AttackSection]:
    """List the section as it would be of each norm by itself; of one norm, as it is."""
    if isinstance(attack["norm"], str) and not isinstance(attack["step_size"], list | tuple):
        return [attack]
    own = {key: attack[key] for key in attack} | {"mix": None}  # type: ignore[attr-defined]
    return [
        Values(own | ball.settings() | {"step_size": size})  # type: ignore[misc]
        for ball, size in zip(threats(attack), step_sizes(attack), strict=True)
    ]


def step_sizes(attack: AttackSection) -> tuple[float | None, ...]:
    """List the step in pixels of each norm, None where it is not set; refuse one of several."""
    given, balls = attack["step_size"], threats(attack)
    if given is None:
        return (None,) * len(balls)
    norms, sizes = ",".join(b.norm for b in balls), given
    if not isinstance(given, list | tuple):
        if len(balls) > 1:
            raise ValueError(
                f"attack.step_size={given:.4g} pixels would be of all norms {norms}, whose radii "
                "differ; give one for each, in their order, or set attack.relative_step"
            )
        sizes = (given,)
    if len(sizes) != len(balls):
        listed = ",".join(f"{size:.4g}" for size in sizes)
        raise ValueError(
            f"attack.step_size={listed} and attack.norm={norms}: give a step for each norm, in "
            "their order, or set attack.relative_step"
        )
    return tuple(sizes)


def described(attack: AttackSection) -> str:
    """Name several norms with their mix, for a line of text; "" of one."""
    norms = [ball.norm for ball in threats(attack)]
    return f"{attack.get('mix')} of {', '.join(norms)}" if len(norms) > 1 else ""


def radius(attack: AttackSection) -> float:
    """Read the radius of a section of one norm."""
    return Threat.of(attack).epsilon


def trained(attack: AttackSection) -> list[AttackSection]:
    """List the sections of the norms that attack in training."""
    norms = norms_of(attack)
    return [each for each in alone(attack) if each.norm in norms]


def check(attack: AttackSection) -> None:
    """Refuse norms that cannot be trained together, in a sentence."""
    balls, mix = threats(attack), attack.get("mix")
    norms = ",".join(ball.norm for ball in balls)
    if mix is None and len(balls) == 1:
        return
    if mix is None:
        raise ValueError(
            f"attack.norm={norms} are several norms; say with attack.mix which of them a step "
            f"trains on, one of {', '.join(map(repr, MIXES))}"
        )
    one_of("attack.mix", mix, MIXES)
    if MIXES[mix].extreme and not {ball.norm for ball in balls}.issuperset(EXTREME):
        raise ValueError(
            f"attack.mix={mix!r} chooses between {' and '.join(EXTREME)}, and attack.norm={norms} "
            "lacks one of them; name both, or take attack.mix='worst'"
        )
    if len(balls) == 1:
        raise ValueError(
            f"attack.mix={mix!r} mixes several norms, and attack.norm={norms} is one; name more, "
            "such as attack.norm=linf,l2,l1, or leave attack.mix out"
        )
    if attack.start_std is not None:
        raise ValueError(
            f"attack.start_std={attack.start_std:.4g} pixels would be of all norms {norms}, whose "
            "radii differ; leave it out, or set attack.relative_step"
        )
    if MIXES[mix].steepest and attack.name != STEEPEST:
        raise ValueError(
            f"attack.mix={mix!r} takes every norm's step of attack.name={STEEPEST!r} from the same "
            f"point, and attack.name={attack.name!r} steps otherwise; set it to {STEEPEST!r}"
        )


def check_pairs(attack: AttackSection, objective: str, *, pairs: bool) -> None:
    """Refuse an objective of two norms' points without them, and these with another objective."""
    mix, norms = attack.get("mix"), [ball.norm for ball in threats(attack)]
    given = bool(mix) and MIXES[str(mix)].pairs
    if pairs and len(norms) < 2:
        raise ValueError(
            f"objective={objective!r} pairs what two norms find in the same images, and "
            f"attack.norm={norms[0]} is one; name more, such as attack.norm=linf,l2,l1, with a "
            "radius each, and set attack.mix='pair'"
        )
    if pairs and not given:
        raise ValueError(
            f"objective={objective!r} pairs what two norms find in the same images, which "
            f"attack.mix={mix!r} does not keep; set attack.mix='pair'"
        )
    if given and not pairs:
        raise ValueError(
            f"attack.mix={mix!r} is of objective='ramp', which compares the points of two norms; "
            f"with objective={objective!r} take attack.mix='worst' or 'average'"
        )


def passes(attack: AttackSection, mix: str | None = None) -> int:
    """Count the passes per image that a step's attacks cost: their sum, or, where one norm attacks
    in a step, their mean, which is that of any: all take the same steps.

    Where the points found are compared, a forward pass more for each; of steps that norms choose
    together, those of one attack and in each step so many forward passes as there are norms.
    `mix`: of several norms, another one than the section's.
    """
    own = attack.get("mix")
    row, alone = MIXES.get((mix or own) if own else ""), attacks.passes(attack.name, attack.steps)
    if row and row.steepest:
        return alone + attack.steps * at_once(attack, mix)
    looks = bool(row and row.looks)
    return at_once(attack, mix) * (alone + looks)


def updates(attack: AttackSection) -> int:
    """Count the norms whose points an update passes: all of them, or one."""
    row = MIXES.get(attack.get("mix") or "")
    return at_once(attack) if row and row.updates else 1


def mixed(searches: Sequence[Attack], mix: str, loss: str) -> Attack:
    """Make one attack of those of each norm, by a row of `MIXES`.

    "worst" keeps of each image the point of the highest `loss` (a key of `attacks.LOSSES`), as MAX
    of Tramèr & Boneh; "average" and "pair" return all points, f32[B, norms, H, W, C], for
    `averaged` and `ramp` of the objectives; "alternate" and "extreme" are given `TurnKeys`, and run
    the attack whose turn it is.
    """
    row, loss_of = MIXES[mix], attacks.LOSSES[loss]

    def every(logits_fn: Any, keys: Any, images: Any, labels: Any) -> Any:
        found = [search(logits_fn, keys, images, labels) for search in searches]
        points = jnp.stack(found, axis=1)
        if not row.looks:
            return points
        values = jnp.stack(
            [loss_of(logits_fn(own).astype(images.dtype), labels) for own in found], axis=1
        )
        best = values.argmax(1).reshape(-1, *[1] * (points.ndim - 1))
        return jnp.take_along_axis(points, best, axis=1)[:, 0]

    def in_turn(logits_fn: Any, given: Any, images: Any, labels: Any) -> Any:
        def branch(search: Attack) -> Callable[[Any], Any]:
            return lambda keys: search(logits_fn, keys, images, labels)

        return jax.lax.switch(given.turn[0], [*map(branch, searches)], given.keys)

    return every if row.each else in_turn


def memory(attack: AttackSection) -> Memory | None:
    """Make what a step remembers of the turns before it; None: it takes none.

    "alternate" counts the updates. "extreme" draws linf or l1 with probabilities that are as their
    robust errors so far, each the mean over all its steps since the phase began; until both have
    had one, they are equally likely. That is the rule of Croce & Hein 2022 (arXiv 2105.12508) as
    the authors' code has it. Ours: the error of a step is that of its images under the attack as
    the update passes them, which costs nothing, where theirs is that of the attack's last look.
    """
    mix = attack.get("mix")
    if mix is None or MIXES[mix].each:
        return None
    norms = [each.norm for each in trained(attack)]
    extreme = MIXES[mix].extreme

    def turn(state: Any) -> Array:
        if not extreme:
            return state.step % len(norms)
        told = state.opt_state.memory
        known = (told["turns"] > 0).all() & (told["errors"].sum() > 0)
        shares = jnp.where(known, told["errors"], 1.0)
        key = jax.random.fold_in(jax.random.fold_in(state.key, state.step), _OF_TURNS)
        return jax.random.categorical(key, jnp.log(shares)).astype(jnp.int32)

    def recall(state: Any, batch: Any, keys: Any) -> tuple[Any, Any, Any]:
        images = len(jax.tree.leaves(keys)[0])  # there may be radii beside the keys
        return state.stats, batch, TurnKeys(keys, jnp.broadcast_to(turn(state), (images,)))

    def learn(state: Any, opt_state: Any, metrics: dict[str, Array]) -> tuple[Any, Any]:
        now = jnp.arange(len(norms)) == turn(state)
        shown = {f"trained_{norm}": now[i].astype(jnp.float32) for i, norm in enumerate(norms)}
        if extreme:
            told = opt_state.memory
            turns = told["turns"] + now
            step = (1 - metrics["robust"] - told["errors"]) / jnp.maximum(turns, 1)
            errors = told["errors"] + jnp.where(now, step, 0).astype(jnp.float32)
            opt_state = opt_state._replace(memory=told | {"turns": turns, "errors": errors})
        return opt_state, metrics | shown

    def first(params: Any, stats: Any) -> dict[str, Array]:
        return {"turns": jnp.zeros(2, jnp.int32), "errors": jnp.zeros(2, jnp.float32)}

    return Memory(recall, learn, first if extreme else None)
