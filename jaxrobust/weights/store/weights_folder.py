"""Weights for exchange: a folder with `weights.safetensors` and `config.json`.

`config.json` describes the weights, their origin and their input: architecture and its options,
num_classes, image_size, in_channels, preprocessing, norm, epsilon, accuracies, source and hashes.
Unknown values are null. Weights for other options can have the same names and shapes but be another
network, so the file's metadata also holds architecture and options.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError, safe_open

from jaxrobust.weights.store import files, hashes
from jaxrobust.weights.store.hashes import file_sha256

WEIGHTS, CONFIG = "weights.safetensors", "config.json"
_NETWORK = "jaxrobust.network"  # the key in a safetensors file's metadata
_NEEDED = {"architecture": str, "num_classes": int, "image_size": int, "in_channels": int}
_NEEDED |= {"sha256": str}
_PERHAPS = {"options": dict, "preprocessing": str, "norm": str, "epsilon": int | float}  # or null


def about(folder: Path) -> dict[str, Any] | None:
    """Read a folder's `config.json`; None if it is not a folder of weights."""
    path = folder / CONFIG
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); download it again") from error
    if not isinstance(config, dict) or "architecture" not in config:
        return None
    if missing := [key for key in _NEEDED if key not in config]:
        raise ValueError(f"{path} lacks {', '.join(missing)}; import the weights again")
    config = dict.fromkeys(_PERHAPS) | config
    for key, kind in (_NEEDED | _PERHAPS).items():
        value = config[key]
        unknown = value is None and key not in ("architecture", "sha256")
        if not (unknown or isinstance(value, kind)):
            raise ValueError(f"{path} is damaged ({key}={value!r}); import the weights again")
    weights = folder / WEIGHTS
    if not weights.is_file():
        raise ValueError(f"{folder} has a {CONFIG} but no {WEIGHTS}; copy both")
    if file_sha256(weights) != config["sha256"]:
        raise ValueError(
            f"{weights} is not the file that {CONFIG} next to it describes (the sha256 differs); "
            "download both again"
        )
    return config


def metadata(architecture: str, options: dict[str, Any]) -> dict[str, str]:
    """Return safetensors metadata that says whose weights a file holds.

    Nothing else: safetensors writes several entries in any order, so hashes would differ.
    """
    return {_NETWORK: json.dumps({"architecture": architecture, "options": options})}


def stated(path: Path) -> tuple[str, dict[str, Any]] | None:
    """Read the architecture and its options from a file's metadata; None: it has none."""
    try:
        with safe_open(path, framework="numpy") as file:
            text = (file.metadata() or {}).get(_NETWORK)
    except (OSError, SafetensorError):  # another kind of file, left to its reader
        return None
    if text is None:
        return None
    try:
        config = json.loads(text)
        return str(config["architecture"]), dict(config["options"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: its metadata {_NETWORK} is damaged ({error!r})") from error


def check_free(folder: Path) -> None:
    """Raise `ValueError` if a folder holds anything but such weights."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; name a folder")
    is_saved = (folder / WEIGHTS).is_file() and (folder / CONFIG).is_file()
    if folder.is_dir() and any(folder.iterdir()) and not is_saved:
        raise ValueError(f"{folder} holds other files; name a new folder")


def write(
    folder: Path, params: dict[str, Any], stats: dict[str, Any], config: dict[str, Any]
) -> dict[str, Any]:
    """Write both files or none, and return the config with its hashes."""
    check_free(folder)
    arrays = {k: np.array(jax.device_get(v), order="C") for k, v in (params | stats).items()}
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = folder.with_name(f"{folder.name}.part-{os.getpid()}")
    part.mkdir()
    try:
        options = config.get("options")
        facts = None if options is None else metadata(config["architecture"], options)
        files.write(part / WEIGHTS, arrays, facts or {"format": "jaxrobust"})
        config = config | {
            "sha256": file_sha256(part / WEIGHTS),
            "weights_sha256": hashes.weights_sha256(params, stats),  # as in records
        }
        (part / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        if not (folder / CONFIG).exists():
            os.replace(part, folder)
        elif json.loads((folder / CONFIG).read_text()) != config:
            raise ValueError(
                f"{folder} contains other weights, or the same weights from another origin; name a "
                "new folder"
            )
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return config
