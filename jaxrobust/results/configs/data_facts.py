"""Facts about a data set for a config: sizes, classes, and three disjoint splits."""

import hashlib
import itertools
from collections.abc import Mapping, Sized
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxrobust.data import DataError
from jaxrobust.data.source import Source, first_few, kind_of
from jaxrobust.data.sources import image_folder, registry
from jaxrobust.data.splits import storage
from jaxrobust.data.stream.loading import DecodedImages
from jaxrobust.runtime.text import spelling

SELECTION, TEST = 0.1, 0.2  # shares of a split that must be divided
_LOOKED_AT = 32  # images whose sizes are read
_HELD_OUT = ("test", "validation")  # splits of a data set, the first for the reported numbers


class DataFacts(NamedTuple):
    """A data set as named in a config."""

    name: str  # as `data.name`
    images: int  # of the training split
    classes: tuple[str, ...]  # their names, or numbers if they have none
    channels: int
    sides: tuple[int, int, int]  # pixels of the shorter side: smallest, usual, largest
    same_size: bool  # whether all images are squares of one size
    splits: dict[str, str]  # "train", "selection", "test" -> the split
    divided: str  # how the splits were made, a clause
    lists: Mapping[str, list[str]]  # file name -> the images to list in it


def look(place: str, *, config: Path) -> DataFacts:
    """Inspect a folder of images, an `.npz` file or a named data set.

    `config`: the file to be written; the names of lists of images begin with its name.

    Raises:
      DataError: no images, only one class, unreadable images, nested folders, or too few images to
        divide; says what to do.
    """
    name = named(place)
    if name.startswith(image_folder.PREFIX):
        _check_depth(name)
    sources = _splits(name)
    train = sources["train"] if "train" in sources else sources["all"]
    names = train.classes or tuple(map(str, range(train.num_classes)))
    if len(names) < 2:
        raise DataError(
            f"{train.where()} only has the class {first_few(names)}; a classifier needs at least "
            "two"
        )
    splits, divided, lists = _divided(sources, config)
    every = dict(zip(("train", "selection", "test"), splits, strict=True))
    images: Sized | None = lists.get(every["train"].partition("@")[2])
    if not images:
        images = sources.get(every["train"]) or registry.open_source(name, every["train"])
    return DataFacts(
        name=name,
        images=len(images),
        classes=names,
        channels=train.channels,
        sides=_sides(train),
        same_size=train.image_shape is not None and len(set(train.image_shape[:2])) == 1,
        splits=every,
        divided=divided,
        lists=lists,
    )


def named(place: str) -> str:
    """Turn user input into the name of a data set: a folder, an `.npz` file, or a name.

    An existing folder takes precedence over a data set of that name.

    >>> named("digits"), named("npz:mine.npz"), named("ImageNet-1k"), named("birds/all")
    ('digits', 'npz:mine.npz', 'imagenet2012', 'folder:birds/all')
    """
    path = Path(place)
    if kind_of(place):
        return place
    if path.is_file():
        if path.suffix != ".npz":
            raise DataError(
                f"{place} is not an .npz file; give a folder of class folders, an .npz file with "
                "images and labels, or the name of a data set"
            )
        return f"npz:{place}"
    name = spelling.dataset(place)
    return f"folder:{place}" if path.is_dir() or (name == place and "/" in place) else name


def _splits(name: str) -> dict[str, Source]:
    """Open the usual splits that a data set has; `all` if it has no others."""
    sources, refused = {}, []
    for split in ("train", *_HELD_OUT):
        try:
            sources[split] = registry.open_source(name, split)
        except DataError as error:
            if name.startswith(image_folder.PREFIX) and "no split" not in str(error):
                raise
            refused.append(error)
    if "train" in sources:
        return sources
    try:
        return {"all": registry.open_source(name, "all")}
    except DataError as error:
        raise (refused[0] if "no split" in str(error) else error) from error


def _check_depth(name: str) -> None:
    """Raise if all class folders hold folders, because it is unclear which are the classes."""
    top = storage.place(name.removeprefix(image_folder.PREFIX))
    entries = storage.entries(top)
    if entries is None or image_folder.splits_there(top):
        return
    deeper = [f for f in entries.folders if (inside := storage.entries(top / f)) and inside.folders]
    if deeper and len(deeper) == len(entries.folders):
        raise DataError(
            f"{top / deeper[0]} contains folders instead of images; name the folder that holds "
            f"the class folders, such as {top / deeper[0]}"
        )


def _sides(source: Source) -> tuple[int, int, int]:
    """Measure the shorter sides of some images; raise on a damaged one and name its file."""
    if source.image_shape:
        side = min(source.image_shape[:2])
        return side, side, side
    places = np.linspace(0, len(source) - 1, min(_LOOKED_AT, len(source)))
    images = DecodedImages(source, 0, strict=True)(sorted(set(places.astype(int).tolist())))
    sides = [min(image.shape[:2]) for image, _ in images if image is not None]
    return min(sides), int(np.median(sides)), max(sides)


def _divided(
    sources: Mapping[str, Source], config: Path
) -> tuple[list[str], str, dict[str, list[str]]]:
    """Name splits for training, choosing weights and testing; also return the lists they need."""
    divided = "train" if "train" in sources else "all"
    held_out = [split for split in _HELD_OUT if split in sources]
    if len(held_out) == 2:
        return ["train", "validation", "test"], "the data set has all three", {}
    shares = (SELECTION,) if held_out else (SELECTION, TEST)
    source, percents = sources[divided], " and ".join(f"{share:.0%}" for share in shares)
    words = f"{percents} of {divided} {'is' if held_out else 'are'} held back"
    mixed = True  # whether a part at the end holds all classes; TFDS shuffles its images
    if source.labels is not None:
        last = source.labels[len(source.labels) - round(shares[-1] * len(source.labels)) :]
        mixed = len(np.unique(last)) == len(np.unique(source.labels))
    if mixed:
        bounds = np.cumsum([0, *(round(100 * s) for s in (1 - sum(shares), *shares))])
        parts = [f"{divided}[{a}%:{b}%]" for a, b in itertools.pairwise(bounds)]
        return [*parts, *held_out], words, {}
    files = (f"{config.with_suffix('')}.{key}.txt" for key in ("train", "selection", "test"))
    lists = dict(zip(files, _lists(source, shares), strict=False))
    splits = [*(f"{divided}@{file}" for file in lists), *held_out]
    return splits, f"{words}, equally from each class", lists


def _lists(source: Source, shares: tuple[float, ...]) -> list[list[str]]:
    """Divide each class's files in a folder, or places in an `.npz`: training first, then each
    share.

    Only names decide which are held back, so a copy of the folder is divided in the same way.
    """
    assert source.labels is not None
    lists: list[list[str]] = [[] for _ in range(1 + len(shares))]
    root = str(storage.place(source.name.removeprefix(image_folder.PREFIX)))
    root += "/" if source.split == "all" else f"/{source.split}/"
    is_array = source.name.startswith("npz:")
    for label, name in enumerate(source.classes or range(source.num_classes)):
        places = np.flatnonzero(source.labels == label).tolist()
        files = [str(p) if is_array else source.describe(p).removeprefix(root) for p in places]
        files.sort(key=lambda file: hashlib.sha256(f"jaxrobust new {file}".encode()).digest())
        if len(files) < 2 * len(lists):
            raise DataError(
                f"class {name} of {source.where()} has {len(files)} images, too few for training, "
                f"selection and test; give each class at least {2 * len(lists)}"
            )
        for part, share in zip(lists[1:], shares, strict=True):
            size = max(round(share * len(places)), 1)
            part += sorted(files[:size])
            files = files[size:]
        lists[0] += sorted(files)
    return lists
