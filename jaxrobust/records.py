"""Result records: a number together with everything that is needed to repeat it."""

import datetime
import hashlib
import importlib.metadata
import json
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxrobust.types import Params

_PACKAGES = ("jaxrobust", "jax", "jaxlib", "flax", "optax", "numpy", "pillow")


def weights_sha256(params: Params, stats: Params) -> str:
    """Of all names, types, shapes and bytes, in the order of names."""
    digest = hashlib.sha256()
    for name, array in sorted((params | stats).items()):
        host = np.asarray(jax.device_get(array))
        digest.update(f"{name} {host.dtype} {host.shape}".encode())
        digest.update(np.ascontiguousarray(host).tobytes())
    return digest.hexdigest()


def config_sha256(config: dict[str, Any]) -> str:
    """Of the resolved config as JSON with sorted keys."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def classes_sha256(classes: Sequence[str]) -> str | None:
    """Of the classes' names, one a line in the order of labels; None where they have none."""
    text = "".join(f"{name}\n" for name in classes)
    return hashlib.sha256(text.encode()).hexdigest() if text else None


def commit() -> str:
    """The checkout's commit, with `+changes` where files differ; "unknown" outside a checkout."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def versions() -> dict[str, str]:
    """Of the packages that a number may depend on, and of Python."""
    found = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return found | {"python": platform.python_version()}


def accuracy_record(
    *,
    config: dict[str, Any],
    weights: str,
    params: Params,
    stats: Params,
    dataset: str,
    split: str,
    image_ids: str,
    preprocessing: str,
    dtype: str,
    attacks: list[dict[str, Any]],
    clean: float,
    robust: float | None,
    seed: int,
    ids_sha256: str | None = None,
    classes: Sequence[str] = (),
    flags: dict[str, str] | None = None,
    more: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The record of one network's clean and robust accuracy (fractions of the images).

    Args:
      config: the resolved config that the network was made from; only its hash is kept.
      weights: which ones, in words ("train, step 440, ema").
      params, stats: those weights; only their hash is kept.
      dataset, split, preprocessing: where the images come from.
      image_ids: which ones, by their place in the split ("0..999").
      dtype: the network's compute type.
      attacks: the settings of each, norm and epsilon among them; empty if there was none.
      clean: accuracy before any attack.
      robust: accuracy after all of them; None if there was none.
      seed: of the attacks' draws.
      ids_sha256: of the list of ids that makes the split, if one does (`Source.ids_sha256`).
      classes: their names in the order of labels, where they have any; only their hash is kept.
      flags: what puts the number in doubt, and why.
      more: what only some evaluations have to say; its keys follow the others.
    """
    device = jax.devices()[0]
    lists = {"ids_sha256": ids_sha256, "classes_sha256": classes_sha256(classes)}
    record = {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "config_sha256": config_sha256(config),
        "weights": weights,
        "weights_sha256": weights_sha256(params, stats),
        "dataset": dataset,
        "split": split,
        "image_ids": image_ids,
        "preprocessing": preprocessing,
        "dtype": dtype,
        "attacks": attacks,
        "clean": clean,
        "robust": robust,
        "seed": seed,
        "flags": flags or {},
        "versions": versions(),
        "device": f"{jax.device_count()} x {device.device_kind}",
    }
    return record | {key: value for key, value in lists.items() if value} | (more or {})
