"""The worst case over three norms, as Tang et al. 2022 measure it: its attacks and radii.

An image is robust if it withstands PGD and AutoAttack in Linf, PGD in L2 and PGD in L1. Their
table prints each of the four and the worst case on the same images, so no attack skips images that
another has fooled. For the worst case alone, each attack only runs on the survivors of the previous
ones, the three cheap attacks first.

PGD is foolbox's in Linf and L2 and ART's in L1 (`attacks.l1_rules`), 20 steps of 3/40 of the radius
from a random start. The attacks in L2 and L1 are weak: only compare the worst case with results of
the same attacks. Misclassified images count as not robust.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jaxrobust.attacks.fixed_steps import is_cascade
from jaxrobust.evaluation.questions.questions import AUTOATTACK, GivenFlags
from jaxrobust.runtime.commandline import threats
from jaxrobust.types import NORMS, Threat

LINF = 8 / 255
# The study's radii, by the side of the images in pixels.
RADII = {
    32: (Threat("linf", LINF), Threat("l2", 1.5), Threat("l1", 40.0)),
    224: (Threat("linf", LINF), Threat("l2", 8.0), Threat("l1", 1600.0)),
}


class NormAttack(NamedTuple):
    """One of the attacks."""

    norm: str
    attack: str
    settings: Mapping[str, Any]  # fields of `GivenFlags`


_PGD = {"relative_step": 1.5, "start": "uniform-boxed"}
# In the order of the table.
PARTS = (
    NormAttack("linf", "pgd-20", _PGD),
    NormAttack("linf", AUTOATTACK, {}),
    NormAttack("l2", "pgd-20", _PGD),
    NormAttack("l1", "pgd-20", {"relative_step": 1.5, "start": "random", "l1_rule": "art"}),
)


def parts(*, skips: bool) -> list[NormAttack]:
    """List the attacks in order of execution; `skips`: each only attacks previous survivors."""
    return sorted(PARTS, key=lambda part: is_cascade(part.attack)) if skips else list(PARTS)


def radii(
    size: int,
    threats_given: Sequence[Threat],
    *,
    write: Callable[[Sequence[str]], str] | None = None,
) -> dict[str, Threat]:
    """Find the threat of each norm for images of `size` pixels: given, or the study's."""
    by_norm = {threat.norm: threat for threat in (*RADII.get(size, ()), *threats_given)}
    if missing := [norm for norm in NORMS if norm not in by_norm]:
        sizes = "; ".join(
            f"{side} px: {', '.join(map(str, of_side))}" for side, of_side in RADII.items()
        )
        words = write(missing) if write else " ".join(f"--threat={n}:RADIUS" for n in missing)
        raise ValueError(
            f"the worst case has no radii for images of {size} px ({sizes}); give {words}"
        )
    return {norm: by_norm[norm] for norm in NORMS}


def balls(texts: Sequence[str]) -> list[Threat]:
    """Parse --threat, at most one per norm."""
    by_norm: dict[str, Threat] = {}
    for text in texts:
        threat = threats.parse(text)
        if threat.norm in by_norm:
            raise ValueError(
                f"--threat={text}: --worst_case takes one radius per norm, and {threat.norm} "
                "already has one; give it once"
            )
        by_norm[threat.norm] = threat
    return list(by_norm.values())


# Flags that --worst_case determines, and their defaults.
_SAID: dict[str, Any] = {"attack": AUTOATTACK, "version": "standard"}
_SAID |= dict.fromkeys(
    ("norm", "epsilon", "steps", "targets", "restarts", "relative_step", "step", "start", "l1_rule")
)


def check(values: Any, ladder: str | None) -> None:
    """Refuse flags that --worst_case does not support."""
    for flag, value in (("ladder", ladder), ("corruptions", values.corruptions)):
        if value:
            raise ValueError(f"--worst_case cannot be combined with --{flag}; give only one")
    needless = [f"--{name}" for name, none in _SAID.items() if getattr(values, name) != none]
    if balls_in := [flag for flag in needless if flag in ("--norm", "--epsilon")]:
        raise ValueError(
            f"--worst_case covers three norms, so leave {' and '.join(balls_in)} out; give "
            "--threat NORM:RADIUS for each radius that differs from the study's"
        )
    if needless:
        raise ValueError(
            f"--worst_case fixes the attacks; leave {', '.join(needless)} out, or ask for one "
            "attack without --worst_case"
        )
    if values.bundle:
        raise ValueError(
            "--bundle covers one attack under one threat, not --worst_case; use --attack="
            "autoattack --norm=linf and its radius, from the same --out"
        )


def questions(question: GivenFlags, *, skips: bool) -> list[tuple[str, GivenFlags]]:
    """List the norm and the question of each attack, in the order of `parts`."""
    no_union = {"union_only": False}
    alone = no_union | {"replay": (), "noreplay": False, "search_dtype": "float32"}
    several = []
    for part in parts(skips=skips):
        more = no_union if is_cascade(part.attack) else alone
        several.append((part.norm, question._replace(attack=part.attack, **more, **part.settings)))
    return several
