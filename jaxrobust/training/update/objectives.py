"""Training objectives: cross-entropy, TRADES, MART, sparsity."""

import functools
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Float32

from jaxrobust.attacks import Goal, mixes
from jaxrobust.config import AttackSection
from jaxrobust.models.kernels.primitives import widened
from jaxrobust.runtime import rooms
from jaxrobust.runtime.text.spelling import meant
from jaxrobust.training.update.memory import Memory
from jaxrobust.types import (
    Array,
    Batch,
    Classifier,
    Labels,
    Logits,
    LogitsFn,
    Params,
    PerImage,
    SoftLabels,
)

Value = tuple[Array, tuple[Params, dict[str, Array]]]  # a loss; the new statistics, and metrics
Loss = str | Callable[..., Array] | Goal  # of an attack, as in `attacks.apgd`


class Objective(NamedTuple):
    """What the attack targets, and what the update minimizes.

    `attack_targets(logits_fn, batch)` -> labels i32[B], probabilities f32[B,C], or the targets of
    the attack's loss;
    `loss(net, params, stats, batch, images_adv, key) -> (f32[], (stats, metrics))`, the mean over
    the global batch; metrics are means too;
    `draws(key)` -> the keys for the network's passes on clean and on attacked images; like `key`,
    each is None, a single key, or keys [B];
    `displaced(params, gradient)` -> where to differentiate the loss instead of at the parameters,
    given its gradient there over the images that all devices process at once.
    """

    attack_targets: Callable[[LogitsFn, Batch], Array]
    loss: Callable[..., Value]
    draws: Callable[[Array | None], tuple[Array | None, Array | None]]
    displaced: Callable[[Params, Params], Params] | None = None


def cross_entropy(logits: Logits, labels: Labels | SoftLabels) -> PerImage:
    """Compute the cross-entropy f32[B]; `labels` i32[B] or soft targets f32[B,C]."""
    if labels.ndim == 1:
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return optax.softmax_cross_entropy(logits, labels)


def likeliest(labels: Labels | SoftLabels) -> Labels:
    """Return labels i32[B] unchanged, or the largest of soft targets."""
    return labels if labels.ndim == 1 else labels.argmax(-1).astype(jnp.int32)


def accuracy(logits: Logits, labels: Labels | SoftLabels) -> Float32[Array, ""]:
    """Return the fraction f32[] whose largest logit is the label (of soft targets, the largest)."""
    return (logits.argmax(-1) == likeliest(labels)).mean(dtype=jnp.float32)


ATTACK_LABELS: dict[str, Callable[[Array], Array]] = {
    "soft": lambda labels: labels,
    "hard": likeliest,
}


def at_labels(attack_labels: str) -> Callable[[LogitsFn, Batch], Array]:
    """Return the function that computes an attack's targets, by a key of `ATTACK_LABELS`."""
    return lambda logits_fn, batch: ATTACK_LABELS[attack_labels](batch.labels)


def _on_images(
    choose: Callable[[Batch, Array], Array], metric: str, attack_labels: str = "soft"
) -> Objective:
    def loss(
        net: Classifier, params: Params, stats: Params, batch: Batch, images_adv: Array, key: Array
    ) -> Value:
        logits, stats = net.apply(params, stats, choose(batch, images_adv), train=True, key=key)
        value = cross_entropy(logits, batch.labels).mean()
        return value, (stats, {metric: accuracy(logits, batch.labels)})

    return Objective(at_labels(attack_labels), loss, lambda key: (key, key))


def clean() -> Objective:
    """Minimize cross-entropy on the clean images."""
    return _on_images(lambda batch, images_adv: batch.images, "clean")


def adversarial(attack_labels: str = "soft") -> Objective:
    """Return cross-entropy on the attacked images (Madry et al. 2018, arXiv 1706.06083).

    The attack targets the mixed and smoothed labels ("soft", Singh et al. 2023) or their most
    likely class ("hard", Debenedetti et al. 2022).
    """
    return _on_images(lambda batch, images_adv: images_adv, "robust", attack_labels)


# Which of TRADES's and MART's two passes update the running statistics of batch norms.
STATISTICS = ("both", "adversarial")


def draws(count: int) -> Callable[[Array | None], tuple[Any, ...]]:
    """Split a key, or keys [B], for this many passes; None gives as many Nones."""

    def keys(key: Array | None) -> tuple[Any, ...]:
        if key is None:
            return (None,) * count
        split = partial(jax.random.split, num=count)
        return tuple(split(key) if key.ndim == 0 else jax.vmap(split, out_axes=1)(key))

    return keys


_two_draws = draws(2)


def divergence(clean: Logits, robust: Logits) -> Array:
    """Average KL(softmax(clean) || softmax(robust)) over images, f[]."""
    log_p, log_q = jax.nn.log_softmax(clean), jax.nn.log_softmax(robust)
    return (jax.nn.softmax(clean) * (log_p - log_q)).sum(-1).mean()


def clean_probabilities(logits_fn: LogitsFn, batch: Batch) -> Array:
    """Compute the targets of an attack on the network's output for the clean images."""
    return jax.nn.softmax(logits_fn(batch.images.clip(0, 1)))


def of_two_passes(
    attack_targets: Callable[[LogitsFn, Batch], Array],
    terms: Callable[[Any, Logits, Logits], tuple[Array, dict[str, Array]]],
    statistics: str,
) -> Objective:
    """Build an objective from `terms(batch, clean logits, robust logits)`: loss and metrics.

    Clean and attacked images pass one after the other, as in TRADES's code: batch norms normalize
    them separately, and their running statistics are updated twice, or by the attacked images
    alone. Images are clipped to [0, 1], like every point of the attack. Otherwise the noise of
    random erasing, which leaves that range, would be part of the divergence, although no
    perturbation of that size is in the ball.
    """

    def loss(
        net: Classifier, params: Params, stats: Params, batch: Batch, images_adv: Array, key: Array
    ) -> Value:
        first, second = _two_draws(key)
        clean, moved = net.apply(params, stats, batch.images.clip(0, 1), train=True, key=first)
        adv_stats = moved if statistics == "both" else stats
        robust, after = net.apply(params, adv_stats, images_adv, train=True, key=second)
        value, shown = terms(batch, clean, robust)
        passes = {"clean": clean, "robust": robust}
        metrics = {name: accuracy(logits, batch.labels) for name, logits in passes.items()}
        return value, (after, metrics | shown)

    return Objective(attack_targets, loss, _two_draws)


def trades(beta: float, statistics: str = "both") -> Objective:
    """Build clean cross-entropy + beta KL(p(x) || p(x_adv)) (Zhang et al. 2019, arXiv 1901.08573).

    Their eq. 5. The attack maximizes the KL term against the clean probabilities, so it needs a
    random start: at the image the gradient is zero. Smoothed labels affect only cross-entropy.
    Parity: tests/training/update/test_golden_updates.py, 20 updates with the losses of
    zhichao-lu/robust-residual-network: "both" is its baseline, "adversarial" its advanced recipe.
    """

    def terms(batch: Batch, clean: Array, robust: Array) -> tuple[Array, dict[str, Array]]:
        kl = divergence(clean, robust)
        return cross_entropy(clean, batch.labels).mean() + beta * kl, {"kl": kl}

    return of_two_passes(clean_probabilities, terms, statistics)


def mart(beta: float, statistics: str = "both", attack_labels: str = "soft") -> Objective:
    """Build adversarial cross-entropy, a margin, and KL(p(x) || p(x_adv)) where p(x) is unsure
    (Wang et al. 2020, "Improving Adversarial Robustness Requires Revisiting Misclassified
    Examples", ICLR, eq. 11).

    With q = p(x_adv), y the label and k the likeliest other class of q, the mean over images of

        CE(q, y) - log(1.0001 - q_k + 1e-12) + beta KL(p || q) (1.0000001 - p_y),

    where KL uses log(q + 1e-12), with the authors' constants. Soft labels affect only the first
    term; the others use the largest of them. `statistics`: one of `STATISTICS`; `attack_labels`: a
    key of `ATTACK_LABELS`. Parity: tests/training/update/test_golden_updates.py, against PyTorch.
    """

    def terms(batch: Batch, clean: Array, robust: Array) -> tuple[Array, dict[str, Array]]:
        labels = batch.labels
        p, q = jax.nn.softmax(clean), jax.nn.softmax(robust)
        is_label = jnp.arange(p.shape[1])[None] == likeliest(labels)[:, None]
        # By index, so that tied runners-up do not share the gradient.
        other = jnp.argmax(jnp.where(is_label, -1, q), axis=1)
        strongest = jnp.take_along_axis(q, other[:, None], axis=1)[:, 0]
        margin = -jnp.log(1.0001 - strongest + 1e-12)
        unsure = 1.0000001 - jnp.where(is_label, p, 0).sum(-1)
        divergences = jax.scipy.special.xlogy(p, p) - p * jnp.log(q + 1e-12)
        kl = (divergences.sum(-1) * unsure).mean()
        return (cross_entropy(robust, labels) + margin).mean() + beta * kl, {"kl": kl}

    return of_two_passes(at_labels(attack_labels), terms, statistics)


def kernels(params: Params) -> list[Array]:
    """List the weights of convolutions and linear maps: no biases, norms, tokens or positions."""
    return [array for name, array in params.items() if name.endswith("kernel")]


def l1_norm(params: Params) -> Array:
    """Sum the absolute values of all `kernels`, f32[] (f64[] for f64); the gradient at 0 is 0."""

    def norm(wide: Array) -> Array:  # not `jnp.abs`, whose gradient at 0 is 1
        return (wide * jax.lax.stop_gradient(jnp.sign(wide))).sum()

    return functools.reduce(jnp.add, (norm(*widened(array)) for array in kernels(params)))


def sparse(objective: Objective, weight: float) -> Objective:
    """Add `weight` times `l1_norm`, which the metrics report as `l1` (Tang et al. 2022, arXiv
    2209.14105, section 5).
    """

    def loss(
        net: Classifier, params: Params, stats: Params, batch: Batch, images_adv: Array, key: Array
    ) -> Value:
        value, (after, metrics) = objective.loss(net, params, stats, batch, images_adv, key)
        norm = l1_norm(params)
        return value + weight * norm, (after, metrics | {"l1": norm})

    return objective._replace(loss=loss)


class ObjectiveRow(NamedTuple):
    """What others need to know about an objective: attack, checks, number of passes."""

    make: Callable[[Any, Any], Objective]  # from a phase and the config's attack
    attack_loss: Loss | None = "ce"  # what its attack maximizes; None: no attack
    of_probabilities: bool = False  # the attack targets clean outputs, which cost a pass
    both: bool = False  # clean and attacked images each have their own pass
    weights: tuple[str, ...] = ()  # keys of a phase that must be at least 0
    displaces: bool = False  # the loss is differentiated twice: `Objective.displaced`
    also: int = 0  # additional passes of an update
    # (classes, steps per epoch) -> what a step stores for later ones.
    remembers: Callable[[int, int], Memory] | None = None
    pairs: bool = False  # the loss compares the points of two norms
    # Its helper has the phase's initial weights, which cannot be random; this turns a network into
    # one without the helper.
    helped: Callable[[Classifier], Classifier] | None = None

    @property
    def attacks(self) -> bool:
        """True if the objective attacks the images."""
        return self.attack_loss is not None


ROWS: dict[str, ObjectiveRow | str] = {}  # a string: the entry of an optional room


def add(name: str, row: ObjectiveRow | str) -> None:
    """Register an objective under a name for the key `objective` of a phase."""
    if name in ROWS:
        raise ValueError(f"the objective {name} already exists; choose another name")
    ROWS[name] = row


def named(name: str) -> ObjectiveRow:
    """Look up an objective, importing optional ones; a `ValueError` lists those that exist."""
    if name not in ROWS:
        raise ValueError(f"unknown objective {name!r}; {meant(name, sorted(ROWS))}")
    row = ROWS[name]
    return rooms.resolve(row) if isinstance(row, str) else row


def passes(name: str, attack: AttackSection) -> int:
    """Count the forward passes that an update costs per image, including the attack."""
    row = named(name)
    passes = mixes.passes(attack) if row.attacks else 0
    update = row.also + (6 if row.both else 3)  # forward and backward, per image
    update *= mixes.updates(attack) if row.attacks else 1
    return int(row.of_probabilities) + passes + update * (2 if row.displaces else 1)


add("clean", ObjectiveRow(lambda phase, attack: clean(), attack_loss=None))
add("adversarial", ObjectiveRow(lambda phase, attack: adversarial(attack.labels)))
add(
    "trades",
    ObjectiveRow(
        lambda phase, attack: trades(phase.trades_beta, phase.bn_statistics),
        attack_loss="kl",
        of_probabilities=True,
        both=True,
        weights=("trades_beta",),
    ),
)
add(
    "mart",
    ObjectiveRow(
        lambda phase, attack: mart(phase.mart_beta, phase.bn_statistics, attack.labels),
        both=True,
        weights=("mart_beta",),
    ),
)
for _name, _entry in rooms.entries("OBJECTIVES").items():
    add(_name, _entry)
