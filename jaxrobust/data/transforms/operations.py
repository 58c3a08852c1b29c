"""Changes of a PIL image (RGB or grey) by one number, which augmentations draw.

A change is `change(image, number, canvas) -> image`; those that move pixels read the canvas. Colour
has no meaning on a grey image, and changes of it return that image as it is.
Parity, 0 differing bytes: tests/data/transforms/test_randaugment.py and
tests/data/transforms/test_augmentations.py against timm and torchvision.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from PIL import Image, ImageEnhance, ImageFilter, ImageOps

_AFFINE = Image.Transform.AFFINE


class Canvas(NamedTuple):
    """How pixels are read between the old ones, and what lies outside of them."""

    resample: Image.Resampling
    fill: int  # grey, 0..255


Change = Callable[[Image.Image, float, Canvas], Image.Image]


def _fill(image: Image.Image, canvas: Canvas) -> float | tuple[float, ...]:
    return canvas.fill if image.mode == "L" else (canvas.fill,) * 3


def _affine(image: Image.Image, matrix: Sequence[float], canvas: Canvas) -> Image.Image:
    """Take output pixel (x, y) from (a x + b y + c, d x + e y + f); `matrix`: a to f."""
    fill = _fill(image, canvas)
    return image.transform(image.size, _AFFINE, matrix, canvas.resample, fillcolor=fill)


def shear_x(image: Image.Image, slope: float, canvas: Canvas) -> Image.Image:
    """Return rows moved to the left by `slope` times their height."""
    return _affine(image, (1, slope, 0, 0, 1, 0), canvas)


def shear_y(image: Image.Image, slope: float, canvas: Canvas) -> Image.Image:
    """Return columns moved up by `slope` times their place."""
    return _affine(image, (1, 0, 0, slope, 1, 0), canvas)


def translate_x(image: Image.Image, pixels: float, canvas: Canvas) -> Image.Image:
    """Return the image moved to the left."""
    return _affine(image, (1, 0, pixels, 0, 1, 0), canvas)


def translate_y(image: Image.Image, pixels: float, canvas: Canvas) -> Image.Image:
    """Return the image moved up."""
    return _affine(image, (1, 0, 0, 0, 1, pixels), canvas)


def rotate(image: Image.Image, degrees: float, canvas: Canvas) -> Image.Image:
    """Return the image turned counter-clockwise around its centre."""
    return image.rotate(degrees, canvas.resample, fillcolor=_fill(image, canvas))


def _plain(change: Callable[..., Image.Image], image: Image.Image, *_: Any) -> Image.Image:
    return change(image)


def _enhanced(kind: Any, image: Image.Image, factor: float, *_: Any) -> Image.Image:
    return kind(image).enhance(factor)


auto_contrast = functools.partial(_plain, ImageOps.autocontrast)  # each channel to 0..255
equalize = functools.partial(_plain, ImageOps.equalize)  # flattens the channels' histograms
invert = functools.partial(_plain, ImageOps.invert)
# By a factor, blended with black, with its mean grey, with its grey and with its smooth copy.
brightness = functools.partial(_enhanced, ImageEnhance.Brightness)
contrast = functools.partial(_enhanced, ImageEnhance.Contrast)
saturation = functools.partial(_enhanced, ImageEnhance.Color)
sharpness = functools.partial(_enhanced, ImageEnhance.Sharpness)


def posterize(image: Image.Image, bits: float, _: Canvas | None = None) -> Image.Image:
    """Return the highest `bits` of 8 kept; 0 is black, which Pillow's own posterize may refuse."""
    return _look_up(image, [v & (0xFF00 >> int(bits)) for v in range(256)])


def solarize(image: Image.Image, threshold: float, _: Canvas | None = None) -> Image.Image:
    """Return values from `threshold` on inverted."""
    return _look_up(image, [v if v < threshold else 255 - v for v in range(256)])


def solarize_add(image: Image.Image, more: float, _: Canvas | None = None) -> Image.Image:
    """Return values below 128 raised by `more`."""
    return _look_up(image, [min(255, v + int(more)) if v < 128 else v for v in range(256)])


def _look_up(image: Image.Image, table: list[int]) -> Image.Image:
    return image.point(table * len(image.getbands()))


def hue(image: Image.Image, turns: float, _: Canvas | None = None) -> Image.Image:
    """Return colours moved around the circle of 8-bit hues, by int(255 turns) of 256."""
    if image.mode == "L":
        return image
    table = [(value + int(255 * turns)) % 256 for value in range(256)]
    return image.convert("HSV").point(table + 2 * list(range(256))).convert("RGB")


def grey(image: Image.Image) -> Image.Image:
    """Return the image without colours, in as many channels."""
    return image if image.mode == "L" else image.convert("L").convert(image.mode)


def blur(image: Image.Image, radius: float) -> Image.Image:
    """Blur the image by Pillow's approximate Gaussian of that standard deviation, in pixels."""
    return image.filter(ImageFilter.GaussianBlur(radius))
