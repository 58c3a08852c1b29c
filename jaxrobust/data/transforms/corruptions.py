"""Common corruptions of images of 32 and 224 pixels: 15 kinds at 5 severities each.

They compute those of CIFAR-10-C (at 32) and ImageNet-C (at 224). The published files
(`cifar10-c:DIR`, see `cifar_c.py`) are the reference; computed images, read by
`corrupted_images.py`, are for users without these files and for other images. The result of
`corrupt` depends only on seed, image, kind and severity.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxrobust.data.source import DataError
from jaxrobust.data.transforms import distortions
from jaxrobust.runtime.text.spelling import meant

SEVERITIES = (1, 2, 3, 4, 5)
SIDES = (32, 224)
_STORED = 85  # JPEG quality at which ImageNet-C stores its images


class _Settings(NamedTuple):
    """The arguments for a function of `distortions`, per severity, at 32 and at 224 pixels."""

    small: Sequence[Any]
    large: Sequence[Any]


_Shares = tuple[tuple[float, float, float], ...]  # as shares of the side, for elastic_transform
_ELASTIC_SMALL: _Shares = (
    *((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06)),
    *((0.1, 0.04, 0.05), (0.1, 0.03, 0.03)),
)
_ELASTIC_LARGE: _Shares = (
    *((2, 0.7, 0.1), (2, 0.08, 0.2), (0.05, 0.01, 0.02)),
    *((0.07, 0.01, 0.02), (0.12, 0.01, 0.02)),
)
KINDS = {  # function of `distortions` -> its settings
    "gaussian_noise": _Settings((0.04, 0.06, 0.08, 0.09, 0.10), (0.08, 0.12, 0.18, 0.26, 0.38)),
    "shot_noise": _Settings((500, 250, 100, 75, 50), (60, 25, 12, 5, 3)),
    "impulse_noise": _Settings((0.01, 0.02, 0.03, 0.05, 0.07), (0.03, 0.06, 0.09, 0.17, 0.27)),
    "defocus_blur": _Settings(
        ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
        ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
    ),
    "glass_blur": _Settings(
        ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
        ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
    ),
    "motion_blur": _Settings(
        ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
        ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
    ),
    "zoom_blur": _Settings(
        ((0.01, 7), (0.01, 12), (0.01, 16), (0.01, 21), (0.01, 26)),
        ((0.01, 12), (0.01, 16), (0.02, 11), (0.02, 13), (0.03, 11)),
    ),
    "snow": _Settings(
        (
            (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
            (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
            (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
            (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
        ),
        (
            (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
            (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
            (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
            (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
            (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
        ),
    ),
    "frost": _Settings(
        ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)),
        ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)),
    ),
    "fog": _Settings(
        ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
        ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),
    ),
    "brightness": _Settings((0.05, 0.1, 0.15, 0.2, 0.3), (0.1, 0.2, 0.3, 0.4, 0.5)),
    "contrast": _Settings((0.75, 0.5, 0.4, 0.3, 0.15), (0.4, 0.3, 0.2, 0.1, 0.05)),
    "elastic_transform": _Settings(
        [tuple(32 * share for share in row) for row in _ELASTIC_SMALL],
        [tuple(244 * share for share in row) for row in _ELASTIC_LARGE],  # 244 as there, not 224
    ),
    "pixelate": _Settings((0.95, 0.9, 0.85, 0.75, 0.65), (0.6, 0.5, 0.4, 0.3, 0.25)),
    "jpeg_compression": _Settings((80, 65, 58, 50, 40), (25, 18, 15, 10, 7)),
}


class Corruption(NamedTuple):
    """A kind of corruption and its severity."""

    kind: str
    severity: int  # 1 to 5

    def __str__(self) -> str:
        return f"{self.kind}-{self.severity}"


def chosen(text: str) -> list[Corruption]:
    """Parse `all`, `fog,snow` or `fog-3,snow-5`; a kind alone means all five severities."""
    corruptions: list[Corruption] = []
    for word in (part.strip() for part in text.split(",")):
        kind, hyphen, severity = word.partition("-")
        if kind != "all" and kind not in KINDS:
            raise DataError(f"there is no corruption {kind!r}; {meant(kind, ['all', *KINDS])}")
        if hyphen and severity not in map(str, SEVERITIES):
            raise DataError(
                f"{kind} has no severity {severity!r}; write {kind}-1 to {kind}-5, or "
                f"{kind} for all five"
            )
        kinds = list(KINDS) if kind == "all" else [kind]
        severities = [int(severity)] if hyphen else SEVERITIES
        corruptions += [Corruption(kind, number) for kind in kinds for number in severities]
    if twice := [corruption for corruption in corruptions if corruptions.count(corruption) > 1]:
        raise DataError(f"{text} has {twice[0]} twice; name it once")
    return sorted(corruptions, key=lambda one: (list(KINDS).index(one.kind), one.severity))


def corrupt(
    image: np.ndarray, corruption: Corruption, rng: Any, *, photographs: Sequence[np.ndarray] = ()
) -> np.ndarray:
    """Corrupt uint8[S,S,3], S 32 or 224, as the reference does: at 224, with a JPEG round trip.

    `rng` is the image's `draws`; only frost reads `photographs`.
    """
    is_small, kind = len(image) == SIDES[0], KINDS[corruption.kind]
    settings = (kind.small if is_small else kind.large)[corruption.severity - 1]
    settings = settings if isinstance(settings, tuple) else (settings,)
    more = {"photographs": photographs} if corruption.kind == "frost" else {}
    changed = getattr(distortions, corruption.kind)(image, rng, *settings, **more)
    pixels = np.clip(changed, 0, 255).astype(np.uint8)
    return pixels if is_small else distortions.jpeg_compression(pixels, rng, _STORED)


def draws(seed: int, corruption: Corruption, image: int) -> np.random.Generator:
    """Return the random generator of an image, by its place in the split, for one corruption."""
    key = [seed, 8 * list(KINDS).index(corruption.kind) + corruption.severity]
    return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, image]))
