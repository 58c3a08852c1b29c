"""What is fixed about ImageNet's files: their names, labels and numbers."""

import functools
import importlib.util
import re
from pathlib import Path
from typing import NamedTuple

from jaxrobust.data.splits.known_sizes import IMAGES

IMAGENET = "imagenet2012"
VALIDATION_NAME = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG")
PARTIAL = "--allow_partial takes what is there"
_TRAIN_NAME = re.compile(r"(n\d{8})_\d+\.\w+")


class KnownImages(NamedTuple):
    """ImageNet's synsets in the order of labels, those of its validation images, its sizes."""

    synsets: tuple[str, ...]
    validation: tuple[str, ...]  # in the order of the images' numbers
    sizes: dict[str, int]


class TarredImage(NamedTuple):
    """One image: its name, its path under the split's folder, label, place in a tar file, bytes."""

    name: str
    place: str
    label: int
    offset: int
    size: int


@functools.cache
def known() -> KnownImages:
    """Return the lists that jaxrobust and the installed tensorflow_datasets hold."""
    from jaxrobust.data import imagenet

    sizes = IMAGES[IMAGENET]
    path = package_folder() / "validation_labels.txt"
    try:
        validation = tuple(path.read_text().split())
    except OSError as error:
        raise ValueError(f"{error}; reinstall tensorflow-datasets") from error
    if len(validation) != sizes["validation"] or set(validation) != set(imagenet.synsets()):
        raise ValueError(f"{path} is damaged; reinstall tensorflow-datasets")
    return KnownImages(imagenet.synsets(), validation, sizes)


def package_folder() -> Path:
    """Where tensorflow_datasets keeps what it knows of ImageNet, found without importing it."""
    spec = importlib.util.find_spec("tensorflow_datasets")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError("tensorflow_datasets has the labels: pip install tensorflow-datasets")
    return Path(spec.submodule_search_locations[0]) / "datasets" / IMAGENET


def validation_label(where: object, name: str) -> int:
    """Return the label of a validation image, by the number in its name."""
    synsets, validation, _ = known()
    match = VALIDATION_NAME.fullmatch(name)
    if not match or not 1 <= int(match[1]) <= len(validation):
        raise ValueError(f"{where}: {name} is not the name of one of ImageNet's validation images")
    return synsets.index(validation[int(match[1]) - 1])


def check_synset(where: object, name: str, synset: str) -> None:
    """Refuse an image whose name says another class; in wrong folders is a known accident."""
    match = _TRAIN_NAME.fullmatch(name)
    right = match[1] if match else synset
    if VALIDATION_NAME.fullmatch(name):
        right = known().synsets[validation_label(where, name)]
    if right != synset:
        raise ValueError(f"{where}: {name} is an image of {right}, not of {synset}")
