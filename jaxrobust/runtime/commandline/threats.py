"""Parses threats in flags: a single one, NORM:RADIUS, and several radii of a norm."""

import re

from jaxrobust.runtime.commandline.arguments import number
from jaxrobust.runtime.text.spelling import norm as spelled
from jaxrobust.runtime.threats import THREAT_NORMS, Threat


def parse(text: str, flag: str = "threat") -> Threat:
    """Parse a threat such as `linf:4/255`, with its norm in any spelling.

    >>> str(parse("Linf:4/255"))
    'linf 0.01569'
    """
    norm, colon, radius = (part.strip() for part in text.partition(":"))
    norm = spelled(norm)
    if norm not in THREAT_NORMS:
        raise ValueError(
            f"--{flag}={text}: the norm {norm!r} is unknown; choose one of "
            f"{', '.join(THREAT_NORMS)}, as in linf:4/255"
        )
    if not (colon and radius):
        raise ValueError(f"--{flag}={text} has no radius; write {norm}:RADIUS, such as linf:4/255")
    try:
        return Threat(norm, number(flag, radius))
    except ValueError as error:
        reason = str(error).removeprefix(f"--{flag}={radius} ")
        raise ValueError(f"--{flag}={text}: {reason}") from error


def grown(threat: Threat, factor: float) -> Threat:
    """Return the ball that allows the same change per pixel on images with `factor` times the side.

    >>> str(grown(Threat("l2", 2.0), 1.5)), str(grown(Threat("l1", 75.0), 2.0))
    ('l2 3', 'l1 300')
    """
    epsilon = threat.epsilon * factor ** {"linf": 0, "l2": 1, "l1": 2, "l0": 2}[threat.norm]
    return Threat(threat.norm, float(round(epsilon)) if threat.norm == "l0" else epsilon)


def ladder(text: str) -> list[Threat]:
    """Parse the threats of --ladder, the smallest first; a threat of radius 0 is not an attack."""
    import numpy as np  # here, so that a mistake in another flag is refused sooner

    parts = [part.strip() for part in text.split(":")]
    form = "write NORM:LOW:HIGH:RADII, such as linf:0:16/255:9"
    if len(parts) != 4:
        raise ValueError(f"--ladder={text} has {len(parts)} parts; {form}")
    norm, low, high, count = spelled(parts[0]), *parts[1:]
    if not re.fullmatch(r"[1-9]\d{0,3}", count) or int(count) < 2:
        raise ValueError(f"--ladder={text}: {count!r} is not a number of radii above 1; {form}")
    try:
        ends = [parse(f"{norm}:{radius}").epsilon for radius in (low, high)]
    except ValueError as error:
        raise ValueError(str(error).replace("--threat=", f"--ladder={text}: ", 1)) from error
    if ends[0] >= ends[1]:
        raise ValueError(f"--ladder={text} must start at the smallest radius; {form}")
    return [Threat(norm, float(radius)) for radius in np.linspace(ends[0], ends[1], int(count))]
