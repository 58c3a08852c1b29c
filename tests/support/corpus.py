"""Broken weight files, each with what the error must say; for convnext_n, 10 classes, 16 px."""

import json
import struct
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

KWARGS = {"num_classes": 10, "image_size": 16}
_CONV, _FC, _GAMMA = "stem.0.weight", "head.fc.weight", "stages.0.blocks.0.gamma"
_MLP = "stages.1.blocks.0.mlp.fc1.weight"

Arrays = dict[str, np.ndarray]


def _without(name):
    return lambda arrays: {k: v for k, v in arrays.items() if k != name}


def _with(name, change):
    return lambda arrays: arrays | {name: np.ascontiguousarray(change(arrays.get(name)))}


def _renamed(old, new):
    return lambda arrays: {k.replace(old, new): v for k, v in arrays.items()}


def _nan(array):
    array = array.copy()
    array.flat[0] = np.nan
    return array


# name of the case -> (change of timm's arrays, what the error says)
ARRAYS: dict[str, tuple[Callable[[Arrays], Arrays], str]] = {
    "missing key": (_without(_GAMMA), r"1 weights do not fit.*gamma: not filled by any"),
    "missing bias of the head": (_without("head.fc.bias"), r"head\.fc\.bias: not filled"),
    "half of the blocks": (
        lambda arrays: {k: v for k, v in arrays.items() if ".blocks.1." not in k},
        r"27 weights do not fit.*blocks\.1\.\S+: not filled",
    ),
    "extra key": (_with("extra", lambda _: np.zeros(3, np.float32)), r"extra: 0 rows match"),
    "optimizer inside": (
        _with("optimizer.state.0.exp_avg", lambda _: np.zeros(3, np.float32)),
        r"exp_avg: 0 rows match",
    ),
    "block too many": (
        _with("stages.0.blocks.9.gamma", lambda _: np.zeros(64, np.float32)),
        r"which this network does not have",
    ),
    "transposed kernel": (_with(_MLP, np.transpose), r"fc1\.weight: shape \(512, 128\) for"),
    "transposed square-free head": (_with(_FC, np.transpose), r"head\.fc\.weight: shape"),
    "channels-last array": (
        _with(_CONV, lambda a: a.transpose(0, 2, 3, 1)),
        r"stem\.0\.weight: shape \(\d+, \d+, \d+, \d+\) for stem\.0\.kernel",
    ),
    "flattened kernel": (_with(_MLP, np.ravel), r"fc1\.weight: shape"),
    "flattened convolution": (
        _with(_CONV, np.ravel),
        r"stem\.0\.weight: shape \(\d+,\) does not fit ",
    ),
    "wrong classes": (
        lambda arrays: arrays | {k: arrays[k][:7] for k in (_FC, "head.fc.bias")},
        r"2 weights do not fit; check the model name, num_classes.*\(256, 7\).*\(256, 10\)",
    ),
    "fp16": (
        lambda arrays: {k: v.astype(np.float16) for k, v in arrays.items()},
        r"dtype float16, expected float32.*cast them",
    ),
    "bfloat16": (
        lambda arrays: {k: v.astype(ml_dtypes.bfloat16) for k, v in arrays.items()},
        r"dtype bfloat16, expected float32",
    ),
    "one fp16 array": (_with(_FC, np.float16), r"1 weights do not fit.*dtype float16"),
    "one float64 array": (_with(_FC, np.float64), r"1 weights do not fit.*dtype float64"),
    "quantised": (_with(_FC, np.int8), r"dtype int8"),
    "not a number": (_with(_FC, _nan), r"holds values that are not finite"),
    "infinite": (_with(_GAMMA, lambda a: a + np.inf), r"gamma: holds values that are not finite"),
    "half a normalization": (
        _with("normalize.mean", lambda _: np.zeros((1, 3, 1, 1), np.float32)),
        r"normalize\.std: not filled",
    ),
    "normalization by zero": (
        lambda arrays: (
            arrays | {f"normalize.{k}": np.zeros((1, 3, 1, 1), np.float32) for k in ("mean", "std")}
        ),
        r"1 weights do not fit.*normalize\.std: does not fit \[0, 1\] pixels",
    ),
    "normalization of 0 to 255": (
        lambda arrays: (
            arrays
            | {f"normalize.{k}": np.full((1, 3, 1, 1), 58, np.float32) for k in ("mean", "std")}
        ),
        r"normalize\.mean: does not fit \[0, 1\] pixels.*divide by 255",
    ),
    "normalized twice": (
        lambda arrays: (
            {f"model.model.{k}": v for k, v in arrays.items()}
            | {f"{p}normalize.mean": np.zeros((1, 3, 1, 1), np.float32) for p in ("", "model.")}
        ),
        r"normalize\.mean and model\.normalize\.mean are both present",
    ),
    "normalization of gray images": (
        lambda arrays: (
            arrays | {f"normalize.{k}": np.ones((1, 1, 1, 1), np.float32) for k in ("mean", "std")}
        ),
        r"normalize\.mean: shape \(1,\) for normalize\.mean \(3,\)",
    ),
    "prefix on some": (
        lambda arrays: {f"module.{k}" if "stem" in k else k: v for k, v in arrays.items()},
        r"module\.stem\.0\.bias: 0 rows match",
    ),
    "unknown prefix": (
        lambda arrays: {f"student.{k}": v for k, v in arrays.items()},
        r"student\.head\.fc\.bias: 0 rows match",
    ),
    "another architecture": (
        lambda arrays: {"conv1.weight": np.zeros((64, 3, 7, 7), np.float32)},
        r"conv1\.weight: 0 rows match",
    ),
    "ConvStem in a PatchStem": (_renamed("stem.0.", "stem.stem.3."), r"stem\.3\.\w+, which this"),
    "only the classifier": (
        lambda arrays: {k: v for k, v in arrays.items() if k.startswith("head.")},
        r"not filled by any source name",
    ),
    "twice under two names": (
        lambda arrays: arrays | {"stem.stem.1.weight": arrays["stem.1.weight"]},
        r"fills stem\.1\.scale a second time",
    ),
}


def _header(header: object, payload: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + payload


def _cut(share: float):
    def cut(whole: bytes) -> bytes:
        return whole[: int(len(whole) * share)]

    return cut


_PAGE = b"<!DOCTYPE html><html><head><title>Google Drive - Virus scan warning</title></head></html>"
_LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1144\n"
# name of the case -> (file name, bytes from those of a right safetensors file, what the error says)
BYTES: dict[str, tuple[str, Callable[[bytes], bytes], str]] = {
    "empty": ("a.safetensors", lambda whole: b"", "is empty; download it again"),
    "empty torch file": ("a.pt", lambda whole: b"", "is empty; download it again"),
    "truncated": ("a.safetensors", _cut(0.7), "not a complete safetensors file"),
    "truncated header": ("a.safetensors", _cut(1e-4), "not a complete safetensors file"),
    "garbage": ("a.safetensors", lambda whole: b"\0" * 999, "not a complete safetensors file"),
    "web page": ("a.safetensors", lambda whole: _PAGE, "is a web page, not weights: the download"),
    "web page as torch file": ("a.pth", lambda whole: b"\n" + _PAGE, "is a web page, not weights"),
    "refused by the hub": (
        "a.bin",
        lambda whole: b"Entry not found\n",
        "is text, not weights; it beg",
    ),
    "page behind a byte order mark": (
        "a.pt",
        lambda whole: b"\xef\xbb\xbf" + _PAGE,
        "web page, not",
    ),
    "LFS pointer": ("a.safetensors", lambda whole: _LFS, "Git LFS pointer.*git lfs pull"),
    "no arrays": ("a.safetensors", lambda whole: _header({}), "holds no arrays"),
    "half of the shards": (
        "model-00001-of-00002.safetensors",
        lambda whole: whole,
        r"one of 2 parts, but others are missing next to it; get model-00002",
    ),
    "unknown kind": ("a.npz", lambda whole: whole, r"unknown kind of file; give one of \.safet"),
}


def write(case: str, folder: Path, arrays: Arrays) -> tuple[Path, str]:
    """The path of a broken file made from timm's arrays, and what the error must say."""
    folder.mkdir(parents=True, exist_ok=True)
    if case in ARRAYS:
        change, message = ARRAYS[case]
        save_file(change(dict(arrays)), folder / "weights.safetensors")
        return folder / "weights.safetensors", message
    name, change_bytes, message = BYTES[case]
    save_file(arrays, folder / "whole.safetensors")
    whole = (folder / "whole.safetensors").read_bytes()
    (folder / name).write_bytes(change_bytes(whole))
    return folder / name, message
