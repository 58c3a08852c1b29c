"""Decodes bytes to the same pixels as Pillow's `Image.open(file).convert("RGB")`.

These are the pixels that torchvision, timm and RobustBench use: full size, EXIF orientation and
transparency ignored, 16 bits clipped. JPEGs are decoded by simplejpeg, which is faster, if a check
shows that its output equals Pillow's on this machine.
"""

import functools
import io
import logging
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

_MODES = {1: "L", 3: "RGB"}
_ENCODED = re.compile(rb"P([56]) ([1-9]\d*) ([1-9]\d*) 255\n")
# (mode of a JPEG, requested mode) that need no conversion by Pillow -> simplejpeg's output. RGBX is
# how Pillow stores RGB: `transforms.to_pil` then copies rows and rearranges no pixels.
_FAST = {("RGB", "RGB"): "RGBX", ("L", "RGB"): "RGBX", ("L", "L"): "GRAY"}


def decode(
    data: bytes | bytearray | memoryview, *, channels: int | None = None, clips: bool = True
) -> np.ndarray:
    """Decode the image in `data` (JPEG, PNG or any other format of PIL) to `uint8[H,W,C]`.

    The result is read-only, and its pixels may be four bytes apart.

    Args:
      data: the content of the file.
      channels: 1 or 3, converted if necessary; default: 1 for a gray file, else 3.
      clips: whether gray values of 16 bits or floats are clipped, as in Pillow, or rejected.
    Raises:
      ValueError: the bytes are not a complete image; values would be clipped.
    """
    if not len(data):
        raise ValueError("not a complete image file: it is empty")
    if (array := _as_encoded(data, channels)) is not None:
        return array
    try:
        with Image.open(io.BytesIO(data)) as image:  # reads the header only
            mode = _MODES[channels or (1 if image.mode == "L" else 3)]
            if image.format in ("JPEG", "MPO") and (image.mode, mode) in _FAST:
                array = _decode_fast(data, _FAST[image.mode, mode])
                if array is not None and array.shape[1::-1] == image.size:
                    array.flags.writeable = False
                    return array[:, :, :3]
            if not clips and is_deep(image.mode):
                raise _Deep(
                    f"its gray values ({image.mode}) do not fit in 8 bits; save it with 8 bits"
                )
            array = to_pixels(image, mode)
    except _Deep:
        raise
    except UnidentifiedImageError as error:  # whose own message is about our buffer
        raise ValueError(
            "not a complete image file: Pillow does not recognize its format"
        ) from error
    except Exception as error:  # PIL raises OSError, SyntaxError, struct.error, ... for bad files
        raise ValueError(f"not a complete image file: {error}") from error
    return array if array.ndim == 3 else array[:, :, None]


class _Deep(ValueError):
    """Gray values of more than 8 bits, or floats."""


def is_deep(mode: str) -> bool:
    """Return whether a Pillow mode holds gray values of more than 8 bits, or floats."""
    return mode == "F" or mode.startswith("I")


def _as_encoded(data: Any, channels: int | None) -> np.ndarray | None:
    """Return the pixels of a file that `encode` wrote; None for other files, left to Pillow."""
    # This takes a third less time for an array of small images.
    header = _ENCODED.match(data)
    if header is None:
        return None
    shape = int(header[3]), int(header[2]), 3 if header[1] == b"6" else 1
    if len(data) - header.end() != math.prod(shape) or channels not in (None, shape[2]):
        return None
    array = np.frombuffer(data, np.uint8, offset=header.end()).reshape(shape)
    array.flags.writeable = False
    return array


def encode(image: np.ndarray) -> bytes:
    """Encode uint8[H,W], uint8[H,W,1] or uint8[H,W,3] as a PGM or PPM file, which is cheap."""
    height, width, *channels = image.shape
    return b"P%d %d %d 255\n" % (6 if channels == [3] else 5, width, height) + image.tobytes()


def to_pixels(image: Image.Image, mode: str) -> np.ndarray:
    """Convert to uint8[H,W] for L and uint8[H,W,3] for RGB; the result may be a view of `image`."""
    if image.mode == mode:
        return np.asarray(image)
    image.load()
    if "transparency" in image.info:  # does not change pixels, but Pillow warns that it is dropped
        image = image.copy()
        del image.info["transparency"]
    return np.asarray(image.convert(mode))


def _decode_fast(data: Any, layout: str) -> np.ndarray | None:
    """Return the pixels of a flawless JPEG; None for others, which Pillow then judges."""
    decoder = _fast_decoder()
    if decoder is None:
        return None
    try:
        return decoder(data, layout)
    except ValueError:  # simplejpeg is strict: it turns libjpeg's warnings into errors
        return None


@functools.cache
def _fast_decoder() -> Callable[[Any, str], np.ndarray] | None:
    """Return simplejpeg's decoder if it is installed and its output equals Pillow's."""
    try:
        import simplejpeg
    except ImportError:
        return None
    decoder = functools.partial(simplejpeg.decode_jpeg, fastdct=False, fastupsample=False)
    try:
        different = [name for name, data in _samples(simplejpeg) if not _agrees(decoder, data)]
    except Exception as error:  # whatever happens, Pillow works
        different = [str(error)]
    if not different:
        return decoder
    logging.getLogger(__name__).warning(
        "using Pillow %s for all images, which is slower: pixels of simplejpeg %s differ (%s)",
        Image.__version__,
        simplejpeg.__version__,
        different[0],
    )
    return None


def _agrees(decoder: Callable[[Any, str], np.ndarray], data: bytes) -> bool:
    with Image.open(io.BytesIO(data)) as image:
        return np.array_equal(decoder(data, "RGB"), np.asarray(image.convert("RGB")))


def _samples(simplejpeg: Any) -> Iterator[tuple[str, bytes]]:
    """Yield (name, a small JPEG): every subsampling, rows longer than a vector register, edges."""
    y, x, c = np.indices((37, 141, 3))
    noise = np.random.default_rng(0).integers(0, 64, y.shape)
    image = ((x * (c + 2) + y * 3 + (x // 9 % 2) * 90 + noise) % 256).astype(np.uint8)
    for shape in ((37, 141), (16, 32), (1, 33), (33, 1)):
        part = np.ascontiguousarray(image[: shape[0], : shape[1]])
        for subsampling in ("444", "422", "420", "440", "411"):
            yield (
                f"{subsampling} {shape[1]}x{shape[0]}",
                simplejpeg.encode_jpeg(part, quality=80, colorsubsampling=subsampling),
            )
        for name, picture, options in (
            ("progressive", part, {"progressive": True}),
            ("grey", part[:, :, 0], {}),
            ("coarse", part, {"quality": 5}),
            ("restarting", part, {"restart_marker_blocks": 2}),
        ):
            buffer = io.BytesIO()
            Image.fromarray(picture).save(buffer, "JPEG", **options)
            yield f"{name} {shape[1]}x{shape[0]}", buffer.getvalue()
