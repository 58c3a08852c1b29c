"""One data set of 300 images, sorted by class, as each kind of source has it."""

import contextlib
import io
from pathlib import Path

import numpy as np
from PIL import Image

from jaxrobust.data.prepare import generated
from tests.support.datasets import write_tfds

CLASSES, EACH, SIDE = 10, 30, 8
LABELS = np.repeat(np.arange(CLASSES), EACH)
KINDS = ("folder", "npz", "tfds", "hf", "generated", "fake")


def pixels() -> np.ndarray:
    """uint8[300,8,8,3]; the upper half of an image tells its class."""
    images = np.random.default_rng(0).integers(0, 40, (len(LABELS), SIDE, SIDE, 3), np.uint8)
    images[:, : SIDE // 2] += (20 * LABELS).astype(np.uint8)[:, None, None, None]
    return images


def write(kind: str, root: Path) -> dict[str, str]:
    """Write the data set as a kind of source has it; name, split and data_dir."""
    files = [_png(image) for image in pixels()]
    if kind == "folder":
        for number, (label, file) in enumerate(zip(LABELS, files, strict=True)):
            path = root / "test" / "abcdefghij"[label] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(file)
        return {"name": f"folder:{root}", "split": "test"}
    if kind == "npz":
        np.savez(root / "all.npz", test_images=pixels(), test_labels=LABELS)
        return {"name": f"npz:{root / 'all.npz'}", "split": "test"}
    if kind == "tfds":
        import tensorflow_datasets as tfds

        features = {
            "image": tfds.features.Image(shape=(SIDE, SIDE, 3)),
            "label": tfds.features.ClassLabel(num_classes=CLASSES),
        }
        rows = [{"image": f, "label": int(n)} for f, n in zip(files, LABELS, strict=True)]
        write_tfds(root / "sorted" / "1.0.0", "sorted", features, {"test": rows})
        return {"name": "sorted", "split": "test", "data_dir": str(root)}
    if kind == "hf":
        import datasets

        images = [{"bytes": file, "path": f"{n}.png"} for n, file in enumerate(files)]
        features = datasets.Features(
            {"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=CLASSES)}
        )
        table = datasets.Dataset.from_dict({"image": images, "label": LABELS}, features=features)
        table.to_parquet(str(root / "test-00000-of-00001.parquet"))
        return {"name": f"hf:{root}", "split": "test"}
    if kind == "generated":
        np.savez(root / "all.npz", image=pixels(), label=LABELS)
        given = [str(root / "all.npz"), "--out", str(root / "shards"), "--rows", "100"]
        with contextlib.redirect_stdout(io.StringIO()):
            generated.prepare(generated.parse(given))
        return {"name": f"generated:{root / 'shards'}", "split": "all"}
    return {"name": f"fake:{SIDE}x{SIDE}x3:{CLASSES}", "split": "test"}


def _png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()
