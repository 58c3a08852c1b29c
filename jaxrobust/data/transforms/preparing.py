"""How evaluation prepares an image, bit for bit as torchvision does on PIL images.

Everything works on `uint8[H,W,C]` NumPy arrays (C is 1 for grey, 3 for RGB) with PIL underneath.
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
_KNOWN_PILLOW = 11 <= int(Image.__version__.split(".")[0]) <= 13  # of `_along_rows_first`
_RADIUS = 2  # of BICUBIC, in pixels of the smaller image; BILINEAR's is 1


def resize_crop(
    image: np.ndarray, *, resize: int | None, crop: int | None, resample: Image.Resampling = BICUBIC
) -> np.ndarray:
    """Return the image with its short side resized to `resize`, then its central `crop` x `crop`
    pixels.

    Args:
      image: uint8[H,W,C].
      resize: pixels; the long side is truncated; None keeps the size, and so does an image whose
        short side is `resize` already.
      crop: pixels; black is added around an image that is smaller; None crops nothing.
      resample: BICUBIC or BILINEAR, antialiased.
    Source: torchvision's Resize and CenterCrop on PIL images, bit for bit; parity:
      tests/data/transforms/test_transforms.py.
    """
    height, width = image.shape[:2]
    short, long = min(height, width), max(height, width)
    if resize is not None and short != resize:
        far = int(resize * long / short)
        rows, columns = (far, resize) if width <= height else (resize, far)
        if crop is not None and crop <= resize and _along_rows_first(image, rows, columns):
            return _resized_center(image, rows, columns, crop, resample)
        image = to_array(to_pil(image).resize((columns, rows), resample))
    return image if crop is None else _center_crop(image, crop)


def _resized_center(
    image: np.ndarray, rows: int, columns: int, crop: int, resample: Image.Resampling
) -> np.ndarray:
    """Resize to (rows, columns) and crop the centre, of only the rows that the crop depends on.

    Along the rows, rounded, then along the columns, as Pillow does; a fifth of the time saved.
    """
    height, width = image.shape[:2]
    row, column = _offset(rows, crop), _offset(columns, crop)
    reach = _RADIUS * max(1.0, height / rows) + 1  # how far a resized pixel looks, and rounding
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


def _along_rows_first(image: np.ndarray, rows: int, columns: int) -> bool:
    """Tell whether Pillow is known to resize this image along its rows, then along its columns.

    Pillow 13 turns the order round for images that lose more than twice as much height as width.
    """
    down, across = image.shape[0] - rows, image.shape[1] - columns
    return _KNOWN_PILLOW and not (down > 0 and down > 2 * across)


def _exact(size: int, resized: int) -> bool:
    """Tell whether resizing a part of `size` pixels to its part of `resized` gives the same pixels.

    Pillow weighs pixels by where they lie, in doubles from a box in float32: all those numbers are
    multiples of size / resized, exact if that is a fraction over a small power of two.
    """
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
    """Return the id with its sizes: `bicubic-0.875` at 224 is `bicubic-256-crop-224`, others stay.

    Args:
      preprocessing_id: an id of `evaluation_transform`, or `bicubic-SHARE`, `bilinear-SHARE`, where
        the crop of `image_size` is that share of the short side, as timm's `crop_pct`.
      image_size: pixels that the network expects.
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
    """Tell whether two ids make the same images: RobustBench names some of ours."""
    names = (resolve(value, image_size) for value in (first, second))
    return len({_OTHER_NAMES.get(name, name) for name in names}) == 1


def _name(preprocessing_id: str | None) -> str:
    if preprocessing_id is None or preprocessing_id == "None":  # RobustBench's, and as text
        return "none"
    return preprocessing_id


def evaluation_transform(preprocessing_id: str | None) -> Callable[[Any], np.ndarray]:
    """Return the function from an image to what a network evaluated under that id receives.

    Args:
      preprocessing_id: RobustBench's `Res256Crop224`, `BicubicRes256Crop224`, `Res224`, `Crop288`
        or `none` (also None); or `bicubic-RESIZE-crop-SIZE`, `bilinear-RESIZE-crop-SIZE`.
    Returns:
      (PIL image, encoded bytes or uint8[H,W,C]) -> uint8[H,W,3], a new array; an array keeps its
      channels. Raises ValueError for an image of another kind.
    Raises:
      ValueError: an unknown id, one for `resolve`, or one with a size of 0.

    >>> photograph = np.zeros((300, 400, 3), np.uint8)
    >>> evaluation_transform("Res256Crop224")(photograph).shape
    (224, 224, 3)
    """
    name = _name(preprocessing_id)
    if match := _OURS.fullmatch(name):
        if not int(match[2]) or not int(match[3]):
            raise ValueError(f"preprocessing {name!r}: its sizes must be 1 pixel or more")
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
            f"unknown preprocessing {name!r}: known are {', '.join(EVALUATION)}, "
            "bicubic-RESIZE-crop-SIZE and bilinear-RESIZE-crop-SIZE, and at any size "
            "bicubic-SHARE and bilinear-SHARE, such as bicubic-0.875"
        )
    return functools.partial(_prepare, transform=transform)


def _prepare(image: Any, *, transform: Transform) -> np.ndarray:
    if isinstance(image, bytes | bytearray | memoryview):
        image = decode(image, channels=3)
    elif isinstance(image, Image.Image):
        image = to_pixels(image, "RGB")
    elif not isinstance(image, np.ndarray):
        raise ValueError(f"an image of type {type(image).__name__} is unknown; {_IMAGES}")
    elif image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] not in _CHANNELS:
        raise ValueError(f"an image {image.dtype} of shape {image.shape} is unknown; {_IMAGES}")
    return np.array(transform(image), order="C")  # the caller's own, whatever it is a view of


def to_pil(image: np.ndarray) -> Image.Image:
    """Return the PIL image of uint8[H,W,C]."""
    if image.shape[2] == 1:
        return Image.fromarray(image[:, :, 0])
    pixels = image.base
    if (  # a window of RGBX pixels, as `decode` returns them
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
    """Return the uint8[H,W,C] of a PIL image of mode L or RGB, read-only."""
    array = np.asarray(image)
    return array if array.ndim == 3 else array[:, :, None]
