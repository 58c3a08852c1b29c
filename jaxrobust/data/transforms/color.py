"""Random changes of an image's colours and sharpness."""

import numpy as np
from PIL import Image

from jaxrobust.data.transforms import operations

Ranges = tuple[tuple[float, float], ...]
_JITTER = (operations.brightness, operations.contrast, operations.saturation, operations.hue)


def jitter(image: Image.Image, rng: np.random.Generator, *, ranges: Ranges) -> Image.Image:
    """Change brightness, contrast, saturation and hue (not of grey images) in a random order.

    Source: torchvision's ColorJitter on PIL images; parity: tests/data/transforms/test_color.py.
    """
    for index, number in draw_jitter(rng, ranges):
        image = _JITTER[index](image, number)
    return image


def jitter_ranges(brightness: float, contrast: float, saturation: float, hue: float) -> Ranges:
    """Return ranges of factors around 1 by so much, from 0 at the lowest; of the hue, around 0."""
    if min(brightness, contrast, saturation, hue) < 0 or hue > 0.5:
        raise ValueError("numbers are 0 or more, and the hue's 0.5, half of the circle, or less")
    factors = (brightness, contrast, saturation)
    return (*((max(0.0, 1 - by), 1 + by) for by in factors), (-hue, hue))


def draw_jitter(rng: np.random.Generator, ranges: Ranges) -> list[tuple[int, float]]:
    """Draw (index into `ranges`, number) of the changes that happen, in their order."""
    places, shares = rng.random((2, len(ranges)))
    return [
        (index, ranges[index][0] + float(shares[index]) * (ranges[index][1] - ranges[index][0]))
        for index in np.argsort(places).tolist()
        if ranges[index][0] < ranges[index][1]
    ]


def grey(image: Image.Image, rng: np.random.Generator, *, p: float = 1) -> Image.Image:
    """Return the image without colours, with probability `p`; its mode stays."""
    return operations.grey(image) if rng.random() < p else image


def solarize(
    image: Image.Image, rng: np.random.Generator, *, p: float = 1, threshold: float = 128
) -> Image.Image:
    """Return the image with values from `threshold` on inverted, with probability `p`."""
    return operations.solarize(image, threshold) if rng.random() < p else image


def blur(
    image: Image.Image,
    rng: np.random.Generator,
    *,
    p: float = 1,
    radii: tuple[float, float] = (0.1, 2.0),
) -> Image.Image:
    """Blur the image by a Gaussian of a radius in `radii` pixels, with probability `p`."""
    return operations.blur(image, rng.uniform(*radii)) if rng.random() < p else image


def three_augment(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Return the image in grey, solarised from 128 on, or blurred by 0.1 to 2 pixels: one of these.

    Source: Touvron et al. 2022 (DeiT III), "3-Augment"; parity: tests/data/transforms/test_color.py
      against timm's auto-augment policy `3a`.
    """
    which = rng.integers(3)
    if which == 0:
        return grey(image, rng, p=1)
    return solarize(image, rng, p=1) if which == 1 else blur(image, rng, p=1)
