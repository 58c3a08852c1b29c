"""RandAugment as timm has it: a plan of changes is drawn, then made."""

import numpy as np
from PIL import Image

from jaxrobust.data.transforms import operations
from jaxrobust.data.transforms.operations import Canvas, Plan, Row, make, no_number


def _factor(strength: float) -> float:
    return max(0.1, 1 + 0.9 * strength)


# timm's set `rand-...-inc1`: numbers from a signed strength in [-1, 1], its magnitude over 10.
RANDAUGMENT = {
    "AutoContrast": Row(operations.auto_contrast, no_number),
    "Equalize": Row(operations.equalize, no_number),
    "Invert": Row(operations.invert, no_number),
    "Rotate": Row(operations.rotate, lambda strength: strength * 30),
    "Posterize": Row(operations.posterize, lambda strength: 4 - int(abs(strength) * 4)),
    "Solarize": Row(operations.solarize, lambda strength: 256 - int(abs(strength) * 256)),
    "SolarizeAdd": Row(operations.solarize_add, lambda strength: int(abs(strength) * 110)),
    "Color": Row(operations.saturation, _factor),
    "Contrast": Row(operations.contrast, _factor),
    "Brightness": Row(operations.brightness, _factor),
    "Sharpness": Row(operations.sharpness, _factor),
    "ShearX": Row(operations.shear_x, lambda strength: strength * 0.3),
    "ShearY": Row(operations.shear_y, lambda strength: strength * 0.3),
    # Shares of the image's own side.
    "TranslateX": Row(
        lambda image, share, canvas: operations.translate_x(image, share * image.width, canvas),
        lambda strength: strength * 0.45,
    ),
    "TranslateY": Row(
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
    """Return the image after `ops` of 15 changes, each of which happens with probability one half.

    Args:
      image: RGB or grey; on grey images changes of colour do nothing.
      rng: draws changes, with replacement, and their strengths.
      magnitude: mean strength, 0 to 10; at 10 or more, images may become black or inverted.
      std: of the strength, which is clipped to [0, 10].
      ops: how many changes.
      fill: grey value that moved images leave behind.
    Source: Cubuk et al. 2020 as timm 1.0.9's `rand-m9-mstd0.5-inc1` with mean 0; parity:
      tests/data/transforms/test_randaugment.py.
    """
    plan = draw_randaugment(rng, magnitude=magnitude, std=std, ops=ops)
    return make(plan, image, RANDAUGMENT, Canvas(Image.Resampling.BICUBIC, fill))


def draw_randaugment(rng: np.random.Generator, *, magnitude: float, std: float, ops: int) -> Plan:
    """Return the changes that happen to one image, in their order."""
    plan = []
    for index in rng.integers(0, len(_NAMES), size=ops).tolist():
        if rng.random() < 0.5:
            strength = min(max(rng.normal(magnitude, std), 0.0), 10.0) / 10
            strength = -strength if rng.random() < 0.5 else strength
            plan.append((_NAMES[index], RANDAUGMENT[_NAMES[index]].number(strength)))
    return plan
