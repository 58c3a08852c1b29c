"""Sizes of well-known data sets, available even if they are not on this machine.

Sources: Russakovsky et al. 2015 (ImageNet), arXiv 1409.0575; Krizhevsky 2009 (CIFAR); the splits of
TensorFlow Datasets (Oxford Flowers 102, and Caltech 101, whose test split is not listed here).
"""

from jaxrobust.data.source import DataError
from jaxrobust.data.splits import grammar

IMAGES = {  # data set -> split -> images
    "imagenet2012": {"train": 1_281_167, "validation": 50_000},
    "cifar10": {"train": 50_000, "test": 10_000},
    "cifar100": {"train": 50_000, "test": 10_000},
    "oxford_flowers102": {"train": 1_020, "validation": 1_020, "test": 6_149},
    "caltech101": {"train": 3_059},
}
CLASSES = {"imagenet2012": 1000, "cifar10": 10, "cifar100": 100}
CLASSES |= {"oxford_flowers102": 102, "caltech101": 102}
LISTS = {"robustbench": 5_000, "selection": 4_000}  # of ImageNet's validation images


def known_images(dataset: str, split: str) -> int | None:
    """Return the number of images in a split such as `train[:90%]`; None if unknown."""
    name, parsed = dataset.removeprefix("tfds:").partition(":")[0], grammar.parse(split)
    there = IMAGES.get(name, {})
    if parsed is None or parsed.ids is not None:
        return None
    present = grammar.present(parsed.name, there)
    if present is None:
        return None
    try:
        return len(grammar.rows(parsed.part, there[present], dataset))
    except DataError:  # a mistake in the split, reported when it is opened
        return None
