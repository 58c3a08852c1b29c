"""Random changes of training images on the host.

An augmentation is `op(image, rng) -> image` on PIL images, RGB or gray; it does not modify its
input. A chain of them, such as `resized-crop|flip|jitter(0.4)` or a preset, works on uint8[H,W,C].
"""

import functools
import inspect
import math
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from PIL import Image

from jaxrobust.data.transforms import operations, policies
from jaxrobust.data.transforms.preparing import BICUBIC, to_array, to_pil
from jaxrobust.data.transforms.presets import PRESETS

Op = Callable[[np.ndarray, np.random.Generator], np.ndarray]  # on uint8[H,W,C]
PictureOp = Callable[..., Image.Image]  # (PIL image, generator) -> PIL image
Ranges = tuple[tuple[float, float], ...]
_JITTER = (operations.brightness, operations.contrast, operations.saturation, operations.hue)
_NEAREST = operations.Canvas(Image.Resampling.NEAREST, fill=0)


def random_crop(image: Image.Image, rng: np.random.Generator, *, padding: int) -> Image.Image:
    """Return a random crop of the original size after padding with `padding` black pixels."""
    row, column = (rng.integers(0, 2 * padding + 1, size=2) - padding).tolist()
    return image.crop((column, row, column + image.width, row + image.height))


def flip(image: Image.Image, rng: np.random.Generator, *, p: float = 0.5) -> Image.Image:
    """Return the image, mirrored left to right with probability `p`."""
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < p else image


def rotate(image: Image.Image, rng: np.random.Generator, *, degrees: float) -> Image.Image:
    """Rotate the image by at most `degrees` either way, over black, without interpolation."""
    return operations.rotate(image, rng.uniform(-degrees, degrees), _NEAREST)


def random_resized_crop(
    image: np.ndarray | Image.Image,
    rng: np.random.Generator,
    *,
    size: int,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Image.Image:
    """Resize a random part of the image to `size` x `size` (bicubic, antialiased).

    `scale` is its range of area shares, `ratio` that of width / height, drawn log-uniformly.
    Source: torchvision's RandomResizedCrop; parity:
      tests/data/transforms/test_augmentations.py and timm's.
    """
    array = to_array(image) if isinstance(image, Image.Image) else image
    row, column, height, width = _resized_crop_box(array.shape, rng, scale, ratio)
    # Convert only this part to PIL.
    part = to_pil(array[row : row + height, column : column + width])
    return part.resize((size, size), BICUBIC)


def _resized_crop_box(
    shape: tuple[int, ...],
    rng: np.random.Generator,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> tuple[int, int, int, int]:
    """Draw (top, left, height, width); after ten tries, take the largest central one in `ratio`."""
    rows, columns = shape[:2]
    for _ in range(10):
        area = rows * columns * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        width, height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < width <= columns and 0 < height <= rows:
            row = int(rng.integers(0, rows - height + 1))
            column = int(rng.integers(0, columns - width + 1))
            return row, column, height, width
    width, height = columns, rows
    if columns / rows < ratio[0]:
        height = round(columns / ratio[0])
    elif columns / rows > ratio[1]:
        width = round(rows * ratio[1])
    return (rows - height) // 2, (columns - width) // 2, height, width


def jitter(image: Image.Image, rng: np.random.Generator, *, ranges: Ranges) -> Image.Image:
    """Change brightness, contrast, saturation and hue (not of gray images) in random order.

    Source: torchvision's ColorJitter on PIL images; parity: tests/data/transforms/test_color.py.
    """
    for index, number in draw_jitter(rng, ranges):
        image = _JITTER[index](image, number)
    return image


def jitter_ranges(brightness: float, contrast: float, saturation: float, hue: float) -> Ranges:
    """Return factor ranges of this width around 1, clipped at 0; for the hue, around 0."""
    if min(brightness, contrast, saturation, hue) < 0 or hue > 0.5:
        raise ValueError("numbers must be at least 0, and the hue at most 0.5 (half the circle)")
    factors = (brightness, contrast, saturation)
    return (*((max(0.0, 1 - by), 1 + by) for by in factors), (-hue, hue))


def draw_jitter(rng: np.random.Generator, ranges: Ranges) -> list[tuple[int, float]]:
    """Draw the changes to apply, in order, as (index into `ranges`, number)."""
    places, shares = rng.random((2, len(ranges)))
    return [
        (index, ranges[index][0] + float(shares[index]) * (ranges[index][1] - ranges[index][0]))
        for index in np.argsort(places).tolist()
        if ranges[index][0] < ranges[index][1]
    ]


def grey(image: Image.Image, rng: np.random.Generator, *, p: float = 1) -> Image.Image:
    """Remove the colors with probability `p`; the mode is unchanged."""
    return operations.grey(image) if rng.random() < p else image


def solarize(
    image: Image.Image, rng: np.random.Generator, *, p: float = 1, threshold: float = 128
) -> Image.Image:
    """Invert values from `threshold` on, with probability `p`."""
    return operations.solarize(image, threshold) if rng.random() < p else image


def blur(
    image: Image.Image,
    rng: np.random.Generator,
    *,
    p: float = 1,
    radii: tuple[float, float] = (0.1, 2.0),
) -> Image.Image:
    """Apply a Gaussian blur with a radius drawn from `radii`, in pixels, with probability `p`."""
    return operations.blur(image, rng.uniform(*radii)) if rng.random() < p else image


def three_augment(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Apply one of: gray, solarise from 128 on, or blur by 0.1 to 2 pixels.

    Source: Touvron et al. 2022 (DeiT III), "3-Augment"; parity: tests/data/transforms/test_color.py
      against timm's auto-augment policy `3a`.
    """
    choice = rng.integers(3)
    if choice == 0:
        return grey(image, rng, p=1)
    return solarize(image, rng, p=1) if choice == 1 else blur(image, rng, p=1)


def _within(number: float, lowest: float, highest: float) -> float:
    if not lowest <= number <= highest:
        raise ValueError(f"{number:g} is not between {lowest:g} and {highest:g}")
    return number


def _whole(number: float, lowest: int, highest: int) -> int:
    if not lowest <= number <= highest or number != int(number):
        raise ValueError(f"{number:g} is not a whole number between {lowest} and {highest}")
    return int(number)


def _ordered(low: float, high: float) -> tuple[float, float]:
    if not 0 < low <= high:
        raise ValueError(f"the range {low:g} to {high:g} must be positive and ascending")
    return low, high


def _crop(size: int, padding: float | None = None) -> PictureOp:
    # The default is 4 pixels at size 32, as on CIFAR, and 1 at size 8.
    pixels = max(1, size // 8) if padding is None else _whole(padding, 0, size)
    return functools.partial(random_crop, padding=pixels)


def _resized_crop(
    size: int, low: float = 0.08, high: float = 1.0, narrow: float = 3 / 4, wide: float = 4 / 3
) -> PictureOp:
    scale, ratio = _ordered(low, high), _ordered(narrow, wide)
    return functools.partial(random_resized_crop, size=size, scale=scale, ratio=ratio)


def _jitter(
    size: int,
    brightness: float,
    contrast: float | None = None,
    saturation: float | None = None,
    hue: float = 0.0,
) -> PictureOp:
    contrast = brightness if contrast is None else contrast
    saturation = brightness if saturation is None else saturation
    ranges = jitter_ranges(brightness, contrast, saturation, hue)
    return functools.partial(jitter, ranges=ranges)


def _randaugment(
    size: int, magnitude: float = 9, std: float = 0.5, ops: float = 2, fill: float = 0
) -> PictureOp:
    return functools.partial(
        policies.randaugment,
        magnitude=_within(magnitude, 0, 10),
        std=_within(std, 0, 10),
        ops=_whole(ops, 0, 15),
        fill=_whole(fill, 0, 255),
    )


def _autoaugment(
    policy: str, rows: Mapping[str, policies.PolicyChange] = policies.TORCHVISION, fill: int = 0
) -> Callable[..., PictureOp]:
    return lambda size, fill=fill: functools.partial(
        policies.autoaugment, policy=policy, fill=_whole(fill, 0, 255), rows=rows
    )


OPS: dict[str, Callable[..., PictureOp]] = {  # `make(image_size, *numbers)`
    "crop": _crop,
    "resized-crop": _resized_crop,
    "flip": lambda size, p=0.5: functools.partial(flip, p=_within(p, 0, 1)),
    "rotate": lambda size, degrees: functools.partial(rotate, degrees=_within(degrees, 0, 180)),
    "jitter": _jitter,
    "grey": lambda size, p=1.0: functools.partial(grey, p=_within(p, 0, 1)),
    "solarize": lambda size, p=1.0, threshold=128: functools.partial(
        solarize, p=_within(p, 0, 1), threshold=_within(threshold, 0, 256)
    ),
    "blur": lambda size, p=1.0, low=0.1, high=2.0: functools.partial(
        blur, p=_within(p, 0, 1), radii=_ordered(low, high)
    ),
    "3-augment": lambda size: three_augment,
    "randaugment": _randaugment,
    "autoaugment": _autoaugment("cifar10"),
    "autoaugment-imagenet": _autoaugment("imagenet"),
    "autoaugment-robustart": _autoaugment("cifar10", policies.ROBUSTART, 128),
    "autoaugment-robustart-imagenet": _autoaugment("imagenet", policies.ROBUSTART, 128),
}
_OP = re.compile(r"([\w-]+?)(?:\(([^()]*)\))?")


class Chain(NamedTuple):
    """A chain of augmentations; `resizes` says whether it resizes any image to `image_size`."""

    augment: Op
    resizes: bool


def chain(text: str, image_size: int) -> Chain:
    """Parse a preset or `op|op(number, ...)|...` for images of `image_size`.

    Raises:
      ValueError: an unknown op, or numbers that it does not accept.
    """
    text = PRESETS[text].chain if text in PRESETS else text
    rows = [_op(part.strip(), image_size) for part in text.split("|") if part.strip()]
    cuts = bool(rows) and rows[0][1]
    augment = functools.partial(_augment, ops=tuple(op for op, _ in rows), cuts=cuts)
    return Chain(augment, any(resizes for _, resizes in rows))


def _augment(
    image: np.ndarray, rng: np.random.Generator, *, ops: tuple[PictureOp, ...], cuts: bool
) -> np.ndarray:
    """Apply the ops to uint8[H,W,C]; if it `cuts`, the first one takes the array."""
    if not ops:
        return image
    picture = ops[0](image if cuts else to_pil(image), rng)
    for op in ops[1:]:
        picture = op(picture, rng)
    return to_array(picture)


def _op(text: str, image_size: int) -> tuple[PictureOp, bool]:
    """Build one op of a chain, and return whether it resizes."""
    match = _OP.fullmatch(text)
    if match and match[1] == "3aug":
        raise ValueError(
            "augmentation '3aug' is now called '3-augment' (from DeiT III); for the 3-Aug of "
            "Singh, Croce and Hein (crop, flip, color jitter), write 'light'"
        )
    if match is None or match[1] not in OPS:
        raise ValueError(
            f"unknown augmentation {text!r}: presets are {', '.join(PRESETS)}; write a chain as "
            f"op|op(number, ...) with the operations {', '.join(OPS)}"
        )
    make = OPS[match[1]]
    try:
        numbers = [float(number) for number in (match[2] or "").split(",") if number.strip()]
        if not all(map(math.isfinite, numbers)):
            raise ValueError("numbers must be finite")
        return make(image_size, *numbers), make is _resized_crop
    except (TypeError, ValueError) as error:
        takes = ", ".join(list(inspect.signature(make).parameters)[1:]) or "no numbers"
        raise ValueError(f"augmentation {text!r}: {match[1]} takes {takes} ({error})") from error
