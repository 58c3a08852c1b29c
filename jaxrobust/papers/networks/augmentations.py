"""A contact sheet of a user's own images under a preset or a chain of augmentations."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrobust import data
from jaxrobust.data.transforms.decoding import decode
from jaxrobust.data.transforms.presets import PRESETS
from jaxrobust.papers.networks import picture_parts
from jaxrobust.papers.networks.analyses import AnalysisSettings
from jaxrobust.papers.networks.picture_parts import Rows
from jaxrobust.training.update import mixing
from jaxrobust.types import Batch

_KINDS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def analyse(sample: None, settings: AnalysisSettings) -> tuple[Rows, Any]:
    """Return a row for each image and view: how bright it is, and how far from the plain image."""
    size, files = settings.named["image_size"] or 224, _files(settings.images, settings.n)
    plain_view = data.evaluation_transform(data.resolve("bicubic-1.0", size))
    chain = data.chain(settings.chain, size)
    plain, views = [], []
    for number, file in enumerate(files):
        try:
            image = decode(file.read_bytes(), channels=3)
        except ValueError as error:
            raise ValueError(f"{file} is {error}; leave it out") from error
        plain.append(plain_view(image))
        original = image if chain.resizes else plain[-1]
        seeds = ([settings.seed, number, view] for view in range(settings.views))
        views.append([chain.augment(original, np.random.default_rng(seed)) for seed in seeds])
    base = np.stack(plain).astype(np.float32) / 255
    sheet = np.array(views).astype(np.float32) / 255  # images, views, H, W, C
    kinds = [("host", sheet)]
    if (preset := PRESETS.get(settings.chain)) and (preset.mixup or preset.cutmix or preset.erase):
        kinds.append(("device", _on_device(sheet, preset, settings.seed)))
    rows = []
    for where, augmented in kinds:
        for i, view in np.ndindex(augmented.shape[:2]):
            one = augmented[i, view]
            about = {"file": str(files[i]), "where": where, "view": view}
            bright = {"mean": float(one.mean()), "std": float(one.std())}
            rows.append(about | bright | {"from_plain": float(np.abs(one - base[i]).mean())})
    return rows, (files, base, kinds)


def _on_device(sheet: np.ndarray, preset: Any, seed: int) -> np.ndarray:
    even = np.concatenate([sheet, sheet[:1]]) if len(sheet) % 2 else sheet
    change = mixing.batch_augmentation(
        mixing.Mixing(2, preset.mixup, preset.cutmix), erasing=preset.erase
    )
    keys = jax.random.split(jax.random.key(seed), sheet.shape[1])
    labels = jnp.zeros(len(even), jnp.int32)
    views = [change(k, Batch(jnp.asarray(even[:, v]), labels)).images for v, k in enumerate(keys)]
    return np.stack(views, axis=1)[: len(sheet)]


def _files(places: Sequence[Path], most: int) -> list[Path]:
    files: list[Path] = []
    for place in places:
        inside = sorted(p for p in place.rglob("*") if p.suffix.lower() in _KINDS)
        files += inside if place.is_dir() else [place]
    if missing := [str(p) for p in files if not p.is_file()]:
        raise ValueError(f"--images {missing[0]}: no such file or folder")
    if not files:
        kinds = ", ".join(_KINDS)
        raise ValueError(f"--images contains no pictures; give files, or folders with {kinds}")
    return files[:most]


def draw(sample: None, rows: Rows, result: Any, settings: AnalysisSettings) -> Any:
    """Draw one row per image: as evaluation sees it, and its views."""
    files, base, kinds = result
    cells = []
    for i, file in enumerate(files):
        cells.append((base[i], file.stem[:20], False))
        for where, views in kinds:
            title = "+ mixing, erasing" if where == "device" else ""
            cells += [(view, title, False) for view in views[i]]
    preset = PRESETS.get(settings.chain)
    about = f"{settings.chain}: {preset.chain}" if preset else settings.chain
    about += f"\nleft: as evaluation sees it; then {settings.views} views"
    about += " on the host, and as many after augmentation on the device" if len(kinds) > 1 else ""
    return picture_parts.grid(cells, 1 + settings.views * len(kinds), about)
