"""Checks of a row that several architectures make; each names the field and what it must be."""

from typing import Any


def check_least(v: Any, **lows: int) -> None:
    """Raise `ValueError` for fields of a row below these."""
    for name, low in lows.items():
        if (value := getattr(v, name)) < low:
            raise ValueError(f"{name}={value} must be at least {low}")


def check_tuples(v: Any, *names: str) -> None:
    """Raise `ValueError` where these fields are no tuples of positive integers."""
    for name in names:
        values = getattr(v, name)
        if not values or any(n < 1 for n in values):
            raise ValueError(f"{name}={values!r} must be a tuple of positive integers")


def check_stages(v: Any, *names: str) -> None:
    """Raise `ValueError` where these fields do not have a positive number for each stage."""
    check_tuples(v, *names)
    first = getattr(v, names[0])
    for name in names[1:]:
        if len(values := getattr(v, name)) != len(first):
            raise ValueError(f"{name}={values} and {names[0]}={first} must have the same length")


def check_image_size(image_size: int) -> None:
    """Raise `ValueError` for images without pixels."""
    if image_size < 1:
        raise ValueError(f"image_size={image_size} must be at least 1")
