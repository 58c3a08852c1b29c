"""Attack a sample of the images that a bundle says survive, which its rows cannot prove.

The author of the bundle cannot know the sample or the draws: both come from the verifier's seed.
"""

from typing import Any, NamedTuple

import numpy as np

from jaxrobust.evaluation.bundles.claims import Bundle
from jaxrobust.evaluation.bundles.contradictions import is_a, kind
from jaxrobust.evaluation.bundles.findings import SHOWN, ClaimFindings
from jaxrobust.evaluation.engine.autoattack import autoattack
from jaxrobust.evaluation.network import checks
from jaxrobust.evaluation.network.images import ImageSet
from jaxrobust.evaluation.records import stopping
from jaxrobust.runtime.text import patience
from jaxrobust.runtime.text.progress import say

IMAGES = 60  # if none of them falls, at most 5% of all survivors would
ATTACKS = ("apgd-ce", "apgd-t")
L0_ATTACKS = {name: {"steps": 1000} for name in ("sparse-pgd", "sparse-pgd-p")}  # of 10,000
_CHANCE = 0.01  # probability that the same attacks with another seed fool a surviving image


class StandingSample(NamedTuple):
    """The verifier's attacks on images that a bundle says survive."""

    images: int  # of the claim
    standing: int  # according to the bundle; all are classified correctly without an attack
    attacked: int
    fallen: dict[int, str]  # id -> attack
    refuted: int  # of these, fooled by an attack that the record says they withstand
    seed: int
    flags: dict[str, str]  # reasons found here to doubt the network's numbers
    attacks: tuple[str, ...] = ATTACKS

    @property
    def most(self) -> int:
        """Bound from above how many survivors would fall, with 95% confidence."""
        return stopping.most_fooled(len(self.fallen), self.attacked, self.standing)

    @property
    def least(self) -> int:
        """Bound from below how many survivors would fall, with 95% confidence."""
        stood = self.attacked - len(self.fallen)
        return self.standing - stopping.most_fooled(stood, self.attacked, self.standing)

    @property
    def contradicts(self) -> str | None:
        """Report that the record's attacks fool more images than chance allows, else None."""
        if checks.binomial_interval(self.refuted, self.attacked, 0.9)[0] <= _CHANCE:
            return None
        return (
            f"{self.refuted:,} of {self.attacked:,} images that survive in the bundle fell to "
            "attacks in its record"
        )

    def bounds(self, at_most: int) -> tuple[float, float]:
        """Bound the robust accuracy if `at_most` images survive the forward passes."""
        return (self.standing - self.most) / self.images, (at_most - self.least) / self.images

    def plain(self, at_most: int) -> dict[str, Any]:
        """Return all facts for JSON."""
        about = {key: getattr(self, key) for key in ("standing", "attacked", "refuted", "seed")}
        ends = {"would_fall": [self.least, self.most], "robust_within": [*self.bounds(at_most)]}
        return about | {"fell": len(self.fallen), "fallen": self.fallen, **ends}

    def lines(self, at_most: int) -> list[str]:
        """Format the result for people."""
        fell, (low, high) = len(self.fallen), self.bounds(at_most)
        least, most = (count / max(self.standing, 1) for count in (self.least, self.most))
        of = "all " if self.attacked == self.standing else ""
        would = f"{fell / max(self.standing, 1):.2%}" if of else f"{least:.2%} to {most:.2%}"
        sure = "" if of else "with 95% confidence in each bound, "
        shown = [
            f"  of {of}{self.attacked:,} surviving images, {fell:,} fell to "
            f"{', '.join(self.attacks)} (repeat with --seed {self.seed}): {sure}{would} of the "
            f"{self.standing:,} surviving images would fall, and robust accuracy under these "
            f"attacks is {low:.2%} to {high:.2%}"
        ]
        if fell:
            names = [f"{image} ({name})" for image, name in self.fallen.items()]
            more = ", ..." * (fell > SHOWN)
            shown.append(f"  fell: image {', '.join(names[:SHOWN])}{more}")
        return shown


def attacked(
    bundle: Bundle,
    findings: ClaimFindings,
    images: ImageSet,
    logits_fn: Any,
    *,
    count: int,
    seed: int,
    batch: int | None,
) -> StandingSample:
    """Attack up to `count` of the standing images that were confirmed, drawn by `seed`."""
    doubtful = {image for ids in findings.unconfirmed.values() for image in ids}
    rows = [row for row in bundle.rows if kind(row) == "standing"]
    rows = [row for row in rows if row["image"] not in doubtful]
    rng = np.random.default_rng(seed)
    drawn = np.sort(rng.choice(len(rows), min(count, len(rows)), replace=False))
    chosen = [rows[place] for place in drawn.tolist()]
    shorter = L0_ATTACKS if bundle.threat["norm"] == "l0" else {}
    attacks = (*shorter,) or ATTACKS
    about: Any = {"images": findings.images, "standing": len(rows), "attacked": len(chosen)}
    about |= {"seed": seed, "attacks": attacks}
    if not chosen:
        return StandingSample(**about, fallen={}, refuted=0, flags={})
    say(f"attacking {len(chosen)} of {len(rows)} surviving images: {', '.join(attacks)}")
    ids = [row["image"] for row in chosen]
    with patience.of("attacking surviving images"):
        result = autoattack(
            logits_fn,
            images[np.array(ids)],
            np.array([row["label"] for row in chosen]),
            **bundle.threat,
            attacks=attacks,
            overrides=shorter,
            seed=seed,
            batch_size=batch,
            image_ids=ids,
            verbose=False,
        )
    by_image = zip(ids, result.fooled_by.tolist(), strict=True)
    fallen = {image: name for image, name in by_image if name}
    # Attacks that the record claims to have run with at least these steps, restarts and targets.
    claimed = {
        attack["name"]
        for attack in result.attacks
        for one in bundle.record["attacks"]
        if one["name"] == attack["name"]
        and all(
            not is_a(one.get(key), int) or one[key] >= attack[key]
            for key in ("steps", "restarts", "targets")
        )
    }
    refuted = sum(name in claimed for name in fallen.values())
    return StandingSample(**about, fallen=fallen, refuted=refuted, flags=result.flags)
