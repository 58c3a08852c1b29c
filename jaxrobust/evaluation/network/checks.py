"""Checks of an evaluation's input images and labels, and of its adversarial examples."""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Float64, Shaped

from jaxrobust.attacks.refused_network import check_layout
from jaxrobust.types import Threat

# Host arrays of `n` images.
_Images = Float[np.ndarray, "n H W channels"]
_Labels = Shaped[np.ndarray, " n"]
_Logits = Shaped[np.ndarray, "n K"]  # or any other scores of which the largest wins
_Mask = Bool[np.ndarray, " n"]
_Norms = Float64[np.ndarray, " n"]

OVERSHOOT = 1e-6  # how far float32 resizes leave [0, 1]: such pixels are clipped
ORDER = {"linf": np.inf, "l2": 2, "l1": 1, "l0": 0}  # `ord` of a norm in NumPy and JAX


def check_images(images: Any, labels: Any, *, classes: int | None = None) -> None:
    """Raise unless images are f[N,H,W,C] in [0, 1] with labels int[N]; N = 0 is allowed.

    A pixel may lie up to `OVERSHOOT` outside: `images.clipped` clips it. Of an `ImageSet` only the
    shape is checked. Labels must be below `classes`; None: not known yet.
    """
    labels = np.asarray(labels)
    shape = getattr(images, "shape", None)
    if not hasattr(images, "dtype") and isinstance(shape, tuple):  # an image set
        if len(shape) != 4 or shape[0] != len(images):
            raise ValueError(
                f"an image set of {len(images)} images has shape {shape}; make it (N, H, W, C)"
            )
        return _check_labels(labels, len(images), classes)
    images = np.asarray(images)
    if images.ndim != 4:
        raise ValueError(
            f"images have shape {images.shape}; pass [N, H, W, C]: one image as images[None], "
            "gray images with a last axis of 1, batches as np.concatenate(images)"
        )
    check_layout(images.shape)
    if images.dtype == np.uint8:
        raise ValueError("images are uint8; pass them as float in [0, 1]: divide by 255")
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(f"images are {images.dtype}; pass float32 in [0, 1]")
    if images.size:
        check_range(images)
    _check_labels(labels, len(images), classes)


def check_range(images: np.ndarray) -> None:
    """Raise if images f[N,H,W,C], N > 0, have a pixel more than `OVERSHOOT` outside [0, 1]."""
    low, high = float(images.min()), float(images.max())
    if math.isnan(low):
        count = int(np.isnan(images).any(axis=(1, 2, 3)).sum())
        raise ValueError(f"{count} of {len(images)} images have NaN pixels; drop or repair them")
    if low >= -OVERSHOOT and high <= 1 + OVERSHOOT:
        return
    if low >= -0.1 and high <= 1.1:
        remedy = "if a resize overshot, pass np.clip(images, 0, 1)"
    elif low >= -OVERSHOOT:
        remedy = "they look like 0..255, so divide by 255"
    else:
        remedy = (
            "they may have been normalized already; pass the plain pixels and let logits_fn "
            "normalize, so that the radius is in units of pixels"
        )
    raise ValueError(f"images span [{low:.4g}, {high:.4g}], not [0, 1]; {remedy}")


def _check_labels(labels: np.ndarray, count: int, classes: int | None) -> None:
    if labels.ndim == 2 and len(labels) == count:
        raise ValueError(
            f"labels have shape {labels.shape}; pass the class of each image (for one-hot rows, "
            "labels.argmax(axis=1))"
        )
    if labels.shape != (count,):
        raise ValueError(
            f"labels have shape {labels.shape} for {count} images; pass one integer per image, "
            f"shape ({count},)"
        )
    if not count:
        return  # np.asarray([]) is float
    if not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"labels are {labels.dtype}; pass integers: labels.astype('int32')")
    low, high = int(labels.min()), int(labels.max())
    if low < 0:
        raise ValueError(f"a label is {low}, but classes count from 0; drop images without a label")
    if classes is not None and high >= classes:
        raise ValueError(
            f"a label is {high}, but the network has {classes} classes, 0 to {classes - 1}; "
            "pass labels from its class list"
            + (", counted from 0: labels - 1" if low > 0 and high == classes else "")
        )


def verified(
    images_adv: _Images, images: _Images, labels: _Labels, logits: _Logits, threat: Threat
) -> tuple[_Mask, _Norms]:
    """Tell which images are adversarial examples, and measure their perturbations in float64.

    An example is finite, in [0, 1], misclassified by `logits`, and within `most` of the radius.
    """
    count = len(images_adv)
    norms, inside = np.zeros(count), np.zeros(count, bool)
    for i in range(count):  # one by one: float64 copies of all images would not fit
        adversarial, clean = (np.asarray(a[i], np.float64) for a in (images_adv, images))
        with np.errstate(invalid="ignore", over="ignore"):
            norms[i] = length(adversarial - clean, threat.norm)
            inside[i] = ((adversarial >= 0) & (adversarial <= 1)).all()  # False for NaN
    return inside & ~is_right(logits, labels) & (norms <= most(threat.epsilon)), norms


def length(delta: np.ndarray, norm: str) -> float:
    """Compute the norm of a perturbation f[H,W,C]; l0 counts pixels, not entries."""
    values = np.abs(delta).max(axis=-1) if norm == "l0" else delta
    return float(np.linalg.norm(values.ravel(), ORDER[norm]))


def most(epsilon: float) -> float:
    """Compute the largest norm that counts as within a radius, allowing for rounding."""
    return epsilon * (1 + 1e-5) + 1e-6


def binomial_interval(successes: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Compute the Clopper-Pearson interval of a probability after `successes` in `n` trials.

    It covers the probability with confidence `level` or more, and is (0, 1) for n=0.
    """
    if not 0 <= successes <= n:
        raise ValueError(f"successes={successes} of n={n}; pass counts with 0 <= successes <= n")
    if not 0 < level < 1:
        raise ValueError(f"level={level} is not a probability; 95% is 0.95")
    from scipy.special import betaincinv  # JAX depends on SciPy; its import takes 0.1 s

    tail = (1 - level) / 2
    low = float(betaincinv(successes, n - successes + 1, tail)) if successes else 0.0
    high = float(betaincinv(successes + 1, n - successes, 1 - tail)) if successes < n else 1.0
    return low, high


def upper_bound(successes: int, n: int, level: float = 0.95) -> float:
    """Bound a probability from above: Clopper and Pearson's one-sided bound at confidence `level`.

    With no event in n trials it is close to 3 / n, the rule of three. It raises the errors of
    `binomial_interval`.

    >>> round(upper_bound(0, 64), 4)
    0.0457
    """
    return binomial_interval(successes, n, 2 * level - 1)[1]


def is_right(logits: _Logits, labels: _Labels) -> _Mask:
    """Mark images whose label has the largest logit of f[n,K], all finite, bool[n]."""
    logits = np.asarray(logits)
    return np.asarray((logits.argmax(axis=1) == np.asarray(labels)) & answered(logits))


def answered(logits: _Logits) -> _Mask:
    """Mark images whose logits f[n,K] are all finite, bool[n]; others have no answer."""
    return np.asarray(np.isfinite(logits).all(axis=1))
