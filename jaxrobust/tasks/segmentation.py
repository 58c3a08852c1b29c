"""One class for each pixel."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrobust.attacks import Goal
from jaxrobust.tasks.task import Task
from jaxrobust.types import Array, PerImage, check_number


def segmentation(*, least: float = 0.5, ignore: int = 255) -> Task:
    """Make the task of logits f[B, H, W, K] and masks int[B, H, W].

    The loss is the mean cross-entropy of an image's pixels, and its score the share of pixels that
    get their class.

    Args:
      least: the attack has succeeded once the score is below this share, from 0 to 1.
      ignore: the class of pixels that do not count. Each image needs others.

    >>> float(segmentation(least=0.9).goal.score(jnp.eye(4)[None], jnp.array([[0, 1, 2, 255]]))[0])
    1.0
    """
    least = check_number("least", least)
    if not isinstance(ignore, int):
        raise ValueError(f"ignore={ignore!r} must be an int; pass -1 if all pixels count")
    if not 0 < least <= 1:
        raise ValueError(f"least={least} must be a share of the pixels, above 0 and at most 1")

    def mean(values: Array, masks: Array) -> PerImage:
        counts = (masks != ignore).reshape(len(masks), -1)
        values = jnp.where(counts, values.reshape(counts.shape), 0)
        return values.sum(axis=1) / jnp.maximum(counts.astype(values.dtype).sum(axis=1), 1)

    def loss(logits: Array, masks: Array) -> PerImage:
        _check(logits, masks)
        classes = jnp.where(masks == ignore, 0, masks).astype(jnp.int32)
        log_p = jax.nn.log_softmax(logits)
        return -mean(jnp.take_along_axis(log_p, classes[..., None], axis=-1)[..., 0], masks)

    def score(logits: Array, masks: Array) -> PerImage:
        _check(logits, masks)
        right = mean((logits.argmax(-1) == masks.astype(jnp.int32)).astype(logits.dtype), masks)
        empty = (masks == ignore).reshape(len(masks), -1).all(axis=1)
        finite = jnp.isfinite(logits).reshape(len(logits), -1).all(axis=1)
        return jnp.where(finite, jnp.where(empty, 1, right), jnp.nan)

    def check(logits: Any, masks: np.ndarray) -> None:
        empty = (masks == ignore).reshape(len(masks), -1).all(axis=1)
        if empty.any():
            raise ValueError(
                f"{empty.sum()} of {len(masks)} masks have no pixels that count, such as "
                f"mask {empty.argmax()}; leave these images out"
            )
        classes, present = logits.shape[-1], np.unique(masks)
        if len(others := present[(present != ignore) & ((present < 0) | (present >= classes))]):
            raise ValueError(
                f"masks contain class {others[0]}, but the network has {classes} classes, 0 to "
                f"{classes - 1}; pass its classes, or ignore={others[0]} for unlabeled pixels"
            )

    name = f"segmentation(least={least:g}, ignore={ignore})"
    return Task(name, Goal(loss, score, lambda score: score < least), check)


def _check(logits: Array, masks: Array) -> None:
    is_array = hasattr(masks, "dtype") and hasattr(masks, "shape")
    words = f"{masks.dtype}{list(masks.shape)}" if is_array else type(masks).__name__
    fits = is_array and logits.shape[:-1] == masks.shape
    if not (fits and jnp.issubdtype(masks.dtype, jnp.integer)):
        raise ValueError(
            f"masks are {words} for logits {list(logits.shape)}; pass the "
            "class of each pixel, int[B, H, W], and put the classes of the logits last"
        )
