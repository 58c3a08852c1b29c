"""Networks: `available()` lists them, `create(name)` makes one."""

import difflib

from jaxrobust.models import convnext
from jaxrobust.names import Row
from jaxrobust.types import Classifier

DTYPES = ("float32", "bfloat16", "float16", "float64")
_FAMILY = {name: convnext for name in convnext.VARIANTS}


def available() -> list[str]:
    """The names that `create` accepts."""
    return sorted(_FAMILY)


def create(name: str, *, num_classes: int = 1000, image_size: int = 224, **overrides) -> Classifier:
    """The network `name` as a pair of pure functions.

    Args:
      name: one of `available()`.
      num_classes: width of the logits.
      image_size: side of the square input, pixels.
      **overrides: fields of the family's row, e.g. `in_channels=1`, `dtype="bfloat16"`,
        `remat=True`, `stem_strides=(1, 1)`.
    Raises:
      ValueError: unknown name or override, or a size that the network cannot take.
    """
    family = _FAMILY[known(name)]
    variant = family.VARIANTS[name]
    unknown = overrides.keys() - set(variant._fields)
    if unknown:
        raise ValueError(
            f"unknown option {sorted(unknown)} for {name}; it takes {list(variant._fields)}"
        )
    if num_classes < 2:
        raise ValueError(f"num_classes={num_classes}: a classifier needs at least 2 classes")
    variant = variant._replace(**overrides)
    if variant.dtype not in DTYPES:
        raise ValueError(f"dtype={variant.dtype!r} is not a compute type; one of {DTYPES}")
    return family.create(variant, num_classes=num_classes, image_size=image_size)


def torch_names(name: str) -> list[Row]:
    """The rows that turn the reference's weight names into ours."""
    return _FAMILY[known(name)].TORCH_NAMES


def known(name: str) -> str:
    """The name itself, or `ValueError` with the nearest names."""
    if name not in _FAMILY:
        near = difflib.get_close_matches(name, available(), n=3) or available()
        raise ValueError(f"unknown model {name!r}; did you mean {', '.join(near)}?")
    return name


__all__ = ["available", "create", "known", "torch_names"]
