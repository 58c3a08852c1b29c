"""Shared names of weights and tables of the study's networks."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from jaxrobust.models.interface.family import Family, Member, Names, PaperFigures, TorchVariant
from jaxrobust.models.interface.renaming import BATCH_NORM_COUNT, Renaming, table
from jaxrobust.types import ModuleMaker


def rows(conv: str, norm: str, linear: str = r"(linear)") -> list[Renaming]:
    """List the rows of convolutions, batch norms and linear maps that keep their names.

    Each pattern has one group, which is our name.
    """
    return table(
        BATCH_NORM_COUNT, convs={conv: r"\1"}, norms={norm: r"\1"}, linears={linear: r"\1"}
    )


class Study(NamedTuple):
    """One network of a family of the study."""

    title: str  # on leaderboards
    options: Mapping[str, Any] = MappingProxyType({})  # for its row and its PyTorch file
    more: Mapping[str, Any] = MappingProxyType({})  # for its row only
    counted: str = ""  # millions of parameters as printed in the study, for 32 px
    other: bool = False  # whether this count belongs to another network


def family(
    file: str,
    title: str,
    variant: Callable[..., Any],
    maker: Callable[..., ModuleMaker],
    names: Names,
    networks: Mapping[str, Study],
    any_size: bool = True,
) -> Family:
    """Make a family of networks for 10 classes, see `Family`; `variant` makes a row."""

    def member(study: Study) -> Member:
        plain = Member(TorchVariant(f"{file}.py", study.options), num_classes=10, title=study.title)
        if not study.counted:
            return plain
        return plain._replace(
            paper=PaperFigures(study.counted, "", other=study.other), counted_at=32
        )

    members = {name: member(study) for name, study in networks.items()}
    variants = {name: variant(**study.options, **study.more) for name, study in networks.items()}
    return Family(file, title, variants, maker, names, members, "all", any_size=any_size)


def refusing(name: str) -> Callable[[np.ndarray, tuple[int, ...]], np.ndarray]:
    """Return a `resize` that raises `ValueError`, for weights that fit only one image size."""

    def refused(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        raise ValueError(
            f"{name} have shape {array.shape}, but this network needs {shape}; give the image_size "
            "and options that the weights were trained with"
        )

    return refused
