"""RAMP's pairing: predictions at the points of two norms should agree."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxrobust.training.update import objectives
from jaxrobust.types import Array, Classifier, Labels, Logits, Params, PerImage


def divergences(first: Logits, second: Logits) -> PerImage:
    """Compute KL(softmax(first) || softmax(second)) of each image, f[B]."""
    log_p, log_q = jax.nn.log_softmax(first), jax.nn.log_softmax(second)
    return (jnp.exp(log_p) * (log_p - log_q)).sum(-1)


def paired(first: Logits, second: Logits, labels: Labels) -> Array:
    """Average `divergences` over images that are correct at the first point, f[]; 0 if none is."""
    right = first.argmax(-1) == labels
    total = jnp.where(right, divergences(first, second), 0).sum()
    return total / jnp.maximum(right.sum(), 1).astype(total.dtype)


def ramp(weight: float, attack_labels: str = "soft") -> objectives.Objective:
    """Build RAMP's loss on the points of two norms (Jiang & Singh 2024, "RAMP: Boosting Adversarial
    Robustness Against Multiple l_p Perturbations for Universal Robustness", arXiv 2402.06827).

    With q and r the logits at an image's two points, and n_c images correct at the first point, it
    is the mean over images of max(CE(q, y), CE(r, y)), plus weight / n_c times the sum over these
    n_c of KL(softmax(q) || softmax(r)). Points f32[B, 2, H, W, C] come from "pair" of `several`,
    the first norm first: linf and l1, between which the paper finds the trade-off at usual radii.
    Both passes share random draws, and both update the statistics of batch norms. Ours: the maximum
    is over these two passes, while the authors' code passes the worst points a third time; n_c
    counts images that pass at once on a device. Their gradient projection, which mixes in a network
    from natural training, is not implemented. Parity:
    tests/zoo/objectives/norms/test_pairing.py, 20 updates.
    """

    def loss(
        net: Classifier, params: Params, stats: Params, batch: Any, images_adv: Array, key: Any
    ) -> objectives.Value:
        first, moved = net.apply(params, stats, images_adv[:, 0], train=True, key=key)
        second, after = net.apply(params, moved, images_adv[:, 1], train=True, key=key)
        labels = objectives.likeliest(batch.labels)
        entropies = (objectives.cross_entropy(z, batch.labels) for z in (first, second))
        worst = jnp.maximum(*entropies).mean()
        pairing = paired(first, second, labels)
        stands = (first.argmax(-1) == labels) & (second.argmax(-1) == labels)
        metrics = {"robust": stands.mean(dtype=jnp.float32), "pairing": pairing}
        return worst + weight * pairing, (after, metrics)

    at_labels = objectives.at_labels(attack_labels)
    return objectives.Objective(at_labels, loss, lambda key: (key, key))


RAMP = objectives.ObjectiveRow(
    lambda phase, attack: ramp(phase.ramp_lambda, attack.labels),
    weights=("ramp_lambda",),
    pairs=True,
)
