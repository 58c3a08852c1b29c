"""Checks of attack inputs: settings, images, labels, keys and starts."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrobust import types as t
from jaxrobust.attacks.geometry.balls import GEOMETRIES, draw
from jaxrobust.attacks.losses import Goal


def check_settings(
    *,
    norm: str,
    epsilon: float | t.Array,
    steps: int = 1,
    step_size: float | None = None,
    kept_fraction: float = 1.0,
) -> None:
    """Raise `ValueError` for invalid settings, before anything compiles."""
    t.check_norm(norm)
    if not isinstance(epsilon, jax.core.Tracer):  # inside `jit`, the caller has checked
        radius: Any = epsilon
        if isinstance(epsilon, jax.Array) and epsilon.size:
            radius = float(np.asarray(epsilon).max())
        t.check_radius(norm, radius)
    if not t.is_count(steps):
        raise ValueError(f"steps={steps!r} must be an int >= 1")
    if step_size is not None:
        if not 0 < t.check_number("step_size", step_size) < math.inf:
            raise ValueError(
                f"step_size={step_size} must be a finite number > 0, or None for the default"
            )
        t.check_length("step_size", step_size, norm)
    if not 0 < t.check_number("kept_fraction", kept_fraction) <= 1:
        raise ValueError(
            f"kept_fraction={kept_fraction} must be a fraction of the entries, above 0 and at "
            "most 1"
        )


def check_pixels(pixels: Any, *, of: int | None = None) -> None:
    """Reject anything but pixel counts from 1 to below an image's `of`, unless traced."""
    if isinstance(pixels, jax.core.Tracer):
        return
    numbers = np.asarray(pixels)
    if numbers.dtype.kind not in "iuf" or (numbers % 1).any() or numbers.min() < 1:
        raise ValueError(f"pixels={pixels!r} must be an int >= 1")
    if of is not None and numbers.max() >= of:
        raise ValueError(f"pixels={numbers.max():g} must be less than the {of} pixels of an image")


def check_no_targets(goal: Goal) -> None:
    """Reject the targeted loss where targets cannot be given."""
    if goal.aims:
        raise ValueError(
            "loss='dlr-targeted' needs a target class per image, which this attack does not "
            "accept; use apgd_run(..., targets=...) or loss='dlr'"
        )


def target_classes(targets: Any, count: int) -> t.Labels:
    """Convert target classes to an array i[count]; raise if they are not."""
    classes: t.Labels = jnp.asarray(targets)
    if classes.shape != (count,) or not jnp.issubdtype(classes.dtype, jnp.integer):
        raise ValueError(
            f"targets are {classes.dtype} of shape {classes.shape}; pass one class per image"
        )
    return classes


def check_array(name: str, value: Any) -> None:
    """Raise `ValueError` for anything but an array or a list that could become one."""
    if isinstance(value, jax.Array):
        return
    try:
        kind = np.asarray(value).dtype.kind
    except (TypeError, ValueError, RuntimeError):  # a ragged list, or a tensor on another device
        kind = "O"
    if kind in "OUS":
        raise ValueError(
            f"{name} are of type {type(value).__name__}, not an array of numbers; pass one array, "
            f"for a list of batches np.concatenate([*{name}])"
        )


def check_inputs(images: Any, labels: Any, *, logits: bool = True) -> tuple[t.Points, Any]:
    """Convert images and labels to JAX arrays; `ValueError` if they do not match.

    Without `logits`, labels are the targets of a loss: any pytree with an image axis, or None.
    """
    check_array("images", images)
    images = jnp.asarray(images)
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(
            f"images are {images.dtype}, but attacks need floats in [0, 1]; "
            "divide uint8 images by 255 first"
        )
    if images.size == 0:
        raise ValueError(f"no images given (shape {images.shape}); pass at least one")
    if _is_here(images):
        with jax.ensure_compile_time_eval():
            is_finite = bool(jnp.isfinite(images).all())
        if not is_finite:
            raise ValueError("images contain NaN or infinite pixels; remove these images")
    if not logits:
        return images, jax.tree.map(partial(_target, count=len(images)), labels)
    check_array("labels", labels)
    labels = jnp.asarray(labels)
    if labels.shape[:1] != images.shape[:1] or labels.ndim not in (1, 2):
        one = "; for a single image, pass images[None]" if images.ndim == 3 else ""
        raise ValueError(
            f"labels of shape {labels.shape} do not fit {images.shape[0]} images; "
            f"pass i32[B] or f[B, C]{one}"
        )
    if not jnp.issubdtype(labels.dtype, jnp.integer if labels.ndim == 1 else jnp.floating):
        raise ValueError(
            f"labels are {labels.dtype} of shape {labels.shape}; pass class labels as integers "
            "[B], soft targets as floats [B, C]"
        )
    return images, labels


def _target(leaf: t.Array, *, count: int) -> t.Array:
    check_array("targets", leaf)
    leaf = jnp.asarray(leaf)
    if leaf.shape[:1] != (count,):
        raise ValueError(
            f"targets of shape {leaf.shape} do not fit {count} images; pass one target per image "
            "along the first axis, or close over values that all images share"
        )
    return leaf


def check_search(attack: str, images: t.Points, start: Any) -> None:
    """Reject images without pixels, and any start other than the random one."""
    if not (isinstance(start, str) and start == "random"):
        raise ValueError(f"{attack} only supports a random start; pass start='random' and keys [B]")
    if images.ndim != 4:
        raise ValueError(f"{attack} needs images f[B, H, W, C], got shape {images.shape}")


def check_radii(epsilon: float | t.Array, images: t.Points) -> None:
    """Reject radii that are neither a single one nor one per image."""
    if jnp.shape(epsilon) not in ((), images.shape[:1]):
        raise ValueError(
            f"epsilon of shape {jnp.shape(epsilon)} does not fit {len(images)} images; pass one "
            "radius, or one for each image"
        )


def fillers(images: t.Points) -> tuple[Callable[..., t.PerImage], Callable[..., t.Counts]]:
    """Make functions that fill an array [B] with a float, or an int32."""
    one_each = images.reshape(images.shape[0], -1)[:, 0]
    floats = partial(jnp.full_like, one_each)  # `_like` also copies shard_map's axes
    return floats, partial(floats, dtype=jnp.int32)


def image_keys(key: t.Array | None, batch: int) -> t.Keys:
    """Derive one typed key per image, [B].

    Args:
      key: one key, then image i gets `fold_in(key, i)` (training: i is the position in the global
        batch); or keys [B], used as they are (evaluation: derived from image ids).
      batch: B.
    """
    if key is None:
        raise ValueError("a random start needs a key; pass jax.random.key(seed)")
    dtype = getattr(key, "dtype", np.dtype(object))
    if dtype == jnp.uint32:  # an old-style key
        key = jax.random.wrap_key_data(key)
    elif not jnp.issubdtype(dtype, jax.dtypes.prng_key):
        raise ValueError(f"key={key!r} is not a JAX key; pass jax.random.key(seed)")
    if key.shape == ():
        return jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(batch, dtype=jnp.uint32))
    if key.shape != (batch,):
        raise ValueError(
            f"keys of shape {key.shape} do not fit {batch} images; pass one or {batch}"
        )
    return key


class Noise(NamedTuple):
    """A random start: the image plus noise, as in the TRADES code."""

    normal: bool  # N(0, std^2) per pixel; otherwise uniform in the ball
    std: float = 0.0
    projected: bool = False  # whether to project into ball and box before the first gradient


# Values of `random_start` by name; the std of normal noise is set later.
STARTS: dict[str, bool | Noise] = {
    "image": False,
    "random": True,
    "uniform": Noise(normal=False),
    "uniform-boxed": Noise(normal=False, projected=True),
    "gauss": Noise(normal=True),
    "gauss-boxed": Noise(normal=True, projected=True),
}


def check_noise(noise: bool | Noise, norm: str) -> None:
    """Raise `ValueError` for noise without a positive std, or a ball without uniform points."""
    if not isinstance(noise, Noise):
        return
    if noise.normal and not 0 < t.check_number("std", noise.std) < math.inf:
        raise ValueError(
            f"start noise of std={noise.std} does not change the image; pass a std above 0, such "
            "as 0.001"
        )
    t.check_length("std", noise.std)
    if not noise.normal and not GEOMETRIES[norm].fill:
        raise ValueError(
            f"a uniform start needs {filled()}, not {norm}; use a random or Gaussian start"
        )


def filled() -> str:
    """List the norms with a uniform start."""
    return " and ".join(norm for norm, ball in GEOMETRIES.items() if ball.fill)


def start_points(
    ball: t.Geometry,
    start: t.Start | Noise,
    images: t.Points,
    epsilon: t.PerImage,
    keys: t.Keys | None,
) -> t.Points:
    """Return the first points of an attack, not projected: the images, random ones, or `start`.

    `keys` [B] are used only by random starts and noise.
    """
    if not isinstance(start, str | Noise):
        if start.shape != images.shape:
            raise ValueError(
                f"start of shape {start.shape} does not fit images of shape {images.shape}; "
                "pass one point per image"
            )
        return jnp.asarray(start, images.dtype)  # converts NumPy arrays too
    if start == "image":
        return images
    if isinstance(start, str) and start != "random":
        raise ValueError(f"start={start!r} is unknown; pass 'image', 'random' or an array")
    if keys is None:
        raise ValueError("a random start needs random keys; pass keys [B]")
    if isinstance(start, str):
        return ball.sample(keys, images, epsilon)
    if start.normal:
        return images + start.std * draw(jax.random.normal, keys, images)
    assert ball.fill is not None, "checked"
    return ball.fill(keys, images, epsilon)


def _is_here(values: Any) -> bool:
    """Return True for an array whose values this host can read, which excludes tracers."""
    is_concrete = isinstance(values, jax.Array) and not isinstance(values, jax.core.Tracer)
    return is_concrete and values.is_fully_addressable


def check_classes(name: str, values: Any, classes: int) -> None:
    """Reject a class outside [0, classes) if the values can be read here."""
    if not _is_here(values) or values.ndim != 1:
        return
    numbers = np.asarray(values)
    bad = np.flatnonzero((numbers < 0) | (numbers >= classes))
    if bad.size:
        raise ValueError(
            f"{name}[{bad[0]}]={numbers[bad[0]]} is outside the {classes} classes of the logits; "
            f"pass numbers from 0 to {classes - 1}"
        )
