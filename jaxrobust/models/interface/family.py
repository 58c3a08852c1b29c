"""What others need to know of an architecture: the last lines of its file.

The optimiser, the table, conversion, export and certificates read it, so that a new architecture
is one file and one line of `models/names.py`.
"""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from jaxrobust.models.interface.renaming import Naming, Renaming
from jaxrobust.types import ModuleMaker

_NOTHING: Mapping[str, Any] = MappingProxyType({})


class PaperFigures(NamedTuple):
    """What a paper prints: millions of parameters, 1e9 multiply-adds; None: nothing."""

    parameters: str | None
    multiply_adds: str
    misprint: bool = False
    other: bool = False  # of a network of other classes, or of one that it does not define


class TorchVariant(NamedTuple):
    """What the PyTorch side of a variant is called, and what is changed in it."""

    base: str  # timm's name; with ".py", a file of tests/support/torch_files
    options: Mapping[str, Any] = _NOTHING  # of its constructor
    strides: tuple[int, ...] = ()  # of the first convolutions of XCiT's stem


class Member(NamedTuple):
    """What is known of one variant in addition to its row."""

    reference: TorchVariant
    # Singh, Croce, Hein 2023 (arXiv 2303.01870), Tables 14 and 2; GFLOPs of Debenedetti's thesis;
    # of networks at 32 px Huang et al. 2022 (arXiv 2212.11005), Table 2, and Tang et al. 2022
    # (arXiv 2209.14105), Table 1.
    paper: PaperFigures | None = None
    counted_at: int = 224  # side of the images at which multiply-adds are counted
    num_classes: int = 1000  # of the network that is counted
    title: str = ""  # on leaderboards; empty: that of the family, with the size from its name
    decay_mask: str = ""  # empty: that of the family


class Names(NamedTuple):
    """What the parameters are called, here and on the PyTorch side."""

    torch: Sequence[Renaming]  # from the reference's names to ours
    keys: Callable[[Any], list[str]]  # a row's names there, in their order
    stem: str  # a pattern of our names: what `init.stem=fresh` draws
    head: str  # the same of `init.head=fresh`
    others: Sequence[Naming] = ()  # such as those of the first authors
    # The options read from the shapes of arrays under our names, for messages.
    options: Callable[[Mapping[str, tuple[int, ...]]], dict[str, Any]] | None = None
    # What some files hold in addition to weights, for a row and an image size.
    made: Callable[[Any, int], dict[str, np.ndarray]] | None = None


class Family(NamedTuple):
    """An architecture: its variants, how they are made, named, trained and compared."""

    file: str  # the file's name, here and in tests/support/torch_files
    title: str  # on leaderboards
    variants: Mapping[str, Any]  # name -> row
    maker: Callable[..., ModuleMaker]  # (row, *, num_classes, image_size)
    names: Names
    members: Mapping[str, Member]  # name -> what else is known
    decay_mask: str  # which parameters are decayed: a key of `optim.DECAY_MASKS`
    any_size: bool = False  # whether no weight depends on the image size
    compared: Mapping[str, str] = _NOTHING  # what a certificate adds about the comparison
