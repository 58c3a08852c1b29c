"""RAMP's pairing: what a network says of the points of two norms should be the same."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxrobust.types import Array, Classifier, Labels, Logits, Params, PerImage, SoftLabels


def divergences(first: Logits, second: Logits) -> PerImage:
    """Compute KL(softmax(first) || softmax(second)) of each image, f[B]."""
    log_p, log_q = jax.nn.log_softmax(first), jax.nn.log_softmax(second)
    return (jnp.exp(log_p) * (log_p - log_q)).sum(-1)


def paired(first: Logits, second: Logits, labels: Labels) -> Array:
    """Average `divergences` over the images that are right at the first point, f[]; 0 of none."""
    right = first.argmax(-1) == labels
    total = jnp.where(right, divergences(first, second), 0).sum()
    return total / jnp.maximum(right.sum(), 1).astype(total.dtype)


def loss_of(
    weight: float,
    *,
    cross_entropy: Callable[[Logits, Labels | SoftLabels], PerImage],
    likeliest: Callable[[Labels | SoftLabels], Labels],
) -> Callable[..., Any]:
    """Build the loss of `objectives.ramp`; parts of logits are those of the other objectives."""

    def loss(
        net: Classifier, params: Params, stats: Params, batch: Any, images_adv: Array, key: Any
    ) -> tuple[Array, tuple[Params, dict[str, Array]]]:
        first, moved = net.apply(params, stats, images_adv[:, 0], train=True, key=key)
        second, after = net.apply(params, moved, images_adv[:, 1], train=True, key=key)
        labels = likeliest(batch.labels)
        worst = jnp.maximum(*(cross_entropy(z, batch.labels) for z in (first, second))).mean()
        pairing = paired(first, second, labels)
        stands = (first.argmax(-1) == labels) & (second.argmax(-1) == labels)
        metrics = {"robust": stands.mean(dtype=jnp.float32), "pairing": pairing}
        return worst + weight * pairing, (after, metrics)

    return loss
