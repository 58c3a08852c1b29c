"""How evaluation prepares an image, bit for bit as torchvision does on PIL images.

Everything works on `uint8[H,W,C]` NumPy arrays (C is 1 for grey, 3 for RGB) with PIL underneath.
"""

import functools
import re
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from jaxrobust.data.decoding import decode

_CHANNELS = (1, 3)
BILINEAR, BICUBIC = Image.Resampling.BILINEAR, Image.Resampling.BICUBIC


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
            image = to_array(resample_to(to_pil(image), size, resample))
    return image if crop is None else _center_crop(image, crop)


def squash(image: np.ndarray, *, size: int, resample: int = BILINEAR) -> np.ndarray:
    """The image resized to `uint8[size,size,C]` without keeping its aspect."""
    return to_array(resample_to(to_pil(image), (size, size), resample))


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
    elif image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] not in _CHANNELS:
        raise ValueError(f"an image {image.dtype} of shape {image.shape} is unknown; {_IMAGES}")
    return np.array(transform(image), order="C")  # the caller's own, whatever it is a view of


def to_pil(image: np.ndarray) -> Image.Image:
    """The PIL image of uint8[H,W,C]."""
    return Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)


def to_array(image: Image.Image) -> np.ndarray:
    """uint8[H,W,C] of a PIL image of mode L or RGB, read-only."""
    array = np.asarray(image)
    return array if array.ndim == 3 else array[:, :, None]


def resample_to(image: Image.Image, size: tuple[int, int], resample: int) -> Image.Image:
    """The image resized to (width, height), antialiased."""
    return image.resize(size, resample)  # type: ignore[arg-type]
