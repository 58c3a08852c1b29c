"""What a training step minimises: clean, adversarial or TRADES cross-entropy."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Float32

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


class Objective(NamedTuple):
    """What the attack aims at, and what the update minimises.

    `attack_targets(logits_fn, batch)` -> labels i32[B] or probabilities f32[B,C];
    `loss(net, params, stats, batch, images_adv, key) -> (f32[], (stats, metrics))`, the mean over
    the global batch; metrics are means too;
    `draws(key)` -> the keys with which it passes the images, and those attacked, through the
    network; they are as `key`: None, one, or keys [B].
    """

    attack_targets: Callable[[LogitsFn, Batch], Array]
    loss: Callable[..., tuple[Array, tuple[Params, dict[str, Array]]]]
    draws: Callable[[Array | None], tuple[Array | None, Array | None]]


def cross_entropy(logits: Logits, labels: Labels | SoftLabels) -> PerImage:
    """Compute the cross-entropy f32[B]; `labels` i32[B] or soft targets f32[B,C]."""
    if labels.ndim == 1:
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return optax.softmax_cross_entropy(logits, labels)


def likeliest(labels: Labels | SoftLabels) -> Labels:
    """Return i32[B]: labels as they are, of soft targets the largest."""
    return labels if labels.ndim == 1 else labels.argmax(-1).astype(jnp.int32)


def accuracy(logits: Logits, labels: Labels | SoftLabels) -> Float32[Array, ""]:
    """Compute the fraction f32[] whose largest logit is the label (of soft targets the largest)."""
    return (logits.argmax(-1) == likeliest(labels)).mean(dtype=jnp.float32)


ATTACK_LABELS: dict[str, Callable[[Array], Array]] = {
    "soft": lambda labels: labels,
    "hard": likeliest,
}


def _on_images(
    choose: Callable[[Batch, Array], Array], metric: str, attack_labels: str = "soft"
) -> Objective:
    """Return cross-entropy on one set of images, whose accuracy is reported as `metric`."""

    def attack_targets(logits_fn, batch):
        return ATTACK_LABELS[attack_labels](batch.labels)

    def loss(net: Classifier, params, stats, batch, images_adv, key):
        images = choose(batch, images_adv)
        logits, stats = net.apply(params, stats, images, train=True, key=key)
        value = cross_entropy(logits, batch.labels).mean()
        return value, (stats, {metric: accuracy(logits, batch.labels)})

    return Objective(attack_targets, loss, lambda key: (key, key))


def clean() -> Objective:
    """Return cross-entropy on the images themselves."""
    return _on_images(lambda batch, images_adv: batch.images, "clean")


def adversarial(attack_labels: str = "soft") -> Objective:
    """Return cross-entropy on the attacked images (Madry et al. 2018, arXiv 1706.06083).

    The attack aims at the labels as mixed and smoothed ("soft", Singh et al. 2023) or at the
    likeliest class of them ("hard", Debenedetti et al. 2022).
    """
    return _on_images(lambda batch, images_adv: images_adv, "robust", attack_labels)


def trades(beta: float) -> Objective:
    """Return clean cross-entropy + beta KL(p(x) || p(x_adv)) (Zhang et al. 2019, arXiv 1901.08573,
    eq. 5).

    The attack maximises the KL term against the clean probabilities, so it needs a random start:
    at the image itself the gradient is zero.

    The images and those attacked pass one after the other, as the authors have it: batch norms
    normalise them apart, and their running statistics move twice. `x` is cut to [0, 1], as every
    point of the attack is; else the noise of random erasing, which leaves that range, would be part
    of the divergence, and no perturbation of that size is in the ball.
    Parity: tests/training/test_trades.py, 20 updates with the loss of
    zhichao-lu/robust-residual-network.
    """

    def attack_targets(logits_fn, batch):
        return jax.nn.softmax(logits_fn(batch.images.clip(0, 1)))

    def draws(key):
        if key is None:
            return None, None
        split = jax.random.split if key.ndim == 0 else jax.vmap(jax.random.split, out_axes=1)
        first, second = split(key)
        return first, second

    def loss(net: Classifier, params, stats, batch, images_adv, key):
        outputs = []
        for images, own in zip((batch.images.clip(0, 1), images_adv), draws(key), strict=True):
            logits, stats = net.apply(params, stats, images, train=True, key=own)
            outputs.append(logits)
        clean, robust = outputs
        p, log_p, log_q = (
            jax.nn.softmax(clean),
            jax.nn.log_softmax(clean),
            jax.nn.log_softmax(robust),
        )
        divergence = (p * (log_p - log_q)).sum(-1).mean()
        value = cross_entropy(clean, batch.labels).mean() + beta * divergence
        metrics = {"clean": accuracy(clean, batch.labels), "robust": accuracy(robust, batch.labels)}
        return value, (stats, metrics | {"kl": divergence})

    return Objective(attack_targets, loss, draws)
