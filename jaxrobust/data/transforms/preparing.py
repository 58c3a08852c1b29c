"""Evaluation preprocessing, bit for bit as in torchvision on PIL images.

All functions take `uint8[H,W,C]` NumPy arrays (C is 1 for gray, 3 for RGB) and use PIL.
"""

import functools
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from jaxrobust.data.transforms.decoding import decode, to_pixels

_CHANNELS = (1, 3)
BILINEAR, BICUBIC = Image.Resampling.BILINEAR, Image.Resampling.BICUBIC
_KNOWN_PILLOW = 11 <= int(Image.__version__.split(".")[0]) <= 13  # known order
_RADIUS = 2  # of BICUBIC, in pixels of the smaller image; BILINEAR's is 1


def resize_crop(
    image: np.ndarray, *, resize: int | None, crop: int | None, resample: Image.Resampling = BICUBIC
) -> np.ndarray:
    """Resize the image's short side to `resize`, then crop the center to `crop` x `crop`.

    Args:
      image: uint8[H,W,C].
      resize: pixels; the long side is truncated. None keeps the size, as does a short side that
        already is `resize`.
      crop: pixels; smaller images are padded with black; None does not crop.
      resample: BICUBIC or BILINEAR, antialiased.
    Source: torchvision's Resize and CenterCrop on PIL images, bit for bit; parity:
      tests/data/transforms/test_transforms.py.
    """
    height, width = image.shape[:2]
    short, long = min(height, width), max(height, width)
    if resize is not None and short != resize:
        far = int(resize * long / short)
        rows, columns = (far, resize) if width <= height else (resize, far)
        # Pillow 13 reverses the order for images that lose more than twice as many rows as columns.
        down, across = height - rows, width - columns
        by_rows_first = _KNOWN_PILLOW and not (down > 0 and down > 2 * across)
        if crop is not None and crop <= resize and by_rows_first:
            return _resized_center(image, rows, columns, crop, resample)
        image = to_array(to_pil(image).resize((columns, rows), resample))
    return image if crop is None else _center_crop(image, crop)


def _resized_center(
    image: np.ndarray, rows: int, columns: int, crop: int, resample: Image.Resampling
) -> np.ndarray:
    """Resize to (rows, columns) and crop the center, using only the rows that the crop needs."""
    # Along the rows, rounded, then along the columns, as Pillow does; saves a fifth of the time.
    height, width = image.shape[:2]
    row, column = _offset(rows, crop), _offset(columns, crop)
    reach = _RADIUS * max(1.0, height / rows) + 1  # support of a resized pixel, plus rounding
    first = max(0, math.floor(row * height / rows - reach))
    last = min(height, math.ceil((row + crop) * height / rows + reach))
    strip = to_pil(image[first:last])
    if _exact(width, columns):
        box = (column * width / columns, 0, (column + crop) * width / columns, last - first)
        strip = strip.resize((crop, last - first), resample, box)
    else:
        strip = strip.resize((columns, last - first), resample)
        strip = strip.crop((column, 0, column + crop, last - first))
    if _exact(height, rows):
        box = (0, row * height / rows - first, crop, (row + crop) * height / rows - first)
        return to_array(strip.resize((crop, crop), resample, box))
    padded = Image.new(strip.mode, (crop, height))
    padded.paste(strip, (0, first))
    return to_array(padded.resize((crop, rows), resample))[row : row + crop]


def _exact(size: int, resized: int) -> bool:
    """Return whether resizing a part alone is exact when `size` pixels become `resized`."""
    # Pillow computes weights in doubles from a box in float32. All positions are multiples of size
    # / resized, which is exact if it is a fraction over a small power of two.
    under = resized // math.gcd(size, resized)
    return under & (under - 1) == 0 and size * under <= 2**24


def _center_crop(image: np.ndarray, crop: int) -> np.ndarray:
    height, width = image.shape[:2]
    if height < crop or width < crop:
        missing = (max(0, crop - height), max(0, crop - width), 0)
        image = np.pad(image, [(pixels // 2, pixels - pixels // 2) for pixels in missing])
    row, column = (_offset(side, crop) for side in image.shape[:2])
    return image[row : row + crop, column : column + crop]


def _offset(size: int, crop: int) -> int:
    return round((size - crop) / 2)  # half to even


Transform = Callable[[np.ndarray], np.ndarray]

# RobustBench's preprocessing ids for ImageNet.
EVALUATION: dict[str, Transform] = {
    "none": lambda image: image,
    "Res256Crop224": functools.partial(resize_crop, resize=256, crop=224, resample=BILINEAR),
    "BicubicRes256Crop224": functools.partial(resize_crop, resize=256, crop=224),
    "Res224": lambda image: to_array(to_pil(image).resize((224, 224), BILINEAR)),
    "Crop288": functools.partial(resize_crop, resize=None, crop=288),
}
_OTHER_NAMES = {
    "Res256Crop224": "bilinear-256-crop-224",
    "BicubicRes256Crop224": "bicubic-256-crop-224",
}
_IMAGES = "pass a PIL image, encoded bytes or uint8[H,W,C] in 0..255 with C 1 or 3"
_OURS = re.compile(r"(bicubic|bilinear)-(\d+)-crop-(\d+)")
_SHARE = re.compile(r"(bicubic|bilinear)-(0\.\d+|1(?:\.0+)?)")


def resolve(preprocessing_id: str | None, image_size: int) -> str:
    """Resolve an id's sizes: `bicubic-0.875` at 224 is `bicubic-256-crop-224`, others stay.

    Args:
      preprocessing_id: an id of `evaluation_transform`, or `bicubic-SHARE`, `bilinear-SHARE`, which
        crop `image_size` pixels, this share of the short side, as with timm's `crop_pct`.
      image_size: the size in pixels that the network expects.
    Raises:
      ValueError: a share of 0.
    """
    name = _name(preprocessing_id)
    match = _SHARE.fullmatch(name)
    if match is None:
        return name
    if not float(match[2]):
        raise ValueError(f"preprocessing {name!r}: the share must be in (0, 1]")
    return f"{match[1]}-{math.floor(image_size / float(match[2]))}-crop-{image_size}"


def same_preprocessing(first: str, second: str, image_size: int) -> bool:
    """Return whether two ids give the same images: RobustBench has other names for some of ours."""
    names = (resolve(value, image_size) for value in (first, second))
    return len({_OTHER_NAMES.get(name, name) for name in names}) == 1


def _name(preprocessing_id: str | None) -> str:
    if preprocessing_id is None or preprocessing_id == "None":  # RobustBench's, also as text
        return "none"
    return preprocessing_id


def evaluation_transform(preprocessing_id: str | None) -> Callable[[Any], np.ndarray]:
    """Return the function that prepares an image for a network evaluated under this id.

    Args:
      preprocessing_id: RobustBench's `Res256Crop224`, `BicubicRes256Crop224`, `Res224`, `Crop288`
        or `none` (also None); or `bicubic-RESIZE-crop-SIZE`, `bilinear-RESIZE-crop-SIZE`.
    Returns:
      (PIL image, encoded bytes or uint8[H,W,C]) -> uint8[H,W,3], a new array; arrays keep their
      channels. It raises ValueError for any other input.
    Raises:
      ValueError: an unknown id, one that needs `resolve`, or one with a size of 0.

    >>> photograph = np.zeros((300, 400, 3), np.uint8)
    >>> evaluation_transform("Res256Crop224")(photograph).shape
    (224, 224, 3)
    """
    name = _name(preprocessing_id)
    if match := _OURS.fullmatch(name):
        if not int(match[2]) or not int(match[3]):
            raise ValueError(f"preprocessing {name!r}: its sizes must be at least 1 pixel")
        transform: Transform = functools.partial(
            resize_crop,
            resize=int(match[2]),
            crop=int(match[3]),
            resample=BICUBIC if match[1] == "bicubic" else BILINEAR,
        )
    elif name in EVALUATION:
        transform = EVALUATION[name]
    elif _SHARE.fullmatch(name):
        raise ValueError(
            f"preprocessing {name!r} depends on the size of the network's images; resolve it first:"
            f" at 224 px it is {resolve(name, 224)!r}"
        )
    else:
        raise ValueError(
            f"unknown preprocessing {name!r}; use {', '.join(EVALUATION)}, "
            "bicubic-RESIZE-crop-SIZE, bilinear-RESIZE-crop-SIZE or, at any size, "
            "bicubic-SHARE or bilinear-SHARE, such as bicubic-0.875"
        )
    return functools.partial(_prepare, transform=transform)


def _prepare(image: Any, *, transform: Transform) -> np.ndarray:
    if isinstance(image, bytes | bytearray | memoryview):
        image = decode(image, channels=3)
    elif isinstance(image, Image.Image):
        image = to_pixels(image, "RGB")
    elif not isinstance(image, np.ndarray):
        raise ValueError(f"images of type {type(image).__name__} are not supported; {_IMAGES}")
    elif image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] not in _CHANNELS:
        raise ValueError(f"an image of {image.dtype}{image.shape} is not supported; {_IMAGES}")
    return np.array(transform(image), order="C")  # always a copy, even of a view


def to_pil(image: np.ndarray) -> Image.Image:
    """Convert uint8[H,W,C] to a PIL image."""
    if image.shape[2] == 1:
        return Image.fromarray(image[:, :, 0])
    pixels = image.base
    if (  # a view of RGBX pixels, as `decode` returns them
        isinstance(pixels, np.ndarray)
        and pixels.dtype == np.uint8
        and pixels.ndim == 3
        and pixels.shape[2] == 4
        and pixels.flags.c_contiguous
        and pixels.strides == image.strides
        and image.size
    ):
        start = image.ctypes.data - pixels.ctypes.data
        if start % 4 == 0:
            data, size = pixels.reshape(-1)[start:], (image.shape[1], image.shape[0])
            return Image.frombytes("RGB", size, data, "raw", "RGBX", image.strides[0], 1)
    return Image.fromarray(image)


def to_array(image: Image.Image) -> np.ndarray:
    """Convert a PIL image of mode L or RGB to uint8[H,W,C], read-only."""
    array = np.asarray(image)
    return array if array.ndim == 3 else array[:, :, None]
