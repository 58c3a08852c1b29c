"""What an ImageFolder holds: SPLIT/CLASS/.../FILE, of ImageNet or of any other classes."""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from jaxrobust.data.prepare.known import (
    IMAGENET,
    PARTIAL,
    VALIDATION_NAME,
    TarredImage,
    check_synset,
    known,
    validation_label,
)
from jaxrobust.data.sources.image_folder import ENDINGS, NO_CLASSES

SPLITS = {"train": "train", "val": "validation", "validation": "validation", "test": "test"}


def find(root: Path, name: str | None) -> dict[str, Path]:
    """Return the folder of each split of a data set; ImageNet's test images have no labels."""
    splits = {folder: root / folder for folder in SPLITS if (root / folder).is_dir()}
    if name in (None, IMAGENET) or not any(e.is_dir() for e in splits.get("test", root).iterdir()):
        splits.pop("test", None)
    if not splits:
        raise ValueError(
            f"{root} holds neither the official tar files nor the folders train/ and val/ (or "
            "validation/) of an ImageFolder"
        )
    if {"val", "validation"} <= splits.keys():
        raise ValueError(f"{root} holds both val/ and validation/; move one away")
    return {SPLITS[folder]: path for folder, path in splits.items()}


def is_flat(folder: Path) -> bool:
    """Whether these are ImageNet's validation images without class folders, as Kaggle has them."""
    return any(map(VALIDATION_NAME.fullmatch, os.listdir(folder)))


def class_folders(folder: Path) -> list[str]:
    """Return the names of the class folders, sorted; hidden ones do not count."""
    names = [e.name for e in os.scandir(folder) if e.is_dir() and not e.name.startswith(".")]
    names = [name for name in names if name not in NO_CLASSES]
    if not names:
        raise ValueError(f"{folder} has no class folders")
    return sorted(names)


def identify(
    root: Path, classes: dict[str, list[str]], name: str | None, allow_partial: bool
) -> tuple[str, tuple[str, ...]]:
    """(name of the data set, its classes in the order of labels)."""
    every = sorted(set().union(*classes.values()))
    synsets = set(known().synsets)
    foreign = [folder for folder in every if folder not in synsets]
    if name not in (None, IMAGENET):
        _check_same(classes, allow_partial)
        return str(name), tuple(every)
    own = f"--name NAME makes it a data set of these {len(every)} classes"
    if foreign:
        kind = "none of" if len(foreign) == len(every) else f"{len(every) - len(foreign)} of"
        others = f"{len(foreign)} others ({foreign[0]})"
        raise ValueError(
            f"{root} has {kind} ImageNet's {len(synsets):,} classes and {others}; {own}"
        )
    if classes and len(every) < len(synsets) and not allow_partial:
        gone = [synset for synset in known().synsets if synset not in every]
        raise ValueError(
            f"{root} has no folder for {len(gone)} of ImageNet's {len(synsets):,} classes "
            f"({', '.join(gone[:5])}{', ...' * (len(gone) > 5)}), so that labels would shift; "
            f"--allow_partial keeps ImageNet's labels, {own}"
        )
    return IMAGENET, known().synsets


def _check_same(classes: dict[str, list[str]], allow_partial: bool) -> None:
    first, *others = classes or [""]
    for split in others:
        if extra := sorted(set(classes[split]) - set(classes[first])):
            raise ValueError(f"{first} has no folder for the class {extra[0]!r} of {split}")
        if (extra := sorted(set(classes[first]) - set(classes[split]))) and not allow_partial:
            raise ValueError(f"{split} has no folder for the class {extra[0]!r}; {PARTIAL}")


def flat_rows(folder: Path, left_out: Counter[str]) -> Iterator[TarredImage]:
    """ImageNet's validation images, labelled by their names."""
    for entry in os.scandir(folder):
        if _is_image(entry.name, left_out):
            label = validation_label(folder, entry.name)
            yield TarredImage(entry.name, entry.name, label, 0, entry.stat().st_size)


def rows(
    folder: Path,
    classes: tuple[str, ...],
    left_out: Counter[str],
    *,
    imagenet: bool,
    allow_partial: bool,
) -> Iterator[TarredImage]:
    """Yield the images in the class folders; a name is the path within that of the class.

    Of `imagenet`, images named as of other classes are refused, and names are without folders.
    """
    labels = {name: label for label, name in enumerate(classes)}
    for name in class_folders(folder):
        empty = True
        for path, _, files in os.walk(folder / name, followlinks=True):
            for file in files:
                if not _is_image(file, left_out):
                    continue
                empty = False
                full = Path(path, file)
                if imagenet:
                    check_synset(folder / name, file, name)
                short = file if imagenet else full.relative_to(folder / name).as_posix()
                place = full.relative_to(folder).as_posix()
                yield TarredImage(short, place, labels[name], 0, full.stat().st_size)
        if empty and not allow_partial:
            raise ValueError(f"{folder / name} holds no image; {PARTIAL}")


def _is_image(name: str, left_out: Counter[str]) -> bool:
    if name.startswith("."):
        left_out["hidden files"] += 1
    elif not name.lower().endswith(ENDINGS):
        left_out["files that do not end as images do"] += 1
    else:
        return True
    return False
