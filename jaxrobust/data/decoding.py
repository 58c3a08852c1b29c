"""Encoded bytes to pixels."""

import io

import numpy as np
from PIL import Image

_MODES = {1: "L", 3: "RGB"}


def decode(data: bytes | bytearray | memoryview, *, channels: int | None = None) -> np.ndarray:
    """The image `uint8[H,W,C]` in `data` (JPEG, PNG or whatever else PIL reads).

    Args:
      data: the bytes of the file.
      channels: 1 or 3, converted if need be; default: 1 for a grey file, else 3.
    Raises:
      ValueError: the bytes are not an image, or not a whole one.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            mode = _MODES[channels or (1 if image.mode == "L" else 3)]
            array = np.asarray(image if image.mode == mode else image.convert(mode))
    except Exception as error:  # PIL raises OSError, SyntaxError, struct.error, ... on bad files
        raise ValueError(f"not a whole image file: {error}") from error
    return array if array.ndim == 3 else array[:, :, None]
