"""Training on several norms: the combined attack of a step."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxrobust.attacks import mixes
from jaxrobust.attacks.losses import goal_of
from jaxrobust.attacks.mixes import EXTREME, MIXES, norms_of
from jaxrobust.config import AttackSection
from jaxrobust.training.update import inner, objectives
from jaxrobust.training.update.memory import Memory
from jaxrobust.training.update.objectives import Objective, Value
from jaxrobust.training.update.value_checks import one_of
from jaxrobust.types import Array, Attack, Batch, Classifier, Params, threats
from jaxrobust.zoo.objectives.norms import steepest

STEEPEST = "pgd"  # the attack between whose steps norms can choose
_OF_TURNS = 2  # number of draws folded into a step's key; the alarm uses 1


def check(attack: AttackSection, objective: str | None = None) -> None:
    """Refuse norms that cannot be trained together, or with this objective."""
    if mixes.is_mixed(attack):
        _check_norms(attack)
    if objective is not None:
        _check_pairs(attack, objective, pairs=objectives.named(objective).pairs)


def _check_norms(attack: AttackSection) -> None:
    balls, mix = threats(attack), attack.get("mix")
    norms = ",".join(ball.norm for ball in balls)
    if mix is None:
        raise ValueError(
            f"attack.norm={norms} names several norms; set attack.mix, which combines them, to one "
            f"of {', '.join(map(repr, MIXES))}"
        )
    one_of("attack.mix", mix, MIXES)
    if MIXES[mix].extreme and not {ball.norm for ball in balls}.issuperset(EXTREME):
        raise ValueError(
            f"attack.mix={mix!r} chooses between {' and '.join(EXTREME)}, but attack.norm={norms} "
            "lacks one of them; name both, or set attack.mix='worst'"
        )
    if len(balls) == 1:
        raise ValueError(
            f"attack.mix={mix!r} mixes several norms, but attack.norm={norms} names one; list "
            "more, such as attack.norm=linf,l2,l1, or leave attack.mix out"
        )
    if attack.start_std is not None:
        raise ValueError(
            f"attack.start_std={attack.start_std:.4g} pixels would apply to all norms {norms}, "
            "whose radii differ; leave it out, or set attack.relative_step"
        )
    if MIXES[mix].steepest and attack.name != STEEPEST:
        raise ValueError(
            f"attack.mix={mix!r} needs the steps of attack.name={STEEPEST!r}, all from the same "
            f"point, but attack.name={attack.name!r} steps differently; set it to {STEEPEST!r}"
        )


def _check_pairs(attack: AttackSection, objective: str, *, pairs: bool) -> None:
    mix, norms = attack.get("mix"), [ball.norm for ball in threats(attack)]
    keeps_pairs = bool(mix) and MIXES[str(mix)].pairs
    if pairs and len(norms) < 2:
        raise ValueError(
            f"objective={objective!r} pairs the adversarial images of two norms, but "
            f"attack.norm={norms[0]} names one; list more, such as attack.norm=linf,l2,l1, with "
            "one radius each, and set attack.mix='pair'"
        )
    if pairs and not keeps_pairs:
        raise ValueError(
            f"objective={objective!r} pairs the adversarial images of two norms, but "
            f"attack.mix={mix!r} does not keep both; set attack.mix='pair'"
        )
    if keeps_pairs and not pairs:
        raise ValueError(
            f"attack.mix={mix!r} needs objective='ramp', which compares the points of two norms; "
            f"with objective={objective!r} use attack.mix='worst' or 'average'"
        )


def attack_of(plans: Sequence[inner.InnerPlan], mix: str, loss: objectives.Loss) -> Attack:
    """Make the attack of a step from the plans of all norms, by a row of `MIXES`."""
    if MIXES[mix].steepest:
        return _together(plans)
    return mixed([inner.attack_of(plan) for plan in plans], mix, loss)


def _together(plans: Sequence[inner.InnerPlan]) -> Attack:
    """Make one attack whose steps all norms choose together, from the first norm's start."""

    def make(balls: Sequence[dict[str, Any]]) -> Attack:
        steepest_balls = [steepest.SteepestBall(**ball) for ball in balls]
        return steepest.msd(steepest_balls, steps=plans[0].steps, **plans[0].settings)

    fixed = make([plan.ball() for plan in plans])

    def attack(
        logits_fn: Any, keys: Any, images: Any, labels: Any, epsilon_share: Any = None
    ) -> Any:
        grown = [plan.ball(epsilon_share, len(images)) for plan in plans]
        search = fixed if epsilon_share is None else make(grown)
        return search(logits_fn, keys, images, labels)

    return attack


def mixed(searches: Sequence[Attack], mix: str, loss: objectives.Loss) -> Callable[..., Array]:
    """Combine the attacks of all norms into one, by a row of `MIXES`.

    "worst" keeps each image's point with the highest `loss`, as in MAX of Tramèr & Boneh;
    "average" and "pair" return all points, f32[B, norms, H, W, C], for `averaged` and
    `pairing.ramp`; "alternate" and "extreme" run the attack of the norm `turn` i32[].
    """
    row, loss_of = MIXES[mix], goal_of(loss).loss

    def every(logits_fn: Any, keys: Any, images: Any, labels: Any, **options: Any) -> Any:
        candidates = [search(logits_fn, keys, images, labels, **options) for search in searches]
        points = jnp.stack(candidates, axis=1)
        if not row.looks:
            return points
        values = jnp.stack(
            [loss_of(logits_fn(one).astype(images.dtype), labels) for one in candidates], axis=1
        )
        best = values.argmax(1).reshape(-1, *[1] * (points.ndim - 1))
        return jnp.take_along_axis(points, best, axis=1)[:, 0]

    def in_turn(
        logits_fn: Any, keys: Any, images: Any, labels: Any, *, turn: Array, **options: Any
    ) -> Any:
        def branch(search: Attack) -> Callable[[Any], Any]:
            return lambda keys: search(logits_fn, keys, images, labels, **options)

        return jax.lax.switch(turn, [*map(branch, searches)], keys)

    return every if row.each else in_turn


def averaged(objective: Objective, count: int) -> Objective:
    """Average a loss over the points of `count` attacks, f32[B, count, H, W, C].

    AVG of Tramèr & Boneh 2019 (arXiv 1904.13000). Each attack's points pass after the previous
    attack's, with the same draws; each pass updates the running statistics of batch norms.
    """

    def loss(
        net: Classifier, params: Params, stats: Params, batch: Batch, images_adv: Array, key: Array
    ) -> Value:
        values, all_metrics = [], []
        for i in range(count):
            value, (stats, metrics) = objective.loss(
                net, params, stats, batch, images_adv[:, i], key
            )
            values.append(value)
            all_metrics.append(metrics)
        mean = jax.tree.map(lambda *parts: sum(parts) / count, *all_metrics)
        return functools.reduce(jnp.add, values) / count, (stats, mean)

    return objective._replace(loss=loss)


def memory(attack: AttackSection) -> Memory:
    """Make the memory of earlier turns; empty if norms do not take turns.

    "alternate" counts the updates. "extreme" draws linf or l1 with probabilities proportional to
    their robust errors so far, each averaged over all its steps in the phase; until both have had a
    step, they are equally likely. This is the rule of Croce & Hein 2022 (arXiv 2105.12508) as in
    the authors' code. Ours: the error of a step comes for free from the update's pass over the
    adversarial images, while theirs comes from the attack's last evaluation.
    """
    mix = attack.get("mix")
    if mix is None or MIXES[mix].each:
        return Memory()
    norms = norms_of(attack)
    extreme = MIXES[mix].extreme

    def turn(state: Any) -> Array:
        if not extreme:
            return state.step % len(norms)
        memory = state.opt_state.memory
        has_errors = (memory["turns"] > 0).all() & (memory["errors"].sum() > 0)
        shares = jnp.where(has_errors, memory["errors"], 1.0)
        key = jax.random.fold_in(jax.random.fold_in(state.key, state.step), _OF_TURNS)
        return jax.random.categorical(key, jnp.log(shares)).astype(jnp.int32)

    def learn(state: Any, opt_state: Any, metrics: dict[str, Array]) -> tuple[Any, Any]:
        is_turn = jnp.arange(len(norms)) == turn(state)
        shown = {f"trained_{n}": is_turn[i].astype(jnp.float32) for i, n in enumerate(norms)}
        if extreme:
            memory = opt_state.memory
            turns = memory["turns"] + is_turn
            step = (1 - metrics["robust"] - memory["errors"]) / jnp.maximum(turns, 1)
            errors = memory["errors"] + jnp.where(is_turn, step, 0).astype(jnp.float32)
            opt_state = opt_state._replace(memory=memory | {"turns": turns, "errors": errors})
        return opt_state, metrics | shown

    def init(params: Any, stats: Any) -> dict[str, Array]:
        return {"turns": jnp.zeros(2, jnp.int32), "errors": jnp.zeros(2, jnp.float32)}

    return Memory(learn=learn, init=init if extreme else None, turn=turn)
