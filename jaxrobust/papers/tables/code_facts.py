"""What rows of two papers leave out, and their code, their data or the numbers themselves say.

Sources: nmndeep/revisiting-at, dedeswim/vits-robustness-torch, TensorFlow Datasets.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple


class RowFacts(NamedTuple):
    """Rows of some tables that are alike in `of`, and what is known of them beside."""

    tables: tuple[str, ...]
    of: Mapping[str, Any]  # what such a row says
    more: Mapping[str, Any]
    note: str


_STRIDES = {"stem_strides": (1, 1), "downsample_strides": (1, 2, 2)}
_CIFAR = {"lr": 2e-4, "ema_decay": 0.99}  # of the ConvNeXts' fine-tuning
_SMALL = "settings of fine-tuning that the paper does not give are those of configs/transfer.py."
_FLOWERS = "6,149 images of Flowers are TFDS's test set, which all accuracies fit."
_FLOWERS_THERE = (
    "6,149 images of Flowers are TFDS's test set, which the adversarial rows fit; the clean ones "
    "(89.08, 82.30) do not when rounded."
)
_CALTECH = (
    "6,085 images of Caltech-101 are what 3,059 for training leave of 9,144, and all accuracies "
    "fit them."
)
_WHOLE = "the whole validation set is taken to be meant, for RobustBench's 5,000 images are not."

# What all runs of the light recipe have, beyond the words of the tables; as in `residual`.
LIGHT: dict[str, Any] = {
    **{"optimizer": "adamw", "schedule": "epoch-cosine", "b2": 0.999, "ema_decay": 0.0},
    **{"attack.start": "random", "attack.statistics": "batch"},
}

_FACTS: dict[str, tuple[RowFacts, ...]] = {
    "revisiting_at": (
        RowFacts(("table_6",), {"dataset": "oxford_flowers102"}, {"images": 6149}, _FLOWERS),
        RowFacts(
            ("table_6",),
            {"dataset": "oxford_flowers102", "origin": "authors"},
            {"ema_decay": 0.99},
            _SMALL,
        ),
        RowFacts(
            ("table_6",),
            {"dataset": "cifar10", "origin": "authors"},
            _CIFAR | {"weight_decay": 0.0, "batch_size": 1024},
            _SMALL,
        ),
        RowFacts(
            ("table_6",),
            {"dataset": "cifar100", "origin": "authors"},
            _CIFAR | {"weight_decay": 5e-3, "batch_size": 256},
            _SMALL,
        ),
        RowFacts(
            ("table_6",),
            {"model": "convnext_t_cvst", "train_size": 32},
            {"options": _STRIDES},
            _SMALL,
        ),
        RowFacts(
            ("table_6",),
            {"model": "convnext_b_cvst", "train_size": 32},
            {"options": _STRIDES | {"stem_strides": (1, 1, 1)}},
            _SMALL,
        ),
    ),
    "xcit_light_recipe": (
        RowFacts(("table_7",), {"dataset": "oxford_flowers102"}, {"images": 6149}, _FLOWERS_THERE),
        RowFacts(("table_7",), {"dataset": "caltech101"}, {"images": 6085}, _CALTECH),
        RowFacts(("table_7",), {"objective": "adversarial"}, {"augmentation": "light"}, _SMALL),
        RowFacts(("table_7",), {"objective": "clean"}, {"augmentation": "deit"}, _SMALL),
        RowFacts(
            ("table_8",),
            {},
            {"augmentation": "light-cifar-thesis", "epsilon_warmup_epochs": 0},
            _SMALL,
        ),
        RowFacts(
            ("text_1",),
            {"origin": "authors"},
            {"start": "random", "train_attack": "pgd"},
            "the start is that of 4/255, and two steps of FGSM are PGD's.",
        ),
        RowFacts(("text_3",), {}, {"split": "validation", "images": 50_000}, _WHOLE),
    ),
}


def of_row(paper: str, table: str, row: dict[str, Any]) -> dict[str, Any]:
    """Return a row with what its code or its data say of it."""
    for facts in _applying(paper, table, row):
        row = row | dict(facts.more)
    return row


def notes(paper: str, table: str, rows: list[dict[str, Any]]) -> list[str]:
    """Return the sentences that say where such values of a table come from."""
    said = [facts.note for row in rows for facts in _applying(paper, table, row)]
    return list(dict.fromkeys(said))


def _applying(paper: str, table: str, row: dict[str, Any]) -> list[RowFacts]:
    return [
        facts
        for facts in _FACTS.get(paper, ())
        if table in facts.tables and facts.of.items() <= _plain(row).items()
    ]


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if not isinstance(value, list | dict)}
