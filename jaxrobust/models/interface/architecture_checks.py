"""Checks of rows, images and weights that several architectures share."""

import math
from typing import Any

from jaxrobust.models.modules.basic import ACTIVATIONS
from jaxrobust.types import Array


def check_least(v: Any, **lows: int) -> None:
    """Raise `ValueError` for fields of a row below these minimums."""
    for name, low in lows.items():
        if (value := getattr(v, name)) < low:
            raise ValueError(f"{name}={value} must be at least {low}")


def check_tuples(v: Any, *names: str, empty: bool = False) -> None:
    """Raise `ValueError` unless these fields are tuples of positive integers, perhaps `empty`."""
    for name in names:
        values = getattr(v, name)
        if not (values or empty) or any(n < 1 for n in values):
            raise ValueError(f"{name}={values!r} must be a tuple of positive integers")


def check_stages(v: Any, *names: str) -> None:
    """Raise `ValueError` unless these fields have one positive number per stage."""
    check_tuples(v, *names)
    first = getattr(v, names[0])
    for name in names[1:]:
        if len(values := getattr(v, name)) != len(first):
            raise ValueError(f"{name}={values} and {names[0]}={first} must have the same length")


def whole_patches(v: Any, image_size: int) -> int:
    """Count a stem's patches along a side; `ValueError` if the last one is incomplete."""
    patch = math.prod(v.stem_strides)
    if image_size < patch or image_size % patch:
        near = max(patch, round(image_size / patch) * patch)
        raise ValueError(
            f"image_size={image_size} is not a whole number of patches of {patch} px; use "
            f"image_size={near}, or other stem_strides"
        )
    return image_size // patch


def check_fits(fits: bool, images: Array, actual: str, expected: str) -> None:
    """Raise `ValueError`, with both counts of positions, unless the images fit the network."""
    if not fits:
        raise ValueError(
            f"images of {images.shape[1]}x{images.shape[2]} px give {actual}, but this network has "
            f"{expected}; create it, and convert its weights, for images of this size"
        )


def check_row(v: Any, **lows: int) -> None:
    """Raise `ValueError` for fields of a row below these minimums or an unknown activation."""
    check_least(v, **lows)
    if v.activation not in ACTIVATIONS:
        names = ", ".join(ACTIVATIONS)
        raise ValueError(f"activation={v.activation!r} is unknown; choose one of {names}")


def check_halvings(image_size: int, halvings: int) -> None:
    """Raise `ValueError` for images too small for this many halvings, rounding down."""
    if image_size < 1 << halvings:
        raise ValueError(
            f"image_size={image_size}: the map is halved {halvings} times, so use at least "
            f"{1 << halvings}"
        )
