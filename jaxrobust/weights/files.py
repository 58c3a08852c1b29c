"""Weight files as arrays by name; nothing that a file holds is ever run."""

import pickle
import re
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from jaxrobust.runtime import whole

Arrays = dict[str, np.ndarray]

SUFFIXES = (".safetensors", ".pth", ".pt", ".tar", ".bin", ".ckpt", ".th")
# Where checkpoints keep their state dict, by which weights they are; nested ones are followed.
_PLACES = {
    "ema": ("state_dict_ema", "model_ema", "ema_state_dict", "ema"),
    "raw": ("state_dict", "model_state_dict", "model", "net"),
}
_INSIDE = ("module", "shadow")  # where the state of an average keeps it
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.\w+)")


def read(path: Path, *, which: str = "ema") -> Arrays:
    """Return the arrays of a safetensors or PyTorch file by their names, in the types of the file.

    A state dict inside of a checkpoint is found; where a file holds averaged and raw weights,
    `which` ("ema" or "raw") chooses. Of a file in several parts, all are read.
    Raises:
      ValueError: no such file, another kind of file, a damaged one, one that holds more than
        tensors, a part that is missing, PyTorch needed but not installed.
    """
    if which not in _PLACES:
        raise ValueError(f"which={which!r}; one of {', '.join(_PLACES)}")
    if not path.is_file():
        raise ValueError(f"{path}: no such file; give one of {', '.join(SUFFIXES)}")
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path}: unknown kind of file; give one of {', '.join(SUFFIXES)}")
    arrays: Arrays = {}
    for part in _parts(path):
        new = _reader(part)(part, which)
        if twice := arrays.keys() & new.keys():
            raise ValueError(f"{part} holds {sorted(twice)[:3]} a second time")
        arrays |= new
    if not arrays:
        raise ValueError(f"{path} holds no arrays; get it again")
    return arrays


def read_cast(path: Path, *, which: str = "ema") -> Arrays:
    """Return the arrays of a file with all floats in float32, also of types that NumPy lacks.

    Raises:
      ValueError: as `read`; complex numbers.
    """
    try:
        arrays = read(path, which=which)
    except ValueError as error:
        if "bfloat16" not in str(error):
            raise
        arrays = _read_bfloat16(path, which)
    if strange := [k for k, a in arrays.items() if a.dtype.kind == "c"]:
        raise ValueError(
            f"{path}: {strange[0]} is {arrays[strange[0]].dtype}, which has no float32"
        )
    return {k: a if a.dtype.kind in "iub" else np.asarray(a, np.float32) for k, a in arrays.items()}


def _read_bfloat16(path: Path, which: str) -> Arrays:
    if path.suffix == ".safetensors":
        import jax.numpy as jnp
        from safetensors.flax import load_file as load

        return {k: np.asarray(a.astype(jnp.float32)) for k, a in load(path).items()}
    import torch

    tree = torch.load(path, map_location="cpu", weights_only=True)
    tensors = state_dict(tree, which, torch.is_tensor) or {}
    return {k: (t.float() if t.is_floating_point() else t).numpy() for k, t in tensors.items()}


def write(path: Path, arrays: Arrays, metadata: dict[str, str]) -> None:
    """Write a safetensors file, whole or not at all."""
    with whole.writing(path) as part:
        save_file(arrays, part, metadata=metadata)


def _parts(path: Path) -> list[Path]:
    """Return the file, or all the parts of which it is one."""
    match = _SHARD.fullmatch(path.name)
    if not match:
        return [path]
    stem, _, count, suffix = match.groups()
    parts = [path.with_name(f"{stem}-{i:05d}-of-{count}{suffix}") for i in range(1, int(count) + 1)]
    if missing := [part.name for part in parts if not part.is_file()]:
        raise ValueError(
            f"{path} is one of {len(parts)} parts, and {', '.join(missing)} is not beside it; get "
            "all of them"
        )
    return parts


def _reader(path: Path) -> Callable[[Path, str], Arrays]:
    """Return the reader for what a file is by its first bytes; its name may lie."""
    with path.open("rb") as file:
        head = file.read(256)
    if not head:
        raise ValueError(f"{path} is empty; get it again")
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith(b"<"):
        raise ValueError(
            f"{path} is a web page, not weights: the download was answered with a login, quota or "
            "confirmation page; open its link in a browser and save the file itself"
        )
    if text.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is a Git LFS pointer, not weights; fetch it with `git lfs pull`")
    if text.isascii() and " ".join(text.decode().split()).isprintable():
        raise ValueError(
            f"{path} is text, not weights; it begins {text[:60].decode()!r}. A download that was "
            "refused looks so: get it again"
        )
    # A header's length, which may begin as a pickle does (0x80), then the header.
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size:
        return _read_safetensors
    if head.startswith((b"PK\x03\x04", b"\x80")):
        return _read_torch
    if head[8:9] == b"{" or path.suffix == ".safetensors":
        return _read_safetensors
    if tarfile.is_tarfile(path):
        raise ValueError(f"{path} is a tar archive; unpack it and give the file of weights in it")
    return _read_torch


def _read_safetensors(path: Path, which: str) -> Arrays:
    del which  # a flat file
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a whole safetensors file ({error}); get it again"
        ) from error
    except (AttributeError, KeyError, TypeError) as error:  # bfloat16, which NumPy does not have
        raise ValueError(
            f"{path} holds a type that NumPy lacks ({error}); cast to float32"
        ) from error


def _read_torch(path: Path, which: str) -> Arrays:
    try:
        import torch
    except ImportError as error:
        raise ValueError(
            f"{path} needs PyTorch to be read: pip install 'jaxrobust[torch]'"
        ) from error
    try:
        tree = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is damaged, or holds more than tensors, and reading that would run code from "
            "it; where you trust it, save it anew with torch.save(model.state_dict(), ...) or as "
            ".safetensors"
        ) from error
    except Exception as error:  # EOFError, RuntimeError, ...: whatever the bytes lead to
        if "TorchScript" in str(error):
            raise ValueError(
                f"{path} is a TorchScript program, and reading it would run code; where you trust "
                "it, save its weights with torch.save(torch.jit.load(FILE).state_dict(), ...)"
            ) from error
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path} is not a whole PyTorch file ({reason}); get it again") from error
    try:
        tensors = state_dict(tree, which, torch.is_tensor)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if tensors is None:
        raise ValueError(
            f"{path} holds no state dict, nor one under {', '.join(_PLACES['raw'])}; save it with "
            "torch.save(model.state_dict(), ...)"
        )
    if strange := [k for k, t in tensors.items() if t.dtype in (torch.bfloat16, torch.complex64)]:
        raise ValueError(
            f"{path}: {strange[0]} is {tensors[strange[0]].dtype}; rounded weights are other "
            "weights: where that is meant, cast them to float32 first"
        )
    arrays: Arrays = {}
    for key, tensor in tensors.items():
        try:  # strides are honoured: torch counts them, and the copy is in the order of the indices
            arrays[key] = np.array(tensor.detach().numpy(), order="C")
        except (TypeError, RuntimeError) as error:  # sparse, quantised, without data, 8 bits, ...
            kind = f"{tensor.dtype}, {tensor.layout}, {tensor.device}"
            raise ValueError(
                f"{path}: {key} is no plain array ({kind}); save it anew in float32"
            ) from error
    return arrays


def state_dict(
    tree: Any, which: str, is_array: Callable[[Any], bool], depth: int = 5
) -> dict[str, Any] | None:
    """Return the name -> array mapping in a checkpoint, however deep; None if there is none.

    Raises:
      ValueError: `which` is "raw" where only averaged weights are, or the averaged ones that a
        checkpoint names cannot be found.
    """
    if not isinstance(tree, dict) or depth == 0:
        return None
    if tree and all(isinstance(k, str) and is_array(v) for k, v in tree.items()):
        return tree
    there = {kind: [k for k in _PLACES[kind] if tree.get(k) is not None] for kind in _PLACES}
    if which == "raw" and there["ema"] and not there["raw"]:
        raise ValueError(f"it holds averaged weights only, under {there['ema'][0]!r}; ask for ema")
    for key in there[which] or there["raw"] or [k for k in _INSIDE if k in tree]:
        if (found := state_dict(tree[key], which, is_array, depth - 1)) is not None:
            return found
    if which == "ema" and there["ema"]:
        raise ValueError(
            f"{there['ema'][0]!r} holds no state dict of averaged weights; ask for raw"
        )
    return None
