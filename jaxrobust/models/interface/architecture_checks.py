"""Checks that several architectures make, of rows, images and weights; each names what must be."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from jaxrobust.models.modules.basic import ACTIVATIONS
from jaxrobust.types import Array


def check_least(v: Any, **lows: int) -> None:
    """Raise `ValueError` for fields of a row below these."""
    for name, low in lows.items():
        if (value := getattr(v, name)) < low:
            raise ValueError(f"{name}={value} must be at least {low}")


def check_tuples(v: Any, *names: str, empty: bool = False) -> None:
    """Raise `ValueError` where these fields are no tuples of positive integers, `empty` or not."""
    for name in names:
        values = getattr(v, name)
        if not (values or empty) or any(n < 1 for n in values):
            raise ValueError(f"{name}={values!r} must be a tuple of positive integers")


def check_stages(v: Any, *names: str) -> None:
    """Raise `ValueError` where these fields do not have a positive number for each stage."""
    check_tuples(v, *names)
    first = getattr(v, names[0])
    for name in names[1:]:
        if len(values := getattr(v, name)) != len(first):
            raise ValueError(f"{name}={values} and {names[0]}={first} must have the same length")


def whole_patches(v: Any, image_size: int) -> int:
    """Count the patches of a stem along a side.

    Raises:
      ValueError: the last one is cut.
    """
    patch = math.prod(v.stem_strides)
    if image_size < patch or image_size % patch:
        near = max(patch, round(image_size / patch) * patch)
        raise ValueError(
            f"image_size={image_size} is not a whole number of patches of {patch} px; use "
            f"image_size={near}, or other stem_strides"
        )
    return image_size // patch


def check_fits(fits: bool, images: Array, made: str, own: str) -> None:
    """Raise `ValueError` where images have other positions, `made`, than the network, `own`."""
    if not fits:
        raise ValueError(
            f"images of {images.shape[1]}x{images.shape[2]} px give {made}, this network has {own}"
            ": create it, and convert its weights, with their image_size"
        )


def refusing(what: str) -> Callable[[np.ndarray, tuple[int, ...]], np.ndarray]:
    """Return a `resize` that raises `ValueError`, for weights that belong to one size of images."""

    def refused(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        raise ValueError(
            f"{what} of shape {array.shape}, and this network has {shape}; give the image_size "
            "and options that the weights were trained with"
        )

    return refused


def check_row(v: Any, **lows: int) -> None:
    """Raise `ValueError` for fields of a row below these, and for an unknown activation."""
    check_least(v, **lows)
    if v.activation not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise ValueError(f"activation={v.activation!r} is unknown; one of {known}")


def check_halvings(image_size: int, halvings: int) -> None:
    """Raise `ValueError` for images that cannot be halved so often, rests left out."""
    if image_size < 1 << halvings:
        raise ValueError(
            f"image_size={image_size}: the map is halved {halvings} times, so take at least "
            f"{1 << halvings}"
        )
