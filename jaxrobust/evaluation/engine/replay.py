"""Adversarial images of other evaluations, tried before any attack: one forward pass each.

What fooled a network at one radius often fools it at another, and another epoch or network too. A
point is brought into the ball and counts as what an attack finds does: if a forward pass of the
network that decides, and its norm, confirm it. So a verdict is that of the attacks alone, or lower.
"""

import functools
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrobust.attacks.geometry.balls import GEOMETRIES, per_image
from jaxrobust.evaluation.engine import engine
from jaxrobust.evaluation.engine.outcome import AttackContext, Cost, confirmed, refuse_damaged
from jaxrobust.evaluation.network import checks, fingerprint
from jaxrobust.evaluation.records import records
from jaxrobust.evaluation.records.parts import ReplayedLedger
from jaxrobust.evaluation.records.verdicts import REPLAY, HashedImages, other_images
from jaxrobust.runtime.files import jsonl
from jaxrobust.runtime.processes import hosts
from jaxrobust.types import Array, Threat


class LedgerSource(NamedTuple):
    """A ledger with adversarial images, not yet read."""

    path: Path  # of its lines; beside it are the images
    network: Any  # names it, as in the ledger
    threat: Threat
    shape: tuple[int, ...]  # H, W, C
    images: HashedImages = HashedImages.none()  # those of an older version have no hashes


class Points(NamedTuple):
    """The adversarial images of a ledger, one an image; they stay on disk."""

    path: Path
    sha256: str  # of the ledger's lines
    shape: tuple[int, ...]
    ids: np.ndarray  # u32[M], ascending
    stored: np.ndarray  # i64[M], places among the images

    def read(self, ids: np.ndarray) -> np.ndarray:
        """Read those of some images, f32[n,H,W,C]; `ValueError`: the file is too short for them."""
        file, count = self.path.with_suffix(".images"), int(np.prod(self.shape))
        places = self.stored[np.searchsorted(self.ids, ids)]
        if not file.exists() or file.stat().st_size < 4 * count * (int(places.max()) + 1):
            raise ValueError(
                f"{file} lacks adversarial images of {self.path.name}; copy both, or replay others"
            )
        read = [np.fromfile(file, np.float32, count, offset=4 * count * p) for p in places]
        return np.stack(read).reshape(-1, *self.shape)


class KnownVerdicts(NamedTuple):
    """What is known of N images before an evaluation."""

    sources: Sequence[LedgerSource]
    robust_beyond: np.ndarray  # bool[N], robust at a larger radius
    network: Any = None  # the one that is evaluated, as in its ledger


def is_ledger(path: Path) -> bool:
    """Tell whether a file of JSON lines is a ledger."""
    with path.open() as lines:
        return lines.readline().startswith('{"identity"')


def ledgers(folder: Path) -> list[Path]:
    """List the ledgers of a folder."""
    return sorted(path for path in folder.glob("*.jsonl") if is_ledger(path))


def header(path: Path) -> dict[str, Any]:
    """Read the identity of the evaluation that a ledger is of."""
    return _first_line(path)["identity"]


def _first_line(path: Path) -> dict[str, Any]:
    with path.open() as lines:
        return json.loads(lines.readline())


def images(path: Path) -> HashedImages:
    """Read which images a ledger is of; none where an older version did not note them."""
    first = _first_line(path)
    ids = records.places(first.get("image_ids") or "")
    return HashedImages.none() if ids is None else HashedImages(ids, np.array(first["hashes"], str))


def check_images(
    sources: Sequence[LedgerSource], ours: HashedImages, shape: tuple[int, ...]
) -> None:
    """Refuse ledgers of other images with the ids of ours, which have this shape."""
    for source in sources:
        words = other_images(source.images, ours)
        if words and source.shape == shape:  # else `run` says how large both are
            raise ValueError(
                f"{source.path} is of other images: {words}; replay an evaluation of these images"
            )


def source(path: Path) -> LedgerSource:
    """Open a ledger to replay; `ValueError`: it is none, or an old one that notes no size."""
    if not (path.is_file() and is_ledger(path)):
        raise ValueError(
            f"{path} is no ledger to replay; name a file of an evaluation, ledger.jsonl"
        )
    identity = header(path)
    if "image" not in identity:
        raise ValueError(
            f"{path} was written by an older version, which did not note the size of its images; "
            "evaluate again to replay it"
        )
    about = (network_of(identity), Threat.of(identity), tuple(identity["image"]))
    return LedgerSource(path, *about, images(path))


def points(source: LedgerSource) -> Points:
    """Read the points of a ledger: of many, one at a time is in memory."""
    rows = jsonl.read(source.path)[1:]
    stored = {row["image"]: row["stored"] for row in rows if row["fooled"]}
    ids = np.array(sorted(stored), np.uint32)
    places = np.array([stored[i] for i in ids.tolist()], np.int64)
    sha256 = hashlib.sha256(source.path.read_bytes()).hexdigest()
    return Points(source.path, sha256, source.shape, ids, places)


def ordered(known: KnownVerdicts, evaluation: dict[str, Any]) -> KnownVerdicts:
    """Order the sources of an evaluation, the likeliest to fool first."""
    network, threat = network_of(evaluation), Threat.of(evaluation)

    def rank(source: LedgerSource) -> tuple[Any, ...]:
        same = [source.network == network, source.threat.norm == threat.norm]
        sure = all(same) and source.threat.epsilon <= threat.epsilon
        apart = abs(source.threat.epsilon - threat.epsilon)
        return not sure, -sum(same), apart, source.path.name

    return known._replace(sources=sorted(known.sources, key=rank), network=network)


def run(evaluation: AttackContext, known: KnownVerdicts) -> tuple[Cost, list[ReplayedLedger]]:
    """Try all that there is on what stands; return what that took, and each source's share."""
    runner, sample, outcome, book, _ = evaluation
    start, met = time.perf_counter(), int(outcome.standing.sum())
    before = np.flatnonzero(outcome.standing & book.rows(REPLAY)["fooled"])
    refuse_damaged(evaluation, REPLAY, 0, before)
    outcome.strike(REPLAY, before)
    shares: list[ReplayedLedger] = []
    forward, idle = 0, 0
    for source in known.sources:
        there = points(source)
        pending = np.flatnonzero(outcome.standing & np.isin(sample.ids, there.ids))
        stretched = source.network != known.network  # of another one: to the rim of the ball
        mine = hosts.share(pending)
        for first in range(0, len(mine), runner.slots):
            part = mine[first : first + runner.slots]
            _try(evaluation, source, there, stretched, part)
            idle += runner.slots - len(part)
        fallen = mine[~outcome.standing[mine]]
        parts = hosts.everyone((fallen, book.results(fallen, REPLAY)))
        for process, (which, theirs) in enumerate(parts):
            book.take_over(process, which, REPLAY, theirs)
            outcome.strike(REPLAY, which)
        forward += len(pending)
        share: Any = {"ledger": source.path.stem, "sha256": there.sha256}
        share |= source.threat.settings()
        fooled = sum(len(which) for which, _ in parts)
        shares.append(share | {"tried": len(pending), "fooled": fooled})
    cost = Cost(
        attack=REPLAY,
        fooled=met - int(outcome.standing.sum()),
        forward=forward,
        backward=0,
        idle=hosts.total(idle),
        seconds=time.perf_counter() - start,
        compile_seconds=0.0,
    )
    return cost, shares


def _try(
    evaluation: AttackContext,
    source: LedgerSource,
    there: Points,
    stretched: bool,
    part: np.ndarray,
) -> None:
    runner, sample, outcome, book, _ = evaluation
    images, _, ids = sample.rows(part)
    norm, epsilon = sample.threat.norm, np.float32(sample.threat.epsilon)
    if images.shape[1:] != source.shape:
        raise ValueError(
            f"{source.path} has images of {_sides(source.shape)}, and these are of "
            f"{_sides(images.shape[1:])}; replay an evaluation at this size"
        )
    adversarial = there.read(ids)
    _refuse_others(source, adversarial, images, ids)
    padded = [engine.padded(array, runner.slots) for array in (adversarial, images)]
    adversarial = np.asarray(_pull(norm)(*padded, epsilon, stretched))[: len(part)]
    adversarial, sure, norms, others = confirmed(evaluation, adversarial, part, 0)
    row = {"attack": REPLAY, "fooled": True, "flat": False, "from": source.path.stem}
    for i in np.flatnonzero(sure):
        about = {"norm": float(norms[i]), "reached": int(others[i])}
        book.add(int(part[i]), row | about, adversarial[i])
        outcome.strike(REPLAY, part[i])


def _refuse_others(
    source: LedgerSource, points: np.ndarray, images: np.ndarray, ids: np.ndarray
) -> None:
    deltas = (points.astype(np.float64) - images).reshape(len(points), -1)
    norms = np.linalg.norm(deltas, checks.ORDER[source.threat.norm], axis=1)
    if (norms > checks.most(source.threat.epsilon)).any():
        worst, norm = int(norms.argmax()), source.threat.norm
        raise ValueError(
            f"{source.path} is of other images, or of images prepared otherwise: what it has for "
            f"image {ids[worst]} is {norms[worst]:.3g} in {norm} away from ours, more than "
            f"its radius of {source.threat.epsilon:.4g}; replay an evaluation of these images"
        )


@functools.lru_cache
def _pull(norm: str) -> Callable[..., Array]:
    """Make the program, one for all radii, that pulls points into a ball, or first to its rim."""

    def pull(points: Array, images: Array, epsilon: Array, stretched: Array) -> Array:
        deltas = points - images
        sizes = jnp.linalg.norm(deltas.reshape(len(deltas), -1), checks.ORDER[norm], axis=1)
        factor = jnp.where(stretched, jnp.maximum(1, epsilon / jnp.maximum(sizes, 1e-12)), 1)
        radii = jnp.broadcast_to(epsilon, sizes.shape)
        there = GEOMETRIES[norm].project(images + per_image(factor, deltas) * deltas, images, radii)
        inside = ~stretched & (sizes <= epsilon)  # as it is, to the last bit
        return jnp.where(per_image(inside, deltas), points, there)

    return jax.jit(pull)


def network_of(identity: dict[str, Any]) -> list[Any]:
    """Read the identity of the network of a ledger; an older version knew less of it."""
    if known := identity.get("fingerprint"):
        return [known[key] for key in fingerprint.EXACT]
    return [identity["network"], identity.get("weights")]


def _sides(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
