"""Weights of the PyTorch reference networks as ours: runs the rows beside each architecture."""

import pickle
import re
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from jaxrobust import models
from jaxrobust.names import Row, row

PREFIXES = ("module.", "base_model.", "model.")  # DDP, the attack wrapper, the normalised wrapper


def unwrapped(state_dict: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The names without what wrappers put before all of them; `normalize.*` may stand outside."""
    names = dict(state_dict)
    while any(
        all(k.startswith((prefix, "normalize.")) for k in names) and names for prefix in PREFIXES
    ):
        names = {re.sub(r"^(module|base_model|model)\.", "", k): v for k, v in names.items()}
    return names


def rename(
    rows: list[Row], source: Mapping[str, np.ndarray], expected: Mapping[str, tuple[int, ...]]
) -> dict[str, np.ndarray]:
    """The arrays of `source` under our names.

    Args:
      rows: every source name must match exactly one.
      source: reference name -> array.
      expected: our name -> shape; every one must be filled exactly once.
    Raises:
      ValueError: with all problems in one message.
    """
    filled: dict[str, np.ndarray] = {}
    problems = []
    for name, array in source.items():
        matches = [(r, m) for r in rows if (m := r.pattern.fullmatch(name))]
        if len(matches) != 1:
            problems.append(f"{name}: {len(matches)} rows match, expected 1")
            continue
        match_row, match = matches[0]
        if match_row.target is None:
            continue
        target = match.expand(match_row.target)
        array = match_row.transform(np.array(array))  # a copy: the source may be a live network
        if target not in expected:
            problems.append(f"{name}: maps to {target}, which this network does not have")
        elif target in filled:
            problems.append(f"{name}: fills {target} a second time")
        elif array.shape != tuple(expected[target]):
            problems.append(f"{name}: shape {array.shape} for {target} {tuple(expected[target])}")
        elif array.dtype != np.float32:
            problems.append(f"{name}: dtype {array.dtype}, expected float32; cast it first")
        elif not np.isfinite(array).all():
            problems.append(f"{name}: holds values that are not finite")
        else:
            filled[target] = array
    problems += [f"{name}: not filled by any source name" for name in expected.keys() - filled]
    if problems:
        raise ValueError(
            f"{len(problems)} weights do not fit; check the model name, num_classes and image_size:"
            "\n  " + "\n  ".join(sorted(problems))
        )
    return filled


def from_torch(
    name: str, state_dict: Mapping[str, np.ndarray], *, num_classes: int = 1000, image_size=224
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Params and stats of network `name` from a PyTorch state dict of NumPy arrays.

    Args:
      name: one of `models.available()`.
      state_dict: timm's names (ConvStem: those of the authors' files, `stem.stem.*`).
    Raises:
      ValueError: names, shapes or types that do not fit, all in one message.
    Source: names from timm 1.0.9 and the state dicts of RobustBench; tests/test_convnext.py.
    """
    net = models.create(name, num_classes=num_classes, image_size=image_size)
    params, stats = jax.eval_shape(net.init, jax.random.key(0))
    names = unwrapped(state_dict)
    # Weights without a normalisation layer mean raw [0, 1] input: the identity.
    if not {"normalize.mean", "normalize.std"} & names.keys():
        names["normalize.mean"] = np.zeros(stats["normalize.mean"].shape, np.float32)
        names["normalize.std"] = np.ones(stats["normalize.std"].shape, np.float32)
    rows = [*models.torch_names(name), row(r"normalize\.(mean|std)", r"normalize.\1", np.ravel)]
    shapes = {k: v.shape for k, v in (params | stats).items()}
    filled = rename(rows, names, shapes)
    return {k: filled[k] for k in params}, {k: filled[k] for k in stats}


def load(
    name: str, path: Path, *, num_classes: int = 1000, image_size=224
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Params and stats of network `name` from a file with our names or the reference's.

    Raises:
      ValueError: see `read`; weights that do not fit, all in one message.
    """
    arrays = read(path)
    if not any(key.endswith(".kernel") for key in arrays):  # torch calls none of its so
        return from_torch(name, arrays, num_classes=num_classes, image_size=image_size)
    channels = {"in_channels": m.size} if (m := arrays.get("normalize.mean")) is not None else {}
    net = models.create(name, num_classes=num_classes, image_size=image_size, **channels)
    params, stats = jax.eval_shape(net.init, jax.random.key(0))
    shapes = {key: array.shape for key, array in (params | stats).items()}
    filled = rename([row(r"(.+)", r"\1")], arrays, shapes)
    return {k: filled[k] for k in params}, {k: filled[k] for k in stats}


def read(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a `.safetensors`, `.pth` or `.pt` file by their names; nothing in it is run.

    A state dict inside of a checkpoint (under `state_dict` or `model`) is found, and half precision
    becomes float32, which loses nothing.
    Raises:
      ValueError: no such file, another kind of file, a damaged one, one that holds more than
        tensors, PyTorch needed but not installed.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file; give one of {', '.join(_READERS)}")
    if path.suffix not in _READERS:
        raise ValueError(f"{path}: unknown kind of file; give one of {', '.join(_READERS)}")
    return _READERS[path.suffix](path)


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a whole safetensors file ({error}); get it again"
        ) from error
    except (AttributeError, TypeError) as error:  # bfloat16, which NumPy does not have
        raise ValueError(
            f"{path} holds a type that NumPy lacks ({error}); cast to float32"
        ) from error


def _read_torch(path: Path) -> dict[str, np.ndarray]:
    try:
        import torch
    except ImportError as error:
        raise ValueError(f"{path} needs PyTorch to be read: pip install -e '.[torch]'") from error
    try:
        tree = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is damaged, or holds more than tensors, and reading that would run code from "
            "it; where you trust it, save it anew with torch.save(model.state_dict(), ...) or as "
            ".safetensors"
        ) from error
    except (
        Exception
    ) as error:  # EOFError, RuntimeError, IndexError, ...: whatever the bytes lead to
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path} is not a whole PyTorch file ({reason}); get it again") from error
    for key in ("state_dict", "model"):
        if isinstance(tree, dict) and isinstance(tree.get(key), dict):
            tree = tree[key]
    if not isinstance(tree, dict) or not all(torch.is_tensor(t) for t in tree.values()):
        raise ValueError(
            f"{path} holds no state dict, nor one under 'state_dict' or 'model'; save it with "
            "torch.save(model.state_dict(), ...)"
        )
    return {k: (t.float() if t.is_floating_point() else t).numpy() for k, t in tree.items()}


_READERS = {".safetensors": _read_safetensors, ".pth": _read_torch, ".pt": _read_torch}
