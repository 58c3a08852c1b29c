"""One vector for each image, as of CLIP's encoders."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxrobust.attacks import Goal
from jaxrobust.attacks.losses import wide
from jaxrobust.attacks.refused_network import as_function
from jaxrobust.tasks.task import Task
from jaxrobust.types import Array, Logits, PerImage, check_number


def _l2(vectors: Array, clean: Array) -> PerImage:
    return jnp.sum((vectors - clean) ** 2, axis=1)


def _cosine(vectors: Array, clean: Array) -> PerImage:
    return 1 - jnp.sum(_unit(vectors) * _unit(clean), axis=1)


def _unit(vectors: Array) -> Array:
    return vectors / jnp.maximum(jnp.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


# What is between two embeddings f[B, D], and what of it is the distance that the user names.
_DISTANCES: dict[str, tuple[Callable[[Array, Array], PerImage], Callable[[Array], Array]]] = {
    "cosine": (_cosine, lambda value: value),
    "l2": (_l2, jnp.sqrt),  # the square has a gradient at 0
}


def embedding(*, farthest: float, distance: str = "cosine") -> Task:
    """Make the task of embeddings f[B, D] that stay near their targets, those of clean images.

    Args:
      farthest: the attack has succeeded once an embedding is farther than this from its target.
      distance: "cosine" (1 - cosine, from 0 to 2) or "l2". The loss is the cosine distance, or the
        square of the L2 distance (as FARE trains), and the score is minus the distance.
    """
    farthest = check_number("farthest", farthest)
    if str(distance) not in _DISTANCES:
        raise ValueError(f"distance={distance!r} is unknown; choose one of {', '.join(_DISTANCES)}")
    if not 0 <= farthest < (2 if distance == "cosine" else float("inf")):
        most = "below 2 (the cosine distance of opposites)" if distance == "cosine" else "finite"
        raise ValueError(f"farthest={farthest} must be a distance that is at least 0 and {most}")
    between, length = _DISTANCES[distance]

    def loss(vectors: Array, clean: Array) -> PerImage:
        shape = getattr(clean, "shape", None)
        if vectors.ndim != 2 or vectors.shape != shape:
            raise ValueError(
                f"embeddings of shape {vectors.shape} have targets of shape {shape}; pass the "
                "embedding of each clean image as its target, f[B, D]"
            )
        return between(vectors, clean.astype(vectors.dtype))

    def score(vectors: Array, clean: Array) -> PerImage:
        return -length(loss(vectors, clean))

    name = f"embedding(farthest={farthest:g}, distance={distance})"
    return Task(name, Goal(loss, score, lambda score: score < -farthest))


def zero_shot(encoder: Any, texts: Array, *, scale: float = 100.0) -> Callable[[Array], Logits]:
    """Make a classifier of an encoder: `scale` times the cosine with the embeddings of texts.

    Args:
      encoder: images f[B,H,W,C] -> f[B, D], a network in any of the forms that attacks take.
      texts: f[K, D], one for each class.
    Returns:
      A `jax.tree_util.Partial`, images -> logits f[B, K], for which the usual losses, labels and
      versions of AutoAttack are.
    """
    texts = jnp.asarray(texts)
    if texts.ndim != 2 or len(texts) < 2:
        raise ValueError(f"texts have shape {texts.shape}; pass one embedding per class, f[K, D]")

    def similarities(encoder: Any, texts: Array, images: Array) -> Logits:
        vectors = wide(encoder(images))
        if vectors.shape[1:] != texts.shape[1:]:
            raise ValueError(
                f"embeddings of images have shape {vectors.shape}, and texts {texts.shape}; pass "
                "text embeddings of the same dimension"
            )
        return scale * _unit(vectors) @ _unit(texts.astype(vectors.dtype)).T

    if not isinstance(encoder, jax.tree_util.Partial):
        encoder = jax.tree_util.Partial(as_function(encoder))
    return jax.tree_util.Partial(similarities, encoder, texts)
