"""One data set of 300 images, sorted by class, as each kind of source has it."""

import contextlib
import io
from pathlib import Path
from typing import Any

import numpy as np

from jaxrobust.data.prepare import generated
from tests.support import four_sources

CLASSES, EACH, SIDE = 10, 30, 8
LABELS = np.repeat(np.arange(CLASSES), EACH)
KINDS = (*four_sources.KINDS, "generated", "fake")


def pixels() -> np.ndarray:
    """uint8[300,8,8,3]; the upper half of an image tells its class."""
    images = np.random.default_rng(0).integers(0, 40, (len(LABELS), SIDE, SIDE, 3), np.uint8)
    images[:, : SIDE // 2] += (20 * LABELS).astype(np.uint8)[:, None, None, None]
    return images


def write(kind: str, root: Path) -> dict[str, Any]:
    """Write the data set as a kind of source has it; name, split and data_dir."""
    if kind == "fake":
        return {"name": f"fake:{SIDE}x{SIDE}x3:{CLASSES}", "split": "test"}
    if kind != "generated":
        splits = {"test": (pixels(), LABELS)}
        return {"split": "test"} | four_sources.write(kind, root, splits, "abcdefghij")
    np.savez(root / "all.npz", image=pixels(), label=LABELS)
    given = [str(root / "all.npz"), "--out", str(root / "shards"), "--rows", "100"]
    with contextlib.redirect_stdout(io.StringIO()):
        generated.prepare(generated.parse(given))
    return {"name": f"generated:{root / 'shards'}", "split": "all"}
