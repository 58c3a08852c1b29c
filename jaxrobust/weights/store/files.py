"""Weight files as named arrays; nothing in a file is ever executed."""

import contextlib
import pickle
import pickletools
import re
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from jaxrobust.runtime.files import whole
from jaxrobust.weights.store.artifact import Artifact, WeightFacts

Arrays = dict[str, np.ndarray]

SUFFIXES = (".safetensors", ".pth", ".pt", ".tar", ".bin", ".ckpt", ".th")
# Keys under which checkpoints store a network's state dict; nested ones are followed.
_PLAIN = ("state_dict", "model_state_dict", "model", "net", "last")  # last: next to `best`
# Keys of an average next to it: state_dict_ema, model_ema, swa_model_state_dict, ...
_AVERAGE = re.compile(
    r"(?:state_dict_|model_|net_)?(?:ema|swa|wa|averaged)(?:_model|_net)?(?:_state_dict)?"
)
# Reversed in the training code of Rade and Moosavi-Dezfooli 2022, from which most recipes with
# averaging took theirs: `model_state_dict` is the average, next to the raw weights in
# `unaveraged_model_state_dict`.
_UNAVERAGED = "unaveraged_"
_INSIDE = ("module", "shadow")  # where the state of an average keeps the weights
WHICH = {"ema": "averaged", "raw": "raw"}  # for messages
# Packages whose objects MadryLab/robustness checkpoints hold next to weights. When a file is read,
# inert objects replace these.
_INERT = re.compile(r"(argparse|_codecs|cox|dill|numpy|robustness)\..+")
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.\w+)")


def read(path: Path, *, weights_kind: str | None = None) -> Arrays:
    """Read the named arrays of a safetensors or PyTorch file; see `artifact`."""
    return artifact(path, weights_kind=weights_kind).arrays


def artifact(path: Path, *, weights_kind: str | None = None, cast: bool = False) -> Artifact:
    """Read the named arrays of a safetensors or PyTorch file, in the file's types.

    Finds the state dict inside a checkpoint, and reads all parts of a split file.
    """
    if weights_kind not in (None, *WHICH):
        raise ValueError(f"which={weights_kind!r} must be one of {', '.join(WHICH)}, or None")
    if not path.is_file():
        raise ValueError(f"{path}: no such file; give one of {', '.join(SUFFIXES)}")
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path}: unknown kind of file; give one of {', '.join(SUFFIXES)}")
    stored, arrays = Artifact({}), Arrays()
    for part in _parts(path):
        stored = _reader(part)(part, weights_kind, cast)
        if twice := arrays.keys() & stored.arrays.keys():
            raise ValueError(f"{part} repeats {sorted(twice)[:3]} of an earlier part")
        arrays |= _single(part, stored.arrays) if cast else stored.arrays
    if not arrays:
        raise ValueError(f"{path} holds no arrays; download it again")
    return stored._replace(arrays=arrays)


def _single(path: Path, arrays: Arrays) -> Arrays:
    if strange := [k for k, a in arrays.items() if a.dtype.kind == "c"]:
        raise ValueError(
            f"{path}: {strange[0]} is {arrays[strange[0]].dtype}, which cannot become float32"
        )
    return {k: a if a.dtype.kind in "iub" else np.asarray(a, np.float32) for k, a in arrays.items()}


def write(path: Path, arrays: Arrays, metadata: dict[str, str]) -> None:
    """Write a safetensors file atomically."""
    with whole.writing(path, sum(array.nbytes for array in arrays.values())) as part:
        try:
            save_file(arrays, part, metadata=metadata)
        except SafetensorError as error:  # not an OSError, although the system refuses to write
            raise OSError(f"cannot write {path} ({error})") from error


def _parts(path: Path) -> list[Path]:
    match = _SHARD.fullmatch(path.name)
    if not match:
        return [path]
    stem, _, count, suffix = match.groups()
    parts = [path.with_name(f"{stem}-{i:05d}-of-{count}{suffix}") for i in range(1, int(count) + 1)]
    if missing := [part.name for part in parts if not part.is_file()]:
        raise ValueError(
            f"{path} is one of {len(parts)} parts, but others are missing next to it; get "
            f"{', '.join(missing)}"
        )
    return parts


def _reader(path: Path) -> Callable[[Path, str | None, bool], Artifact]:
    """Choose a file's reader by its first bytes; its name may be wrong."""
    with path.open("rb") as file:
        head = file.read(256)
    if not head:
        raise ValueError(f"{path} is empty; download it again")
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
            f"{path} is text, not weights; it begins {text[:60].decode()!r}. This may be "
            "the error page of a refused download: get the file again"
        )
    # The header's length, which may begin like a pickle (0x80), then the header.
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size:
        return _read_safetensors
    if head.startswith((b"PK\x03\x04", b"\x80")):
        return _read_torch
    if head[8:9] == b"{" or path.suffix == ".safetensors":
        return _read_safetensors
    if tarfile.is_tarfile(path):
        raise ValueError(f"{path} is a tar archive; unpack it and give the weight file in it")
    return _read_torch


def _read_safetensors(path: Path, weights_kind: str | None, cast: bool) -> Artifact:
    if weights_kind:
        raise ValueError(f"{path} holds one set of weights; leave --which out")
    try:
        return Artifact(load_file(path))
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a complete safetensors file ({error}); download it again"
        ) from error
    except (AttributeError, KeyError, TypeError) as error:  # bfloat16, which NumPy lacks
        if cast and "bfloat16" in str(error):
            import jax.numpy as jnp
            from safetensors.flax import load_file as load

            return Artifact({k: np.asarray(a.astype(jnp.float32)) for k, a in load(path).items()})
        raise ValueError(
            f"{path} holds a type that NumPy lacks ({error}); cast to float32"
        ) from error


def _read_torch(path: Path, weights_kind: str | None, cast: bool) -> Artifact:
    try:
        import torch
    except ImportError as error:
        raise ValueError(
            f"reading {path} requires PyTorch: pip install 'jaxrobust[torch]', or save it as "
            ".safetensors on a machine with PyTorch"
        ) from error
    if zipfile.is_zipfile(path):
        _check_parts(path)
    inert: list[Any] = [(_Inert, name) for name in _globals(path) if _INERT.fullmatch(name)]
    try:
        with torch.serialization.safe_globals(inert):
            tree = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is damaged, or contains more than tensors and would run code when read; if "
            "you trust it, save it again with torch.save(model.state_dict(), ...) or as "
            ".safetensors"
        ) from error
    except Exception as error:  # EOFError, RuntimeError, ...: anything the bytes cause
        if "TorchScript" in str(error):
            raise ValueError(
                f"{path} is a TorchScript program, and reading it would run code; if you trust it, "
                "save its weights with torch.save(torch.jit.load(FILE).state_dict(), ...)"
            ) from error
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"{path} is not a complete PyTorch file ({reason}); download it again"
        ) from error
    stored = _state(path, tree, weights_kind)
    tensors = stored.arrays
    if cast:
        tensors |= {k: t.float() for k, t in tensors.items() if t.dtype == torch.bfloat16}
    if strange := [k for k, t in tensors.items() if t.dtype in (torch.bfloat16, torch.complex64)]:
        raise ValueError(
            f"{path}: {strange[0]} is {tensors[strange[0]].dtype}; rounding would change the "
            "weights; if you want that, cast them to float32 first"
        )
    arrays: Arrays = {}
    for key, tensor in tensors.items():
        try:  # strides are honored: torch counts them, and the copy is in the order of the indices
            arrays[key] = np.array(tensor.detach().numpy(), order="C")
        except (TypeError, RuntimeError) as error:  # sparse, quantized, without data, 8 bits, ...
            kind = f"{tensor.dtype}, {tensor.layout}, {tensor.device}"
            raise ValueError(
                f"{path}: {key} is not a plain array ({kind}); save it again in float32"
            ) from error
    return stored._replace(arrays=arrays)


class _Inert:
    """Accepts any arguments and any state, and keeps nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "_Inert":
        """Return an empty object."""
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __setstate__(self, state: Any) -> None:
        """Discard it."""


def _globals(path: Path) -> set[str]:
    """List the names that a file's pickles refer to; they are parsed, not run."""
    with contextlib.ExitStack() as stack:
        file: Any = stack.enter_context(path.open("rb"))
        pickles = 4  # in the older format: magic number, version, system, objects
        if zipfile.is_zipfile(path):
            archive = stack.enter_context(zipfile.ZipFile(path))
            data = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            if len(data) != 1:
                return set()
            file, pickles = stack.enter_context(archive.open(data[0])), 1
        names = set()
        with contextlib.suppress(
            Exception
        ):  # anything the bytes cause; reading reports what is wrong
            for _ in range(pickles):
                for operation, argument, _ in pickletools.genops(file):
                    if operation.name == "GLOBAL":
                        names.add(str(argument).replace(" ", "."))
        return names


def _check_parts(path: Path) -> None:
    """Verify the checksums that PyTorch writes with each tensor but does not check."""
    with zipfile.ZipFile(path) as archive:
        for part in archive.infolist():
            if not part.CRC:  # written without, see torch.serialization.set_crc32_options
                continue
            try:
                with archive.open(part) as file:
                    while file.read(2**20):
                        pass
            except zipfile.BadZipFile as error:
                raise ValueError(
                    f"{path} is damaged ({part.filename} has a wrong checksum); download it again"
                ) from error


def _state(path: Path, tree: Any, weights_kind: str | None) -> Artifact:
    try:
        stored = state_dict(tree, weights_kind)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if stored is None:
        raise ValueError(
            f"{path} holds no state dict at the top or under {', '.join(_PLAIN)}; save it with "
            "torch.save(model.state_dict(), ...)"
        )
    if weights_kind and stored.facts.which is None:
        under = f", under {stored.facts.place!r}," if stored.facts.place else ""
        raise ValueError(
            f"{path} holds one set of weights{under} and does not say whether they are averaged "
            "or raw; leave --which out"
        )
    return stored


def state_dict(tree: Any, weights_kind: str | None, depth: int = 5) -> Artifact | None:
    """Find the name -> array mapping at any depth of a checkpoint; None if there is none."""
    import torch

    if not isinstance(tree, dict) or depth == 0:
        return None
    if tree and all(isinstance(k, str) and torch.is_tensor(v) for k, v in tree.items()):
        return Artifact(tree)
    there = _places(tree)
    chosen = weights_kind or next((kind for kind in ("ema", None, "raw") if there[kind]), None)
    other = {"ema": "raw", "raw": "ema"}.get(chosen or "", "")
    if weights_kind and there[other] and not (there[weights_kind] or there[None]):
        raise ValueError(
            f"it holds only {WHICH[other]} weights, under {there[other][0]!r}; ask for {other}"
        )
    kind = chosen if there[chosen] else None
    for key in there[kind] or [k for k in _INSIDE if k in tree]:
        if (stored := state_dict(tree[key], weights_kind, depth - 1)) is not None:
            place = f"{key}/{stored.facts.place}".rstrip("/")
            facts = WeightFacts(which=kind or stored.facts.which, place=place)
            return Artifact(stored.arrays, facts)
    if kind:
        raise ValueError(
            f"{there[kind][0]!r} holds no state dict of {WHICH[kind]} weights; ask for {other}"
        )
    return None


def _places(tree: dict[Any, Any]) -> dict[str | None, list[str]]:
    keys = [k for k, value in tree.items() if isinstance(k, str) and isinstance(value, dict)]
    plain = [k for k in _PLAIN if k in keys]
    average = [k for k in keys if _AVERAGE.fullmatch(k)]
    raw = [_UNAVERAGED + k for k in _PLAIN if _UNAVERAGED + k in keys]
    if raw:  # the key without that word holds their average
        averages = [k for k in plain if _UNAVERAGED + k in raw]
        others = [k for k in plain if k not in averages]
        return {"ema": average + averages, "raw": raw, None: others}
    if average:
        return {"ema": average, "raw": plain, None: []}
    return {"ema": [], "raw": [], None: plain}
