"""Weights as they are handed around: a folder with `weights.safetensors` and `config.json`.

`config.json` says what they are the weights of, where they come from and what they expect:
architecture, num_classes, image_size, in_channels, preprocessing, norm, epsilon, accuracies, source
and hashes. What is not known is null.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from jaxrobust import records
from jaxrobust.download import file_sha256

WEIGHTS, CONFIG = "weights.safetensors", "config.json"
_NEEDED = ("architecture", "num_classes", "image_size", "in_channels", "sha256")


def about(folder: Path) -> dict[str, Any] | None:
    """What `config.json` of a folder says; None if it is no folder of weights.

    Raises:
      ValueError: it is damaged, or the weights beside it are not those that it describes.
    """
    path = folder / CONFIG
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); get it again") from error
    if not isinstance(config, dict) or "architecture" not in config:
        return None
    if missing := [key for key in _NEEDED if key not in config]:
        raise ValueError(f"{path} lacks {', '.join(missing)}; import the weights again")
    weights = folder / WEIGHTS
    if not weights.is_file():
        raise ValueError(f"{folder} has a {CONFIG} but no {WEIGHTS}; get both")
    if file_sha256(weights) != config["sha256"]:
        raise ValueError(
            f"{weights} is not the file that {CONFIG} beside it describes (another sha256); get "
            "both again"
        )
    return config


def check_free(folder: Path) -> None:
    """`ValueError` where a folder holds something else than such weights."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; name a folder")
    ours = (folder / WEIGHTS).is_file() and (folder / CONFIG).is_file()
    if folder.is_dir() and any(folder.iterdir()) and not ours:
        raise ValueError(f"{folder} holds other files; name a new folder")


def write(folder: Path, params, stats, config: dict[str, Any]) -> dict[str, Any]:
    """The config with its hashes, after writing both files: whole, or nothing of them.

    Raises:
      ValueError: the folder holds something else already; the very same content may be there.
    """
    check_free(folder)
    arrays = {k: np.ascontiguousarray(jax.device_get(v)) for k, v in (params | stats).items()}
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = folder.with_name(f"{folder.name}.part-{os.getpid()}")
    part.mkdir()
    try:
        save_file(arrays, part / WEIGHTS, metadata={"format": "jaxrobust"})
        config = config | {
            "sha256": file_sha256(part / WEIGHTS),
            "weights_sha256": records.weights_sha256(params, stats),  # as records say it
        }
        (part / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        if not (folder / CONFIG).exists():
            os.replace(part, folder)
        elif json.loads((folder / CONFIG).read_text()) != config:
            raise ValueError(
                f"{folder} holds other weights, or the same of another origin; name a new folder"
            )
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return config
