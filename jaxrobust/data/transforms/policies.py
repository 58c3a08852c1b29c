"""RandAugment as in timm, AutoAugment as in torchvision and RobustART: drawn, then applied."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from jaxrobust.data.transforms import operations
from jaxrobust.data.transforms.operations import Canvas, Change


class PolicyChange(NamedTuple):
    """An operation, and the function from its strength to its number."""

    change: Change
    number: Callable[..., float]


Plan = list[tuple[str, float]]  # names of operations, with their numbers


def _changed(
    image: Image.Image, plan: Plan, rows: Mapping[str, PolicyChange], canvas: Canvas
) -> Image.Image:
    for name, number in plan:
        image = rows[name].change(image, number, canvas)
    return image


def _no_number(*_: float) -> float:
    return 0


def _factor(strength: float) -> float:
    return max(0.1, 1 + 0.9 * strength)


_WITHOUT_NUMBERS = {
    "AutoContrast": PolicyChange(operations.auto_contrast, _no_number),
    "Equalize": PolicyChange(operations.equalize, _no_number),
    "Invert": PolicyChange(operations.invert, _no_number),
}
# timm's `rand-...-inc1` set: numbers from a signed strength in [-1, 1], the magnitude / 10.
RANDAUGMENT = _WITHOUT_NUMBERS | {
    "Rotate": PolicyChange(operations.rotate, lambda strength: strength * 30),
    "Posterize": PolicyChange(operations.posterize, lambda strength: 4 - int(abs(strength) * 4)),
    "Solarize": PolicyChange(operations.solarize, lambda strength: 256 - int(abs(strength) * 256)),
    "SolarizeAdd": PolicyChange(operations.solarize_add, lambda strength: int(abs(strength) * 110)),
    "Color": PolicyChange(operations.saturation, _factor),
    "Contrast": PolicyChange(operations.contrast, _factor),
    "Brightness": PolicyChange(operations.brightness, _factor),
    "Sharpness": PolicyChange(operations.sharpness, _factor),
    "ShearX": PolicyChange(operations.shear_x, lambda strength: strength * 0.3),
    "ShearY": PolicyChange(operations.shear_y, lambda strength: strength * 0.3),
    # Shares of the image's side.
    "TranslateX": PolicyChange(
        lambda image, share, canvas: operations.translate_x(image, share * image.width, canvas),
        lambda strength: strength * 0.45,
    ),
    "TranslateY": PolicyChange(
        lambda image, share, canvas: operations.translate_y(image, share * image.height, canvas),
        lambda strength: strength * 0.45,
    ),
}
_NAMES = tuple(RANDAUGMENT)


def randaugment(
    image: Image.Image,
    rng: np.random.Generator,
    *,
    magnitude: float = 9.0,
    std: float = 0.5,
    ops: int = 2,
    fill: int = 0,
) -> Image.Image:
    """Apply `ops` of 15 changes, each with probability one half.

    Args:
      image: RGB or gray; color changes leave gray images as they are.
      rng: draws changes, with replacement, and their strengths.
      magnitude: mean strength, 0 to 10; at 10 or more, images may become black or inverted.
      std: standard deviation of the strength, which is clipped to [0, 10].
      ops: number of changes to draw.
      fill: gray value that fills what moved images uncover.
    Source: Cubuk et al. 2020 as timm 1.0.9's `rand-m9-mstd0.5-inc1` with mean 0; parity:
      tests/data/transforms/test_randaugment.py.
    """
    plan = draw_randaugment(rng, magnitude=magnitude, std=std, ops=ops)
    return _changed(image, plan, RANDAUGMENT, Canvas(Image.Resampling.BICUBIC, fill))


def draw_randaugment(rng: np.random.Generator, *, magnitude: float, std: float, ops: int) -> Plan:
    """Draw the changes to apply to one image, in order."""
    plan = []
    for index in rng.integers(0, len(_NAMES), size=ops).tolist():
        if rng.random() < 0.5:
            strength = min(max(rng.normal(magnitude, std), 0.0), 10.0) / 10
            strength = -strength if rng.random() < 0.5 else strength
            plan.append((_NAMES[index], RANDAUGMENT[_NAMES[index]].number(strength)))
    return plan


def _bins(first: float, last: float) -> tuple[float, ...]:
    """Return ten numbers from first to last, rounded to float32 as torch.linspace does."""
    low, high, level = np.float32(first), np.float32(last), np.arange(10, dtype=np.float32)
    step = (high - low) / np.float32(9)
    return tuple(np.where(level < 5, low + step * level, high - step * (9 - level)).tolist())


_LEVELS = range(10)


def _signed(numbers: Sequence[float], middle: float, sign: int, level: int, _: int) -> float:
    return middle + sign * numbers[level]


def _picked(numbers: Sequence[float], _: int, level: int, __: int) -> float:
    return numbers[level]


def _translate(sign: int, level: int, side: int) -> float:
    return -sign * int(_bins(0, 150 / 331 * side)[level])


# Functions that can be pickled, because they are sent to the pipeline's workers.
_blend = functools.partial(_signed, _bins(0, 0.9), 1)
_shear = functools.partial(_signed, _bins(0, 0.3), 0)
# torchvision's: numbers from (sign, level 0 to 9, image side in pixels).
TORCHVISION = _WITHOUT_NUMBERS | {
    "Rotate": PolicyChange(operations.rotate, functools.partial(_signed, _bins(0, 30), 0)),
    "Posterize": PolicyChange(
        operations.posterize, functools.partial(_picked, [8 - round(i * 4 / 9) for i in _LEVELS])
    ),
    "Solarize": PolicyChange(operations.solarize, functools.partial(_picked, _bins(255, 0))),
    "Color": PolicyChange(operations.saturation, _blend),
    "Contrast": PolicyChange(operations.contrast, _blend),
    "Brightness": PolicyChange(operations.brightness, _blend),
    "Sharpness": PolicyChange(operations.sharpness, _blend),
    "ShearX": PolicyChange(operations.shear_x, _shear),
    "ShearY": PolicyChange(operations.shear_y, _shear),
    "TranslateX": PolicyChange(operations.translate_x, _translate),
    "TranslateY": PolicyChange(operations.translate_y, _translate),
}


def _between_pixels(
    change: Change, image: Image.Image, number: float, canvas: Canvas
) -> Image.Image:
    """Apply a change with interpolation, whatever the canvas says."""
    return change(image, number, canvas._replace(resample=Image.Resampling.BICUBIC))


def _unrounded(sign: int, level: int, side: int) -> float:
    return sign * np.linspace(0, 150 / 331, 10).tolist()[level] * side


_around_one = functools.partial(_signed, np.linspace(0, 0.9, 10).tolist(), 1)
_sheared = functools.partial(_signed, np.linspace(0, 0.3, 10).tolist(), 0)
# How DIG-Beihang/RobustART differs: it only rotates counter-clockwise, interpolates in shears,
# solarises from 256 on and does not round translations.
ROBUSTART = TORCHVISION | {
    "Rotate": PolicyChange(
        operations.rotate, functools.partial(_picked, [30 * i / 9 for i in _LEVELS])
    ),
    "Solarize": PolicyChange(
        operations.solarize, functools.partial(_picked, [256 - 256 * i / 9 for i in _LEVELS])
    ),
    "Color": PolicyChange(operations.saturation, _around_one),
    "Contrast": PolicyChange(operations.contrast, _around_one),
    "Brightness": PolicyChange(operations.brightness, _around_one),
    "Sharpness": PolicyChange(operations.sharpness, _around_one),
    "ShearX": PolicyChange(functools.partial(_between_pixels, operations.shear_x), _sheared),
    "ShearY": PolicyChange(functools.partial(_between_pixels, operations.shear_y), _sheared),
    "TranslateX": PolicyChange(operations.translate_x, _unrounded),
    "TranslateY": PolicyChange(operations.translate_y, _unrounded),
}

# Cubuk et al. 2019, tables 7 and 9: pairs of (name, probability in tenths, level).
_CIFAR10 = """
Invert 1 0, Contrast 2 6; Rotate 7 2, TranslateX 3 9; Sharpness 8 1, Sharpness 9 3
ShearY 5 8, TranslateY 7 9; AutoContrast 5 0, Equalize 9 0; ShearY 2 7, Posterize 3 7
Color 4 3, Brightness 6 7; Sharpness 3 9, Brightness 7 9; Equalize 6 0, Equalize 5 0
Contrast 6 7, Sharpness 6 5; Color 7 7, TranslateX 5 8; Equalize 3 0, AutoContrast 4 0
TranslateY 4 3, Sharpness 2 6; Brightness 9 6, Color 2 8; Solarize 5 2, Invert 0 0
Equalize 2 0, AutoContrast 6 0; Equalize 2 0, Equalize 6 0; Color 9 9, Equalize 6 0
AutoContrast 8 0, Solarize 2 8; Brightness 1 3, Color 7 0; Solarize 4 5, AutoContrast 9 0
TranslateY 9 9, TranslateY 7 9; AutoContrast 9 0, Solarize 8 3; Equalize 8 0, Invert 1 0
TranslateY 7 9, AutoContrast 9 0
"""
_IMAGENET = """
Posterize 4 8, Rotate 6 9; Solarize 6 5, AutoContrast 6 0; Equalize 8 0, Equalize 6 0
Posterize 6 7, Posterize 6 6; Equalize 4 0, Solarize 2 4; Equalize 4 0, Rotate 8 8
Solarize 6 3, Equalize 6 0; Posterize 8 5, Equalize 10 0; Rotate 2 3, Solarize 6 8
Equalize 6 0, Posterize 4 6; Rotate 8 8, Color 4 0; Rotate 4 9, Equalize 6 0
Equalize 0 0, Equalize 8 0; Invert 6 0, Equalize 10 0; Color 6 4, Contrast 10 8
Rotate 8 8, Color 10 2; Color 8 8, Solarize 8 7; Sharpness 4 7, Invert 6 0
ShearX 6 5, Equalize 10 0; Color 4 0, Equalize 6 0; Equalize 4 0, Solarize 2 4
Solarize 6 5, AutoContrast 6 0; Invert 6 0, Equalize 10 0; Color 6 4, Contrast 10 8
Equalize 8 0, Equalize 6 0
"""


def _policy(text: str) -> tuple[tuple[tuple[str, float, int], ...], ...]:
    """Parse pairs of (name, probability, level)."""
    pairs = text.strip().replace("\n", ";").split(";")
    lines = ([words.split() for words in pair.split(",")] for pair in pairs)
    return tuple(tuple((n, int(tenths) / 10, int(k)) for n, tenths, k in line) for line in lines)


POLICIES = {"cifar10": _policy(_CIFAR10), "imagenet": _policy(_IMAGENET)}


def autoaugment(
    image: Image.Image,
    rng: np.random.Generator,
    *,
    policy: str = "cifar10",
    fill: int = 0,
    rows: Mapping[str, PolicyChange] = TORCHVISION,
) -> Image.Image:
    """Apply one of the policy's 25 pairs of changes; `fill` fills what moved images uncover.

    Source: Cubuk et al. 2019 as torchvision's AutoAugment on PIL images (pixels moved without
      interpolation), or as DIG-Beihang/RobustART's, `ROBUSTART` with fill=128; parity:
      tests/data/transforms/test_randaugment.py.
    """
    sides = {"height": image.height, "width": image.width}
    plan = draw_autoaugment(rng, policy=policy, rows=rows, **sides)
    return _changed(image, plan, rows, Canvas(Image.Resampling.NEAREST, fill))


def draw_autoaugment(
    rng: np.random.Generator,
    *,
    policy: str,
    height: int,
    width: int,
    rows: Mapping[str, PolicyChange] = TORCHVISION,
) -> Plan:
    """Draw the changes to apply to an image of this size, in order."""
    pairs = POLICIES[policy]
    plan = []
    for name, probability, level in pairs[rng.integers(len(pairs))]:
        if rng.random() < probability:
            sign = 1 if rng.random() < 0.5 else -1
            side = width if name == "TranslateX" else height
            plan.append((name, rows[name].number(sign, level, side)))
    return plan
