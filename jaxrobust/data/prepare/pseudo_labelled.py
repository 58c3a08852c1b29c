"""`jaxrobust prepare pseudo-labelled FILE.pickle`: convert images with labels to .npz.

FILE is a pickle in the format of Carmon et al. 2019 (arXiv 1905.13736), who publish 500,000 tiny
images with labels from a network: a dict with `data`, uint8[N,H,W,3], and `extrapolated_targets`,
integers [N]. OUT (default: FILE.npz) gets them as `image` and `label`; --config.data.extra=npz:OUT
reads it.

A pickle can name any function to be called. This command reads only arrays, rejects a file that
asks for anything else, and runs nothing from it.

Exit codes: 0 done; 2 a mistake or a rejected file, with one sentence on stderr; 3 stopped for
another reason, which it names (full disk); 130 interrupted.
"""

import argparse
import io
import pickle
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from jaxrobust.data.prepare import command
from jaxrobust.runtime.commandline.arguments import ending
from jaxrobust.runtime.files import whole

NAME = "pseudo-labelled"
_KEYS = ("data", "extrapolated_targets")
_BROKEN = (EOFError, KeyError, IndexError, TypeError, ValueError, AttributeError, MemoryError)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line, where hyphens and underscores are the same."""
    parser = command.parser(__doc__, NAME)
    parser.add_argument("file", type=Path, metavar="FILE", help="The pickle.")
    parser.flag(
        "classes",
        type=int,
        default=10,
        help="Number of classes; default: %(default)s.",
    )
    parser.flag("out", default=None, help="Output file; default: FILE.npz.")
    return parser.parse_args(argv)


def unpickle(content: bytes | BinaryIO) -> Any:
    """Read a pickle of arrays, lists, texts and numbers; call nothing else."""
    file = io.BytesIO(content) if isinstance(content, bytes) else content
    return _Unpickler(file, encoding="latin1").load()


def _array(*_: object) -> np.ndarray:
    """Return an empty array, which is what NumPy's pickles ask for first and then fill."""
    return np.ndarray((0,), np.uint8)


def _bytes(text: str, encoding: str) -> bytes:
    """Encode as latin-1, which Python 3 asks for when it pickles bytes in Python 2's protocol."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes in the encoding {encoding!r}")
    return text.encode("latin1")


class _Unpickler(pickle.Unpickler):
    """A pickle can name any function to be called; this class allows only these."""

    _ALLOWED = {  # noqa: RUF012  # of a class that lives for a call
        ("numpy.core.multiarray", "_reconstruct"): _array,
        ("numpy._core.multiarray", "_reconstruct"): _array,
        ("numpy", "ndarray"): "the kind of array, which is not called",
        ("numpy", "dtype"): np.dtype,
        ("_codecs", "encode"): _bytes,
    }

    def find_class(self, module: str, name: str) -> Any:
        """Look up one of the few allowed classes."""
        if (module, name) not in self._ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not allowed")
        return self._ALLOWED[module, name]


def read(path: Path, *, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the images uint8[N,H,W,3] and labels i64[N] of a pickle."""
    if not path.is_file():
        raise ValueError(f"{path} does not exist; check the path")
    try:
        with path.open("rb") as file:
            data = unpickle(file)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds more than arrays, or is damaged ({error}); write its images and labels "
            "with numpy.savez(PATH, image=..., label=...)"
        ) from error
    except _BROKEN as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(
            f"{path} is not a pickle, or is damaged ({reason}); download it again"
        ) from error
    wanted = " and ".join(map(repr, _KEYS))
    if not isinstance(data, dict) or not set(_KEYS) <= data.keys():
        holds = ", ".join(map(repr, data)) if isinstance(data, dict) else type(data).__name__
        raise ValueError(f"{path} holds {holds or 'nothing'}; it must hold a dict with {wanted}")
    for key, value in data.items():
        if not isinstance(value, np.ndarray) or value.dtype.hasobject:
            raise ValueError(
                f"{path} holds more than arrays: {key!r} is of type {type(value).__name__}; write "
                "its images and labels with numpy.savez(PATH, image=..., label=...)"
            )
    images, labels = (data[key] for key in _KEYS)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or not len(images):
        raise ValueError(
            f"{path}: {_KEYS[0]!r} is {images.dtype}{list(images.shape)}, not uint8[N,H,W,3]; "
            "write pixels from 0 to 255 as uint8"
        )
    if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
        raise ValueError(
            f"{path}: {_KEYS[1]!r} is {labels.dtype}{list(labels.shape)}, not one integer for each "
            f"of the {len(images)} images"
        )
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(
            f"{path}: labels go from {labels.min()} to {labels.max()}, outside 0 to "
            f"{classes - 1}; remove the images with such labels, or set --classes"
        )
    return images, labels.astype(np.int64)


def main(argv: list[str] | None = None) -> None:
    """Write the arrays and print where; on failure, exit with one sentence on stderr."""
    args = parse(argv)
    out = Path(args.out or args.file.with_suffix(".npz"))
    again = "run the same command again"
    with ending(again, f"; {again}"):
        if out.suffix != ".npz":
            raise ValueError(f"--out {out}: name a file that ends in .npz")
        images, labels = read(args.file, classes=args.classes)
        out.parent.mkdir(parents=True, exist_ok=True)
        with whole.writing(out, images.nbytes + labels.nbytes) as part, part.open("wb") as file:
            np.savez(file, image=images, label=labels)
    counts = np.bincount(labels, minlength=args.classes).tolist()
    print(f"{out}: {len(images):,} images; per class: {', '.join(map(str, counts))}")
    print(f"train with --config.data.extra=npz:{out}")
