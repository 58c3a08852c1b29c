"""Helper examples: images beyond the adversarial ones, labeled by a non-robust network."""

from typing import Any

import jax.numpy as jnp

from jaxrobust.training.update import objectives
from jaxrobust.training.update.memory import Memory
from jaxrobust.types import Array, Classifier, Params

# A helper example is this many times as far from its image as the adversarial one, by the authors'
# default.
REACH = 2.0
HELPER = "helper."  # prefix of the helper network's arrays, stored with the statistics


def memory() -> Memory:
    """Remember the initial weights of the phase as the frozen helper network."""

    def recall(state: Any, batch: Any) -> tuple[Any, Any]:
        memory = state.opt_state.memory
        helper = {name: a for name, a in memory.items() if name.startswith(HELPER)}
        return state.stats | helper, batch

    def init(params: Params, stats: Params) -> dict[str, Array]:
        return {f"{HELPER}{name}": jnp.copy(a) for name, a in (params | stats).items()}

    return Memory(recall, init=init)


def without_helper(net: Classifier) -> Classifier:
    """Let a network accept and ignore a helper's arrays among its statistics."""

    def apply(params: Params, stats: Params, images: Array, **mode: Any) -> tuple[Array, Params]:
        stats = {name: a for name, a in stats.items() if not name.startswith(HELPER)}
        return net.apply(params, stats, images, **mode)

    return Classifier(net.init, apply)


def helper_classes(net: Classifier, params: Params, stats: Params, images: Array) -> Array:
    """Return the helper network's classes i32[B], computed in the type of `params`."""
    helper = {k.removeprefix(HELPER): a for k, a in stats.items() if k.startswith(HELPER)}
    helper_params = {name: helper[name].astype(params[name].dtype) for name in params}
    helper_stats = {name: a for name, a in helper.items() if name not in params}
    return net.apply(helper_params, helper_stats, images)[0].argmax(-1)


def hat(beta: float, gamma: float, statistics: str = "both") -> objectives.Objective:
    """Build TRADES + gamma CE(f(x_help), y_help) on helper examples (Rade & Moosavi-Dezfooli 2022,
    "Reducing Excessive Margin to Achieve a Better Accuracy vs. Robustness Trade-off", ICLR).

    x' is the adversarial image, x_help = x + 2 (x' - x), not clipped to [0, 1], and y_help the
    class of x' by a network from standard training. They pass after clean and adversarial images.
    Ours: the helper network has the initial weights of the phase (see `memory`), where the robust
    one starts too; theirs starts at random, and may have another architecture.
    Parity: tests/training/update/test_own_objectives.py, 20 updates.
    """
    cross_entropy, accuracy = objectives.cross_entropy, objectives.accuracy
    draws = objectives.draws(3)

    def loss(
        net: Classifier, params: Params, stats: Params, batch: Any, images_adv: Array, key: Any
    ) -> objectives.Value:
        images, (first, second, third) = batch.images.clip(0, 1), draws(key)
        classes = helper_classes(net, params, stats, images_adv)
        beyond = images + REACH * (images_adv - images)
        clean, moved = net.apply(params, stats, images, train=True, key=first)
        next_stats = moved if statistics == "both" else stats
        robust, moved = net.apply(params, next_stats, images_adv, train=True, key=second)
        next_stats = moved if statistics == "both" else stats
        helped, after = net.apply(params, next_stats, beyond, train=True, key=third)
        after = after if statistics == "both" else moved
        kl = objectives.divergence(clean, robust)
        help_loss = cross_entropy(helped, classes).mean()
        value = cross_entropy(clean, batch.labels).mean() + beta * kl + gamma * help_loss
        metrics = {"clean": accuracy(clean, batch.labels), "robust": accuracy(robust, batch.labels)}
        return value, (after, metrics | {"kl": kl, "helper": accuracy(helped, classes)})

    return objectives.Objective(objectives.clean_probabilities, loss, lambda key: draws(key)[:2])


HAT = objectives.named("trades")._replace(
    make=lambda phase, attack: hat(phase.hat_beta, phase.hat_gamma, phase.bn_statistics),
    weights=("hat_beta", "hat_gamma"),
    also=4,  # the helper examples, and the helper network's pass
    remembers=lambda classes, steps_per_epoch: memory(),
    helped=without_helper,
)
