"""Images on the host: decoding, random augmentation, and the preparation for evaluation.

Everything works on `uint8[H,W,C]` NumPy arrays (C is 1 for grey, 3 for RGB) with PIL underneath.
An augmentation is `op(image, rng) -> image`; it never writes into its input.
"""

import functools
import io
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

Op = Callable[[np.ndarray, np.random.Generator], np.ndarray]
_MODES = {1: "L", 3: "RGB"}
BILINEAR, BICUBIC = Image.Resampling.BILINEAR, Image.Resampling.BICUBIC


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


def random_crop(image: np.ndarray, rng: np.random.Generator, *, padding: int) -> np.ndarray:
    """A crop of the same size from the image with `padding` black pixels on every side."""
    height, width, channels = image.shape
    top, left = rng.integers(0, 2 * padding + 1, size=2).tolist()
    padded = np.zeros((height + 2 * padding, width + 2 * padding, channels), np.uint8)
    padded[padding : padding + height, padding : padding + width] = image
    return padded[top : top + height, left : left + width]


def flip(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The image, mirrored left to right with probability one half."""
    return image[:, ::-1] if rng.random() < 0.5 else image


def random_resized_crop(
    image: np.ndarray,
    rng: np.random.Generator,
    *,
    size: int,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> np.ndarray:
    """A random part of the image, resized to `uint8[size,size,C]` (bicubic, antialiased).

    Args:
      image: uint8[H,W,C].
      rng: draws the part.
      size: pixels.
      scale: range of the part's area, as a share of the image's.
      ratio: range of the part's width / height, drawn log-uniformly.
    Source: torchvision's RandomResizedCrop; parity: tests/test_transforms.py.
    """
    top, left, height, width = _resized_crop_box(image.shape, rng, scale, ratio)
    part = _to_pil(image[top : top + height, left : left + width])
    return _to_array(_resize(part, (size, size), BICUBIC))


def _resized_crop_box(
    shape: tuple[int, ...],
    rng: np.random.Generator,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> tuple[int, int, int, int]:
    """(top, left, height, width): ten tries, then the largest central part within `ratio`."""
    rows, columns = shape[:2]
    for _ in range(10):
        area = rows * columns * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        width, height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < width <= columns and 0 < height <= rows:
            top = int(rng.integers(0, rows - height + 1))
            left = int(rng.integers(0, columns - width + 1))
            return top, left, height, width
    width, height = columns, rows
    if columns / rows < ratio[0]:
        height = round(columns / ratio[0])
    elif columns / rows > ratio[1]:
        width = round(rows * ratio[1])
    return (rows - height) // 2, (columns - width) // 2, height, width


class Augmentation(NamedTuple):
    """A row of `AUGMENTATIONS`: `ops(image_size)`, and whether they make any image that size."""

    resizes: bool
    ops: Callable[[int], tuple[Op, ...]]


AUGMENTATIONS = {
    "none": Augmentation(False, lambda size: ()),
    "flip": Augmentation(False, lambda size: (flip,)),
    # 4 pixels of padding at 32, as on CIFAR; 1 at 8.
    "crop": Augmentation(False, lambda size: (_crop(size),)),
    "crop-flip": Augmentation(False, lambda size: (_crop(size), flip)),
    # The "basic" augmentation of Singh, Croce, Hein 2023.
    "resized-crop": Augmentation(True, lambda size: (_resized_crop(size),)),
    "resized-crop-flip": Augmentation(True, lambda size: (_resized_crop(size), flip)),
}


def _crop(size: int) -> Op:
    return functools.partial(random_crop, padding=max(1, size // 8))


def _resized_crop(size: int) -> Op:
    return functools.partial(random_resized_crop, size=size)


def resize_crop(
    image: np.ndarray, *, resize: int | None, crop: int | None, resample: int = BICUBIC
) -> np.ndarray:
    """The image with its short side resized to `resize`, then its central `crop` x `crop` pixels.

    Args:
      image: uint8[H,W,C].
      resize: pixels; the long side is truncated; None keeps the size, and so does an image whose
        short side is `resize` already.
      crop: pixels; black is added around an image that is smaller; None crops nothing.
      resample: one of PIL's filters, antialiased.
    Source: torchvision's Resize and CenterCrop on PIL images, bit for bit; parity:
      tests/test_transforms.py.
    """
    if resize is not None:
        height, width = image.shape[:2]
        short, long = min(height, width), max(height, width)
        if short != resize:
            far = int(resize * long / short)
            size = (resize, far) if width <= height else (far, resize)
            image = _to_array(_resize(_to_pil(image), size, resample))
    return image if crop is None else _center_crop(image, crop)


def squash(image: np.ndarray, *, size: int, resample: int = BILINEAR) -> np.ndarray:
    """The image resized to `uint8[size,size,C]` without keeping its aspect."""
    return _to_array(_resize(_to_pil(image), (size, size), resample))


def _center_crop(image: np.ndarray, crop: int) -> np.ndarray:
    height, width = image.shape[:2]
    if height < crop or width < crop:
        below, beside = max(0, crop - height), max(0, crop - width)
        padding = ((below // 2, below - below // 2), (beside // 2, beside - beside // 2), (0, 0))
        image = np.pad(image, padding)
        height, width = image.shape[:2]
    top, left = round((height - crop) / 2), round((width - crop) / 2)  # half to even
    return image[top : top + crop, left : left + crop]


Transform = Callable[[np.ndarray], np.ndarray]

# RobustBench's preprocessing ids for ImageNet.
EVALUATION: dict[str, Transform] = {
    "none": lambda image: image,
    "Res256Crop224": functools.partial(resize_crop, resize=256, crop=224, resample=BILINEAR),
    "BicubicRes256Crop224": functools.partial(resize_crop, resize=256, crop=224),
    "Res224": functools.partial(squash, size=224),
    "Crop288": functools.partial(resize_crop, resize=None, crop=288),
}
_IMAGES = "pass a PIL image, encoded bytes or uint8[H,W,C] in 0..255 with C 1 or 3"
_OURS = re.compile(r"(bicubic|bilinear)-(\d+)-crop-(\d+)")


def evaluation_transform(preprocessing_id: str) -> Callable[[Any], np.ndarray]:
    """The function from an image to what a network evaluated under that id receives.

    Args:
      preprocessing_id: RobustBench's `Res256Crop224`, `BicubicRes256Crop224`, `Res224`, `Crop288`
        or `none`; or `bicubic-RESIZE-crop-SIZE`, `bilinear-RESIZE-crop-SIZE`.
    Returns:
      (PIL image, encoded bytes or uint8[H,W,C]) -> uint8[H,W,3], a new array; an array keeps its
      channels. Raises ValueError for an image of another kind.
    Raises:
      ValueError: an unknown id.
    """
    if match := _OURS.fullmatch(preprocessing_id):
        transform: Transform = functools.partial(
            resize_crop,
            resize=int(match[2]),
            crop=int(match[3]),
            resample=BICUBIC if match[1] == "bicubic" else BILINEAR,
        )
    elif preprocessing_id in EVALUATION:
        transform = EVALUATION[preprocessing_id]
    else:
        raise ValueError(
            f"unknown preprocessing {preprocessing_id!r}: known are {', '.join(EVALUATION)}, "
            "bicubic-RESIZE-crop-SIZE and bilinear-RESIZE-crop-SIZE"
        )
    return functools.partial(_prepare, transform=transform)


def _prepare(image: Any, *, transform: Transform) -> np.ndarray:
    if isinstance(image, bytes | bytearray | memoryview):
        image = decode(image, channels=3)
    elif isinstance(image, Image.Image):
        image = np.asarray(image.convert("RGB"))
    elif not isinstance(image, np.ndarray):
        raise ValueError(f"an image of type {type(image).__name__} is unknown; {_IMAGES}")
    elif image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] not in _MODES:
        raise ValueError(f"an image {image.dtype} of shape {image.shape} is unknown; {_IMAGES}")
    return np.array(transform(image), order="C")  # the caller's own, whatever it is a view of


def _to_pil(image: np.ndarray) -> Image.Image:
    return Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)


def _to_array(image: Image.Image) -> np.ndarray:
    array = np.asarray(image)
    return array if array.ndim == 3 else array[:, :, None]


def _resize(image: Image.Image, size: tuple[int, int], resample: int) -> Image.Image:
    return image.resize(size, resample)  # type: ignore[arg-type]
