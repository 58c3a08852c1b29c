"""Random changes of training images on the host.

An augmentation is `op(image, rng) -> image` on uint8[H,W,C]; it never writes into its input.
A chain of them is written as text, `resized-crop|flip|jitter(0.4)`, or is the name of a preset.
"""

import functools
import inspect
import math
import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from jaxrobust.data.transforms import BICUBIC, resample_to, to_array, to_pil
from jaxrobust.presets import PRESETS

Op = Callable[[np.ndarray, np.random.Generator], np.ndarray]


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
    part = to_pil(image[top : top + height, left : left + width])
    return to_array(resample_to(part, (size, size), BICUBIC))


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


class _Row(NamedTuple):
    """`make(image_size, *numbers) -> Op`, and whether the op makes any image that size."""

    make: Callable[..., Op]
    resizes: bool = False


OPS = {
    # 4 pixels of padding at 32, as on CIFAR; 1 at 8.
    "crop": _Row(lambda size: functools.partial(random_crop, padding=max(1, size // 8))),
    "flip": _Row(lambda size: flip),
    "resized-crop": _Row(
        lambda size, low=0.08, high=1.0, narrow=3 / 4, wide=4 / 3: functools.partial(
            random_resized_crop, size=size, scale=(low, high), ratio=(narrow, wide)
        ),
        resizes=True,
    ),
}
_OP = re.compile(r"([\w-]+?)(?:\(([^()]*)\))?")


class Chain(NamedTuple):
    """Augmentations one after the other; `resizes`: they make any image `image_size`."""

    ops: tuple[Op, ...]
    resizes: bool


def chain(text: str, image_size: int) -> Chain:
    """The ops of a preset or of `op|op(number, ...)|...`, for square images of `image_size`.

    Raises:
      ValueError: an unknown op, or numbers that it does not take.
    """
    text = PRESETS[text].chain if text in PRESETS else text
    rows = [_op(part.strip(), image_size) for part in text.split("|") if part.strip()]
    return Chain(tuple(op for op, _ in rows), any(resizes for _, resizes in rows))


def _op(text: str, image_size: int) -> tuple[Op, bool]:
    match = _OP.fullmatch(text)
    if match is None or match[1] not in OPS:
        raise ValueError(
            f"unknown augmentation {text!r}: presets are {', '.join(PRESETS)}; a chain is written "
            f"op|op(number, ...) of {', '.join(OPS)}"
        )
    row = OPS[match[1]]
    try:
        numbers = [float(number) for number in (match[2] or "").split(",") if number.strip()]
        return row.make(image_size, *numbers), row.resizes
    except (TypeError, ValueError) as error:
        takes = ", ".join(list(inspect.signature(row.make).parameters)[1:]) or "no number"
        raise ValueError(f"augmentation {text!r}: {match[1]} takes {takes} ({error})") from error
