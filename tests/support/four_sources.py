"""The same images as class folders, an `.npz` file, a TFDS directory and parquet files."""

import io
import unittest
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from PIL import Image

from tests.support.datasets import write_tfds

KINDS = ("folder", "npz", "tfds", "hf")
FILES = ("folder", "tfds", "hf")  # whose images are encoded


def png(pixels: np.ndarray) -> bytes:
    """Encode uint8[H,W,1 or 3]."""
    buffer = io.BytesIO()
    Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).save(buffer, "PNG")
    return buffer.getvalue()


def digits(count: int = 60) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Take the first images of both splits of the digits."""
    from jaxrobust import data

    loaded = {split: data.load("digits", split=split, n=count) for split in ("train", "test")}
    pixels = {split: np.round(255 * of.images).astype(np.uint8) for split, of in loaded.items()}
    return {split: (pixels[split], of.labels) for split, of in loaded.items()}


def cache_hugging_face(test: unittest.TestCase, folder: Path) -> None:
    """Let Hugging Face's datasets cache in a folder until a test ends; skip it without them."""
    try:
        import datasets
    except ImportError:
        test.skipTest("needs Hugging Face's datasets: pip install 'jaxrobust[hf]'")
    datasets.disable_progress_bars()
    test.enterContext(mock.patch.object(datasets.config, "HF_DATASETS_CACHE", folder))


def write(
    kind: str,
    root: Path,
    splits: Mapping[str, tuple[Sequence[Any], Sequence[int]]],
    names: Sequence[str] = tuple("0123456789"),
) -> dict[str, Any]:
    """Write images, as pixels or as PNG files, with their labels; return `name` and `data_dir`.

    TFDS' declare no shape. The names begin with a letter, so that their order is that of labels.
    """
    encoded = {
        split: ([i if isinstance(i, bytes) else png(i) for i in images], labels)
        for split, (images, labels) in splits.items()
    }
    folder = root / kind
    if kind == "folder":
        for split, (images, labels) in encoded.items():
            for name in (names[label] for label in set(labels)):
                (folder / split / name).mkdir(parents=True, exist_ok=True)
            for number, (image, label) in enumerate(zip(images, labels, strict=True)):
                (folder / split / names[label] / f"{number:04}.png").write_bytes(image)
        return {"name": f"folder:{folder}", "data_dir": None}
    if kind == "npz":
        folder.mkdir()
        arrays = {f"x_{split}": np.stack(images) for split, (images, _) in splits.items()}
        arrays |= {f"y_{split}": np.asarray(labels) for split, (_, labels) in splits.items()}
        np.savez(folder / "set.npz", **arrays, classes=np.array(list(names)))
        return {"name": f"npz:{folder}/set.npz", "data_dir": None}
    if kind == "tfds":
        import tensorflow_datasets as tfds

        with Image.open(io.BytesIO(encoded[next(iter(encoded))][0][0])) as first:
            channels = 1 if first.mode == "L" else 3
        features = {
            "image": tfds.features.Image(shape=(None, None, channels)),
            "label": tfds.features.ClassLabel(names=list(names)),
        }
        rows = {
            split: [{"image": i, "label": int(y)} for i, y in zip(images, labels, strict=True)]
            for split, (images, labels) in encoded.items()
        }
        write_tfds(folder / "mine" / "1.0.0", "mine", features, rows)
        return {"name": "mine", "data_dir": str(folder)}
    import datasets

    folder.mkdir()
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(names))}
    )
    for split, (images, labels) in encoded.items():
        columns = {"image": [{"bytes": i, "path": None} for i in images], "label": list(labels)}
        table = datasets.Dataset.from_dict(columns, features=features)
        table.to_parquet(str(folder / f"{split}.parquet"))
    return {"name": f"hf:{folder}", "data_dir": None}
