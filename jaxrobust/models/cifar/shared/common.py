"""What the networks of this folder share: convolutions, checks of rows, names of weights."""

from collections.abc import Iterator, Sequence
from typing import Any

from jaxrobust.models.interface.renaming import (
    BATCH_NORM_COUNT,
    Row,
    conv_rows,
    linear_rows,
    norm_rows,
)
from jaxrobust.models.modules.activations import ACTIVATIONS
from jaxrobust.models.modules.basic import Conv
from jaxrobust.models.modules.initializers import Draws


def conv(
    ins: int,
    outs: int,
    kernel: int,
    rngs: Draws,
    stride: int = 1,
    *,
    groups: int = 1,
    bias: bool = False,
) -> Conv:
    """Return a convolution that keeps the size, but for its stride, drawn as PyTorch does."""
    how: dict[str, Any] = {"stride": stride, "padding": kernel // 2, "groups": groups, "bias": bias}
    return Conv(ins, outs, kernel, torch_init=True, rngs=rngs, **how)


def check(variant: Any, **lows: int) -> None:
    """Raise `ValueError` for fields of a row below these, and for an unknown activation."""
    for name, low in lows.items():
        if (value := getattr(variant, name)) < low:
            raise ValueError(f"{name}={value} must be at least {low}")
    if variant.activation not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise ValueError(f"activation={variant.activation!r} is unknown; one of {known}")


def check_tuples(variant: Any, *names: str) -> None:
    """Raise `ValueError` where these fields are no tuples of positive integers."""
    for name in names:
        values = getattr(variant, name)
        if not values or any(n < 1 for n in values):
            raise ValueError(f"{name}={values!r} must be a tuple of positive integers")


def check_stages(variant: Any, *names: str) -> None:
    """Raise `ValueError` where these fields do not have a positive number for each stage."""
    check_tuples(variant, *names)
    first = getattr(variant, names[0])
    for name in names[1:]:
        if len(values := getattr(variant, name)) != len(first):
            raise ValueError(f"{name}={values} and {names[0]}={first} must have the same length")


def check_image_size(image_size: int) -> None:
    """Raise `ValueError` for images without pixels."""
    if image_size < 1:
        raise ValueError(f"image_size={image_size} must be at least 1")


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
    maps = [*conv_rows(conv, r"\1"), *norm_rows(norm, r"\1"), *linear_rows(linear, r"\1")]
    return [*maps, BATCH_NORM_COUNT]


def blocks(depths: Sequence[int], stem: int, first: int) -> Iterator[tuple[str, bool]]:
    """Yield each residual block's name, and whether there is a convolution in its shortcut.

    Args:
      depths: blocks of each stage; the first one of each stage but the first has a stride.
      stem: channels before the first stage.
      first: channels behind a block of the first stage; they double with each stage.
    """
    ins = stem
    for i, depth in enumerate(depths):
        for j in range(depth):
            yield f"layer{i + 1}.{j}", ins != first << i or (i > 0 and j == 0)
            ins = first << i
