"""What the convolutional networks of this folder share: checks of rows, rows of names."""

from typing import Any

from jaxrobust.models.activations import ACTIVATIONS
from jaxrobust.models.renaming import (
    BATCH_NORM_COUNT,
    Row,
    conv_oihw,
    linear_oi,
    row,
)


def check(variant: Any, **lows: int) -> None:
    """Raise `ValueError` for fields of a row below these, and for an unknown activation."""
    for name, low in lows.items():
        if (value := getattr(variant, name)) < low:
            raise ValueError(f"{name}={value} must be at least {low}")
    if variant.activation not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise ValueError(f"activation={variant.activation!r} is unknown; one of {known}")


def check_depths(depths: tuple[int, ...]) -> None:
    """Raise `ValueError` for no stages, and for stages without blocks."""
    if not depths or any(n < 1 for n in depths):
        raise ValueError(f"depths={depths!r} must be a tuple of positive integers")


def check_halvings(image_size: int, halvings: int) -> None:
    """Raise `ValueError` for images that cannot be halved so often, rests left out."""
    if image_size < 1 << halvings:
        raise ValueError(
            f"image_size={image_size}: the map is halved {halvings} times, so take at least "
            f"{1 << halvings}"
        )


def rows(conv: str, norm: str, linear: str = r"(linear)") -> list[Row]:
    """Return the rows of convolutions, batch norms and linear maps that keep their names.

    Each pattern has one group, which is the name here.
    """
    return [
        row(conv + r"\.weight", r"\1.kernel", conv_oihw),
        row(conv + r"\.bias", r"\1.bias"),
        row(norm + r"\.weight", r"\1.scale"),
        row(norm + r"\.bias", r"\1.bias"),
        row(norm + r"\.running_(mean|var)", r"\1.\2"),
        row(linear + r"\.weight", r"\1.kernel", linear_oi),
        row(linear + r"\.bias", r"\1.bias"),
        BATCH_NORM_COUNT,
    ]
