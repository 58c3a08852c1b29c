"""Networks: `available()` lists them, `create(name)` makes one."""

import difflib
from types import ModuleType

from jaxrobust.models import cait, convnext, iso_convnext, resnet, swin, vit, xcit
from jaxrobust.names import Naming, Row
from jaxrobust.types import Classifier

DTYPES = ("float32", "bfloat16", "float16", "float64")
_FAMILIES = (convnext, resnet, iso_convnext, vit, cait, xcit, swin)
_FAMILY = {name: family for family in _FAMILIES for name in family.VARIANTS}


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
        `drop_path=0.1`, `remat=True`, `scan=True`, `stem_strides=(1, 1)`.
    Raises:
      ValueError: unknown name or override, or a size that the network cannot take.
    """
    row = variant(name, **overrides)
    if num_classes < 2:
        raise ValueError(f"num_classes={num_classes}: a classifier needs at least 2 classes")
    if row.dtype not in DTYPES:
        raise ValueError(f"dtype={row.dtype!r} is not a compute type; one of {DTYPES}")
    if not 0 <= row.drop_path < 1:
        raise ValueError(f"drop_path={row.drop_path} is a probability: at least 0 and below 1")
    return family(name).create(row, num_classes=num_classes, image_size=image_size)


def variant(name: str, **overrides):
    """The family's row of `name` with fields replaced; `ValueError` for an unknown one."""
    row = family(name).VARIANTS[name]
    unknown = overrides.keys() - set(row._fields)
    if unknown:
        raise ValueError(
            f"unknown option {sorted(unknown)} for {name}; it takes {list(row._fields)}"
        )
    return row._replace(**overrides)


def family(name: str) -> ModuleType:
    """The file of the architecture: its table, its names, and where its stem and head are."""
    return _FAMILY[known(name)]


def torch_names(name: str) -> list[Row]:
    """The rows that turn the reference's weight names into ours."""
    return family(name).TORCH_NAMES


def other_names(name: str) -> list[Naming]:
    """Further namings of the same weights, such as those of an architecture's first authors."""
    return getattr(family(name), "OTHER_NAMES", [])


def torch_keys(name: str, **overrides) -> list[str]:
    """The reference's names of all weights, in its order."""
    return family(name).torch_keys(variant(name, **overrides))


def known(name: str) -> str:
    """The name itself, or `ValueError` with the nearest names."""
    if name not in _FAMILY:
        near = difflib.get_close_matches(name, available(), n=3) or available()
        raise ValueError(f"unknown model {name!r}; did you mean {', '.join(near)}?")
    return name


__all__ = [
    "available",
    "create",
    "family",
    "known",
    "other_names",
    "torch_keys",
    "torch_names",
    "variant",
]
