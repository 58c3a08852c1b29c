"""What a training step minimises: clean, adversarial or TRADES cross-entropy."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxrobust.types import Array, Batch, Classifier, LogitsFn, Params


class Objective(NamedTuple):
    """What the attack aims at, and what the update minimises.

    `attack_targets(logits_fn, batch)` -> labels i32[B] or probabilities f32[B,C];
    `loss(net, params, stats, batch, images_adv, key) -> (f32[], (stats, metrics))`, the mean over
    the global batch; metrics are means too.
    """

    attack_targets: Callable[[LogitsFn, Batch], Array]
    loss: Callable[..., tuple[Array, tuple[Params, dict[str, Array]]]]


def cross_entropy(logits: Array, labels: Array) -> Array:
    """f32[B]; `labels` i32[B] or soft targets f32[B,C]."""
    if labels.ndim == 1:
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return optax.softmax_cross_entropy(logits, labels)


def likeliest(labels: Array) -> Array:
    """i32[B]: labels as they are, of soft targets the largest."""
    return labels if labels.ndim == 1 else labels.argmax(-1).astype(jnp.int32)


def accuracy(logits: Array, labels: Array) -> Array:
    """f32[]: the fraction whose largest logit is the label (of soft targets the largest)."""
    return (logits.argmax(-1) == likeliest(labels)).mean(dtype=jnp.float32)


ATTACK_LABELS: dict[str, Callable[[Array], Array]] = {
    "soft": lambda labels: labels,
    "hard": likeliest,
}


def _on_images(
    choose: Callable[[Batch, Array], Array], metric: str, attack_labels: str = "soft"
) -> Objective:
    """Cross-entropy on one set of images, whose accuracy is reported as `metric`."""

    def attack_targets(logits_fn, batch):
        return ATTACK_LABELS[attack_labels](batch.labels)

    def loss(net: Classifier, params, stats, batch, images_adv, key):
        images = choose(batch, images_adv)
        logits, stats = net.apply(params, stats, images, train=True, key=key)
        value = cross_entropy(logits, batch.labels).mean()
        return value, (stats, {metric: accuracy(logits, batch.labels)})

    return Objective(attack_targets, loss)


def clean() -> Objective:
    """Cross-entropy on the images themselves."""
    return _on_images(lambda batch, images_adv: batch.images, "clean")


def adversarial(attack_labels: str = "soft") -> Objective:
    """Cross-entropy on the attacked images (Madry et al. 2018, arXiv 1706.06083).

    The attack aims at the labels as mixed and smoothed ("soft", Singh et al. 2023) or at the
    likeliest class of them ("hard", Debenedetti et al. 2022).
    """
    return _on_images(lambda batch, images_adv: images_adv, "robust", attack_labels)


def trades(beta: float) -> Objective:
    """Clean cross-entropy + beta KL(p(x) || p(x_adv)) (Zhang et al. 2019, arXiv 1901.08573, eq. 5).

    The attack maximises the KL term against the clean probabilities, so it needs a random start:
    at the image itself the gradient is zero.
    """

    def attack_targets(logits_fn, batch):
        return jax.nn.softmax(logits_fn(batch.images))

    def loss(net: Classifier, params, stats, batch, images_adv, key):
        both = jnp.concatenate([batch.images, images_adv])
        if key is not None and key.ndim:  # of each image, which is there twice
            key = jax.vmap(jax.random.split, out_axes=1)(key).reshape(-1)
        logits, stats = net.apply(params, stats, both, train=True, key=key)
        clean, robust = jnp.split(logits, 2)
        p, log_p, log_q = (
            jax.nn.softmax(clean),
            jax.nn.log_softmax(clean),
            jax.nn.log_softmax(robust),
        )
        divergence = (p * (log_p - log_q)).sum(-1).mean()
        value = cross_entropy(clean, batch.labels).mean() + beta * divergence
        metrics = {"clean": accuracy(clean, batch.labels), "robust": accuracy(robust, batch.labels)}
        return value, (stats, metrics | {"kl": divergence})

    return Objective(attack_targets, loss)
