"""The improved Kullback-Leibler divergence: logit distances weighted by class means."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxrobust.training.update import objectives
from jaxrobust.training.update.memory import Memory
from jaxrobust.types import Array, Labels, Logits, PerImage, SoftLabels

TEMPERATURE = 4.0  # of the probabilities in class means: the authors' choice


class WeighedBatch(NamedTuple):
    """A training batch, and the mean probabilities of each image's class so far."""

    images: Array
    labels: Array
    weights: SoftLabels


def weighed_distance(clean: Logits, robust: Logits, weights: SoftLabels) -> PerImage:
    """Compute 1/4 sum_jk w_j w_k ((c_j - c_k) - (r_j - r_k))^2 of logits c and r.

    With d = c - r and weights that sum to W, this is 1/2 W sum_j w_j (d_j - m)^2, where m is the
    weighted mean of d. It needs only C numbers per image, instead of the C^2 in the authors' code.
    """
    apart, total = clean - robust, weights.sum(-1, keepdims=True)
    mean = (weights * apart).sum(-1, keepdims=True) / total
    return (total * weights * (apart - mean) ** 2).sum(-1) / 2


def soft_cross_entropy(clean: Logits, robust: Logits) -> PerImage:
    """Compute the cross-entropy of the robust logits with the clean probabilities, held fixed."""
    return -(jax.lax.stop_gradient(jax.nn.softmax(clean)) * jax.nn.log_softmax(robust)).sum(-1)


def class_sums(clean: Logits, classes: Labels) -> Array:
    """Sum softmax(clean / TEMPERATURE) over the images of each class: f[C, C], a row per class."""
    probabilities = jax.lax.stop_gradient(jax.nn.softmax(clean / TEMPERATURE))
    return jax.nn.one_hot(classes, clean.shape[1], dtype=clean.dtype).T @ probabilities


def memory(num_classes: int, steps_per_epoch: int) -> Memory:
    """Remember the mean probabilities of each class, [C, C], from the previous epoch.

        In the first epoch, all are 1/C. Ours: a class without images in an epoch keeps its row; the
    authors' row would be NaN.
    """

    def recall(state: Any, batch: Any) -> tuple[Any, Any]:
        labels = batch.labels
        classes = labels if labels.ndim == 1 else labels.argmax(-1)
        weights = state.opt_state.memory["class_means"][classes]
        return state.stats, WeighedBatch(batch.images, labels, weights)

    def learn(state: Any, opt_state: Any, metrics: dict[str, Array]) -> tuple[Any, Any]:
        memory = opt_state.memory
        sums = memory["class_sums"] + metrics["class_sums"].astype(memory["class_sums"].dtype)
        total = sums.sum(1, keepdims=True)
        means = jnp.where(total > 0, sums / jnp.where(total > 0, total, 1), memory["class_means"])
        ends_epoch = (state.step + 1) % steps_per_epoch == 0
        new = {
            "class_means": jnp.where(ends_epoch, means, memory["class_means"]),
            "class_sums": jnp.where(ends_epoch, 0, sums),
        }
        shown = {key: value for key, value in metrics.items() if key != "class_sums"}
        return opt_state._replace(memory=memory | new), shown

    def init(params: Any, stats: Any) -> dict[str, Array]:
        shape = (num_classes, num_classes)
        return {"class_means": jnp.full(shape, 1 / num_classes), "class_sums": jnp.zeros(shape)}

    return Memory(recall, learn, init)


def dkl(alpha: float, beta: float, statistics: str = "both") -> objectives.Objective:
    """Build clean cross-entropy + the improved KL divergence of p(x) and p(x_adv) (Cui et al. 2023,
    "Decoupled Kullback-Leibler Divergence Loss", arXiv 2305.13948).

    KL splits into a distance of logits and a cross-entropy with soft labels. With clean and robust
    logits c and r, [.] held fixed, and w the mean probabilities of the image's class, it is the
    mean of

        CE(c, y) + alpha CE(r, [softmax(c)]) + beta/4 sum_jk w_j w_k ((c_j - c_k) - (r_j - r_k))^2.

    Theirs: both logits move in the distance, and w is of the class (see `memory`), where KL has the
    image's own probabilities. The attack is TRADES', as in their code. Ours: images pass before
    attacked ones. Parity: tests/training/update/test_own_objectives.py, 20 updates.
    """

    def terms(batch: Any, clean: Array, robust: Array) -> tuple[Array, dict[str, Array]]:
        soft = soft_cross_entropy(clean, robust).mean()
        distance = weighed_distance(clean, robust, batch.weights).mean()
        of_labels = objectives.cross_entropy(clean, batch.labels).mean()
        value = of_labels + alpha * soft + beta * distance
        sums = class_sums(clean, objectives.likeliest(batch.labels))
        return value, {"distance": distance, "class_sums": sums}

    return objectives.of_two_passes(objectives.clean_probabilities, terms, statistics)


DKL = objectives.named("trades")._replace(
    make=lambda phase, attack: dkl(phase.dkl_alpha, phase.dkl_beta, phase.bn_statistics),
    weights=("dkl_alpha", "dkl_beta"),
    remembers=memory,
)
