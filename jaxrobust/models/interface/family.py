"""What the rest of the package needs to know about an architecture; ends the architecture's file.

The optimizer, the table, conversion, export and certificates read it, so a new architecture is one
file and one line of `models/names.py`.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple, Self, dataclass_transform

import numpy as np

from jaxrobust.models.interface.renaming import Naming, Renaming
from jaxrobust.types import ModuleMaker

_NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclass_transform(frozen_default=True)
class _Fields:
    """Makes frozen dataclasses of its subclasses, with the methods of a `NamedTuple`."""

    _fields: ClassVar[tuple[str, ...]]  # shared ones last

    def __init_subclass__(cls, **options: Any) -> None:
        dataclasses.dataclass(frozen=True, **options)(cls)
        rows = sorted(dataclasses.fields(cls), key=lambda row: bool(row.kw_only))  # type: ignore
        cls._fields = tuple(field.name for field in rows)

    def _asdict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._fields}

    def _replace(self, **changes: Any) -> Self:
        return dataclasses.replace(self, **changes)  # type: ignore[type-var]


class VariantRow(_Fields, kw_only=True):
    """A row of an architecture's table: `models.create` can override every field."""

    drop_path: float = 0.0  # of the last block; grows linearly from 0 at the first
    in_channels: int = 3
    remat: bool = False  # recompute each block in the backward pass instead of storing it
    dtype: str = "float32"  # compute type; parameters stay float32


class BatchNormRow(VariantRow, kw_only=True):
    """A row of a network with batch norms."""

    bn_group: int = 0  # images per group of batch statistics in training; 0: the whole batch


class PaperFigures(NamedTuple):
    """What a paper reports: millions of parameters, 1e9 multiply-adds; None: not reported."""

    parameters: str | None
    multiply_adds: str
    misprint: bool = False
    other: bool = False  # for a network with other classes, or one that the paper does not define


class TorchVariant(NamedTuple):
    """The PyTorch counterpart of a variant, and how it is modified."""

    base: str  # timm's name; if it ends in ".py", a file of tests/support/torch_files
    options: Mapping[str, Any] = _NOTHING  # for its constructor
    strides: tuple[int, ...] = ()  # of the first convolutions of XCiT's stem


class Member(NamedTuple):
    """What is known about a variant beyond its row."""

    reference: TorchVariant
    # Singh, Croce, Hein 2023 (arXiv 2303.01870), Tables 14 and 2; GFLOPs from Debenedetti's thesis;
    # for networks at 32 px Huang et al. 2022 (arXiv 2212.11005), Table 2, and Tang et al. 2022
    # (arXiv 2209.14105), Table 1.
    paper: PaperFigures | None = None
    counted_at: int = 224  # side of the images for which multiply-adds are counted
    num_classes: int = 1000  # of the counted network
    title: str = ""  # on leaderboards; empty: the family's, with the size from the variant's name
    decay_mask: str = ""  # empty: the family's


class Names(NamedTuple):
    """Parameter names, here and on the PyTorch side."""

    torch: Sequence[Renaming]  # from the reference's names to ours
    keys: Callable[[Any], list[str]]  # a row's names there, in order
    stem: str  # a pattern of our names, redrawn by `init.stem=fresh`
    head: str  # the same for `init.head=fresh`
    others: Sequence[Naming] = ()  # for example, the first authors' names
    # Reads options from array shapes under our names, for messages.
    options: Callable[[Mapping[str, tuple[int, ...]]], dict[str, Any]] | None = None
    # What some files contain besides weights, for a row and an image size.
    made: Callable[[Any, int], dict[str, np.ndarray]] | None = None


class Family(NamedTuple):
    """An architecture: its variants, and how to build, name, train and compare them."""

    file: str  # name of the file, here and in tests/support/torch_files
    title: str  # on leaderboards
    variants: Mapping[str, Any]  # name -> row
    maker: Callable[..., ModuleMaker]  # (row, *, num_classes, image_size)
    names: Names
    members: Mapping[str, Member]  # name -> what else is known about it
    decay_mask: str  # which parameters decay: a key of `optim.DECAY_MASKS`
    any_size: bool = False  # whether no weight depends on the image size
    compared: Mapping[str, str] = _NOTHING  # what a certificate says about the comparison
