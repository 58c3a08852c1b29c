"""Threats: the norm and the radius that an attack may use, and what is a valid one; without JAX."""

import math
from dataclasses import dataclass
from typing import Any

__all__ = ["NORMS", "THREAT_NORMS", "Threat", "check_length", "check_norm", "check_number"]
__all__ += ["check_radius", "check_threat", "fraction", "threats"]

NORMS = ("linf", "l2", "l1")  # of the balls that most attacks project onto
THREAT_NORMS = (*NORMS, "l0")  # l0 counts changed pixels, each in all channels


@dataclass(frozen=True)
class Threat:
    """A ball around an image that contains its adversarial images.

    Raises:
      ValueError: an invalid norm or radius; see `check_norm` and `check_radius`.

    >>> str(Threat("linf", 4 / 255)), Threat("l2", 0.5).settings()
    ('linf 0.01569', {'norm': 'l2', 'epsilon': 0.5})
    """

    norm: str
    epsilon: float  # in units of pixels in [0, 1]; for l0 the number of pixels

    def __post_init__(self) -> None:
        """Reject an invalid ball."""
        check_norm(self.norm, THREAT_NORMS)
        check_radius(self.norm, self.epsilon)

    def __str__(self) -> str:
        return f"{self.norm} {self.epsilon:.4g}"

    @classmethod
    def of(cls, settings: Any) -> "Threat":
        """Return the ball in the settings of an attack, a record or a config; reject several."""
        threat, *others = threats(settings)
        if others:
            raise ValueError(
                f"several norms are set ({', '.join(map(str, (threat, *others)))}), but this "
                "operation supports only one; choose one of them"
            )
        return threat

    @classmethod
    def only(cls, settings: Any) -> "Threat | None":
        """Return the ball like `of`; None if there are several."""
        threat, *others = threats(settings)
        return None if others else threat

    def written(self) -> str:
        """Format the threat as in papers: "linf 8/255", "l2 0.5"."""
        return f"{self.norm} {fraction(self.epsilon)}"

    def settings(self) -> dict[str, Any]:
        """Return the ball as records store it and functions accept it."""
        return {"norm": self.norm, "epsilon": self.epsilon}


def threats(settings: Any) -> tuple[Threat, ...]:
    """Return the balls in an attack's settings, whose `norm` and `epsilon` are single or lists.

    >>> [str(ball) for ball in threats({"norm": ("linf", "l2"), "epsilon": (0.03125, 0.5)})]
    ['linf 0.03125', 'l2 0.5']

    Raises:
      ValueError: not one radius per norm, a repeated norm, or an invalid ball.
    """
    norms, radii = settings["norm"], settings["epsilon"]
    norms = (norms,) if isinstance(norms, str) else tuple(norms)
    radii = tuple(radii) if isinstance(radii, list | tuple) else (radii,)
    if len(norms) != len(radii) or not norms:
        raise ValueError(
            f"norm={','.join(map(str, norms))} and epsilon={','.join(map(str, radii))}: give "
            "one radius per norm, in the same order"
        )
    for norm in norms:
        if norms.count(norm) > 1:
            raise ValueError(f"norm={','.join(map(str, norms))} names {norm} twice; name it once")
    return tuple(map(Threat, norms, radii))


def fraction(epsilon: float) -> str:
    """Format a radius for people: 4/255, or 0.1."""
    levels = 255 * epsilon
    is_level = 0 < round(levels) <= 64 and abs(levels - round(levels)) < 1e-3
    return f"{round(levels)}/255" if is_level else f"{epsilon:.4g}"


def check_norm(norm: str, norms: tuple[str, ...] = NORMS) -> None:
    """Reject an unknown norm."""
    if norm not in norms:
        raise ValueError(f"norm={norm!r} is unknown; choose one of {', '.join(norms)}")


def check_radius(norm: str, epsilon: float) -> None:
    """Reject a non-finite or negative radius, one above 1 for Linf, or a non-integer for L0."""
    epsilon = check_number("epsilon", epsilon)
    if not (math.isfinite(epsilon) and epsilon >= 0):
        raise ValueError(f"epsilon={epsilon} is not a valid radius; pass a finite number >= 0")
    check_length("epsilon", epsilon, norm)
    if norm == "l0" and epsilon % 1:
        raise ValueError(f"epsilon={epsilon} must be a whole number of pixels, such as 24")


def check_length(name: str, value: float, norm: str = "linf") -> None:
    """Reject a length in pixels above 1 for Linf, which is probably meant in 0..255.

    >>> check_length("step_size", 2 / 255), check_length("step_size", 1.5, "l2")
    (None, None)
    """
    if norm == "linf" and value > 1:
        remedy = f"write {value:g}/255" if value <= 255 else "pass a value of at most 1"
        raise ValueError(f"{name}={value} is larger than the pixel range [0, 1]; {remedy}")


def check_threat(threat: Threat, size: int, channels: int) -> None:
    """Reject a radius that is probably meant for another norm, or contains every image."""
    norm, epsilon = threat.norm, threat.epsilon
    if norm == "l1" and 0 < epsilon < 1:
        raise ValueError(
            f"an l1 radius of {epsilon:.4g} changes less than one pixel and is probably meant for "
            "linf; use norm linf, or an l1 radius such as 12"
        )
    pixels = channels * size**2
    largest = {"linf": 1, "l2": math.sqrt(pixels), "l1": pixels, "l0": size**2}[norm]
    if epsilon > largest:
        raise ValueError(
            f"an {norm} ball of radius {epsilon:g} contains all {size}x{size} images in [0, 1], "
            f"which are at most {largest:.4g} apart; give a radius for this pixel range"
        )


def check_number(name: str, value: Any) -> float:
    """Parse a setting as a number; `ValueError` if it is not one."""
    try:
        if not isinstance(value, str):
            return float(value)
    except TypeError:
        pass
    raise ValueError(f"{name}={value!r} is not a number; pass one without quotes, such as 4/255")
