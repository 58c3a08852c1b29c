"""Image operations on PIL images (RGB or gray) with one number, which augmentations draw.

An operation is `change(image, number, canvas) -> image`; those that move pixels use the canvas.
Color operations return a gray image unchanged. Parity with timm and torchvision, 0 differing
bytes: tests/data/transforms/test_randaugment.py and tests/data/transforms/test_augmentations.py.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from PIL import Image, ImageEnhance, ImageFilter, ImageOps

_AFFINE = Image.Transform.AFFINE


class Canvas(NamedTuple):
    """How to interpolate between pixels, and what fills the outside."""

    resample: Image.Resampling
    fill: int  # gray, 0..255


Change = Callable[[Image.Image, float, Canvas], Image.Image]


def _fill(image: Image.Image, canvas: Canvas) -> float | tuple[float, ...]:
    return canvas.fill if image.mode == "L" else (canvas.fill,) * 3


def _affine(image: Image.Image, matrix: Sequence[float], canvas: Canvas) -> Image.Image:
    """Take output pixel (x, y) from (a x + b y + c, d x + e y + f); `matrix`: a to f."""
    fill = _fill(image, canvas)
    return image.transform(image.size, _AFFINE, matrix, canvas.resample, fillcolor=fill)


def shear_x(image: Image.Image, slope: float, canvas: Canvas) -> Image.Image:
    """Shift rows to the left by `slope` times their y coordinate."""
    return _affine(image, (1, slope, 0, 0, 1, 0), canvas)


def shear_y(image: Image.Image, slope: float, canvas: Canvas) -> Image.Image:
    """Shift columns up by `slope` times their x coordinate."""
    return _affine(image, (1, 0, 0, slope, 1, 0), canvas)


def translate_x(image: Image.Image, pixels: float, canvas: Canvas) -> Image.Image:
    """Shift the image to the left."""
    return _affine(image, (1, 0, pixels, 0, 1, 0), canvas)


def translate_y(image: Image.Image, pixels: float, canvas: Canvas) -> Image.Image:
    """Shift the image up."""
    return _affine(image, (1, 0, 0, 0, 1, pixels), canvas)


def rotate(image: Image.Image, degrees: float, canvas: Canvas) -> Image.Image:
    """Rotate the image counter-clockwise around its center."""
    return image.rotate(degrees, canvas.resample, fillcolor=_fill(image, canvas))


def _plain(change: Callable[..., Image.Image], image: Image.Image, *_: Any) -> Image.Image:
    return change(image)


def _enhanced(kind: Any, image: Image.Image, factor: float, *_: Any) -> Image.Image:
    return kind(image).enhance(factor)


auto_contrast = functools.partial(_plain, ImageOps.autocontrast)  # each channel to 0..255
equalize = functools.partial(_plain, ImageOps.equalize)  # flattens the channels' histograms
invert = functools.partial(_plain, ImageOps.invert)
# Blend by a factor with black, mean gray, the gray image or a smoothed copy.
brightness = functools.partial(_enhanced, ImageEnhance.Brightness)
contrast = functools.partial(_enhanced, ImageEnhance.Contrast)
saturation = functools.partial(_enhanced, ImageEnhance.Color)
sharpness = functools.partial(_enhanced, ImageEnhance.Sharpness)


def posterize(image: Image.Image, bits: float, _: Canvas | None = None) -> Image.Image:
    """Keep the highest `bits` of 8; 0 gives black, which Pillow's own posterize may reject."""
    return _look_up(image, [v & (0xFF00 >> int(bits)) for v in range(256)])


def solarize(image: Image.Image, threshold: float, _: Canvas | None = None) -> Image.Image:
    """Invert values from `threshold` on."""
    return _look_up(image, [v if v < threshold else 255 - v for v in range(256)])


def solarize_add(image: Image.Image, more: float, _: Canvas | None = None) -> Image.Image:
    """Raise values below 128 by `more`."""
    return _look_up(image, [min(255, v + int(more)) if v < 128 else v for v in range(256)])


def _look_up(image: Image.Image, table: list[int]) -> Image.Image:
    return image.point(table * len(image.getbands()))


def hue(image: Image.Image, turns: float, _: Canvas | None = None) -> Image.Image:
    """Rotate 8-bit hues by int(255 turns) of 256."""
    if image.mode == "L":
        return image
    table = [(value + int(255 * turns)) % 256 for value in range(256)]
    return image.convert("HSV").point(table + 2 * list(range(256))).convert("RGB")


def grey(image: Image.Image) -> Image.Image:
    """Remove the colors but keep the number of channels."""
    return image if image.mode == "L" else image.convert("L").convert(image.mode)


def blur(image: Image.Image, radius: float) -> Image.Image:
    """Blur with Pillow's approximate Gaussian of this standard deviation, in pixels."""
    return image.filter(ImageFilter.GaussianBlur(radius))
