"""SHA-256 of what a result depends on: files, weights, configs, class names."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxrobust.runtime.files.download import file_sha256
from jaxrobust.types import Params

__all__ = ["array_sha256", "classes_sha256", "config_sha256", "file_sha256", "weights_sha256"]


def weights_sha256(params: Params, stats: Params) -> str:
    """Hash all names, types, shapes and bytes, sorted by name."""
    digest = hashlib.sha256()
    for name, array in sorted((params | stats).items()):
        host = np.asarray(jax.device_get(array))
        digest.update(f"{name} {host.dtype} {host.shape}".encode())
        digest.update(np.ascontiguousarray(host).tobytes())
    return digest.hexdigest()


def array_sha256(array: np.ndarray) -> str:
    """Hash type, shape and bytes without a copy, so that other threads can run."""
    digest = hashlib.sha256(f"{array.dtype} {array.shape}".encode())
    digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def config_sha256(config: dict[str, Any]) -> str:
    """Hash the resolved config as JSON with sorted keys."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def classes_sha256(classes: Sequence[str]) -> str | None:
    """Hash the class names, one per line in the order of labels; None if there are none."""
    text = "".join(f"{name}\n" for name in classes)
    return hashlib.sha256(text.encode()).hexdigest() if text else None
