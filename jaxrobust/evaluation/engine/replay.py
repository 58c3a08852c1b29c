"""Points from other ledgers or from the user, tried with one forward pass each.

A point that fools a network at one radius often fools it at another radius, epoch or network. A
ledger's point is brought into the ball. It counts, like a point found by an attack, if a forward
pass of the deciding network and its norm confirm it. So accuracy is at most that of the attacks
alone.
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

from jaxrobust.attacks.geometry.balls import GEOMETRIES, largest_pixels, per_image
from jaxrobust.evaluation.engine import engine
from jaxrobust.evaluation.engine.outcome import AttackContext, Cost, confirmed, reached
from jaxrobust.evaluation.network import checks, fingerprint, user_attacks
from jaxrobust.evaluation.network.user_attacks import UserAttack
from jaxrobust.evaluation.records import records
from jaxrobust.evaluation.records.record import ReplayedLedger
from jaxrobust.evaluation.records.verdicts import REPLAY, HashedImages, other_images
from jaxrobust.runtime.files import jsonl
from jaxrobust.runtime.processes import hosts
from jaxrobust.types import Array, Threat


class LedgerSource(NamedTuple):
    """A ledger with adversarial images, not yet read."""

    path: Path  # of its lines; the images are next to it
    network: Any  # its identity in the ledger
    threat: Threat
    shape: tuple[int, ...]  # H, W, C
    images: HashedImages = HashedImages.none()  # older versions stored no hashes


def is_ledger(path: Path) -> bool:
    """Tell whether a file of JSON lines is a ledger."""
    with path.open() as lines:
        return lines.readline().startswith('{"identity"')


def ledgers(folder: Path) -> list[Path]:
    """List the ledgers of a folder."""
    return sorted(path for path in folder.glob("*.jsonl") if is_ledger(path))


def header(path: Path) -> dict[str, Any]:
    """Read the identity of a ledger's evaluation."""
    with path.open() as lines:
        return dict(json.loads(lines.readline())["identity"])


def images(path: Path) -> HashedImages:
    """Read the ids and hashes of a ledger's images; none if an older version wrote it."""
    with path.open() as lines:
        first = json.loads(lines.readline())
    ids = records.places(first.get("image_ids") or "")
    return HashedImages.none() if ids is None else HashedImages(ids, np.array(first["hashes"], str))


def check_images(
    sources: Sequence[LedgerSource], images: HashedImages, shape: tuple[int, ...]
) -> None:
    """Raise if a ledger has other images of this shape under the ids of `images`."""
    for source in sources:
        words = other_images(source.images, images)
        if words and source.shape == shape:  # otherwise `run` reports both shapes
            raise ValueError(
                f"{source.path} is for different images: {words}; replay an evaluation of these "
                "images"
            )


def source(path: Path) -> LedgerSource:
    """Open a ledger to replay; `ValueError` if it is not a ledger, or too old to have sizes."""
    if not (path.is_file() and is_ledger(path)):
        raise ValueError(f"{path} is not a ledger; replay the ledger.jsonl of an evaluation")
    identity = header(path)
    if "image" not in identity:
        raise ValueError(
            f"{path} was written by an older version that did not store the image size; evaluate "
            "again to replay it"
        )
    shape = tuple(identity["image"])
    return LedgerSource(path, network_of(identity), Threat.of(identity), shape, images(path))


def ordered(sources: Sequence[LedgerSource], identity: dict[str, Any]) -> list[LedgerSource]:
    """Sort the sources of an evaluation, the likeliest to fool first."""
    network, threat = network_of(identity), Threat.of(identity)

    def rank(source: LedgerSource) -> tuple[Any, ...]:
        same = [source.network == network, source.threat.norm == threat.norm]
        sure = all(same) and source.threat.epsilon <= threat.epsilon
        apart = abs(source.threat.epsilon - threat.epsilon)
        return not sure, -sum(same), apart, source.path.name

    return sorted(sources, key=rank)


def run(
    evaluation: AttackContext, sources: Sequence[LedgerSource], network: Any
) -> tuple[Cost, list[ReplayedLedger]]:
    """Try the points of all ledgers on the survivors; return the cost and each ledger's share.

    `network` is the evaluated network, as `network_of` returns it.
    """
    runner, sample, outcome, book, _ = evaluation
    start, met = time.perf_counter(), int(outcome.standing.sum())
    evaluation.recall_fooled(REPLAY)
    shares: list[ReplayedLedger] = []
    forward, idle = 0, 0
    for source in sources:
        rows = jsonl.read(source.path)[1:]
        stored = {row["image"]: row["stored"] for row in rows if row["fooled"]}
        pending = np.flatnonzero(outcome.standing & np.isin(sample.ids, list(stored)))
        stretched = source.network != network  # another network: stretch to the boundary
        mine = hosts.share(pending)
        for first in range(0, len(mine), runner.slots):
            part = mine[first : first + runner.slots]
            idle += runner.slots - len(part)
            points = _points(evaluation, source, stored, stretched, part)
            points, sure, norms, others = confirmed(evaluation, points, part, 0)
            row = {"attack": REPLAY, "fooled": True, "flat": False, "from": source.path.stem}
            for i in np.flatnonzero(sure):
                facts = {"norm": float(norms[i]), "reached": int(others[i])}
                book.add(int(part[i]), row | facts, points[i])
            outcome.strike(REPLAY, part[sure])
        forward += len(pending)
        sha256 = hashlib.sha256(source.path.read_bytes()).hexdigest()
        share: Any = {"ledger": source.path.stem, "sha256": sha256} | source.threat.settings()
        fooled = evaluation.exchange_fooled(REPLAY, mine)
        shares.append(share | {"tried": len(pending), "fooled": fooled})
    fooled, idle = met - int(outcome.standing.sum()), hosts.total(idle)
    return Cost(REPLAY, fooled, forward, 0, idle, time.perf_counter() - start, 0.0), shares


def _points(
    evaluation: AttackContext,
    source: LedgerSource,
    stored: dict[int, int],
    stretched: bool,
    part: np.ndarray,
) -> np.ndarray:
    """Read a ledger's points of some images, check them, and bring them into the ball."""
    sample, slots = evaluation.sample, evaluation.runner.slots
    images, _, ids = sample.rows(part)
    norm, epsilon = sample.threat.norm, np.float32(sample.threat.epsilon)
    shape, path = images.shape[1:], source.path
    if shape != source.shape:
        there, here = ("x".join(map(str, size)) for size in (source.shape, shape))
        raise ValueError(
            f"{path} has {there} images, but these are {here}; replay an evaluation at this size"
        )
    file, count = path.with_suffix(".images"), int(np.prod(shape))
    places = [stored[i] for i in ids.tolist()]
    if not file.exists() or file.stat().st_size < 4 * count * (max(places) + 1):
        raise ValueError(
            f"{file} lacks adversarial images of {path.name}; copy both files together"
        )
    read = [np.fromfile(file, np.float32, count, offset=4 * count * place) for place in places]
    points = np.stack(read).reshape(-1, *shape)
    deltas = points.astype(np.float64) - images
    norms = np.array([checks.length(delta, source.threat.norm) for delta in deltas])
    if (norms > checks.most(source.threat.epsilon)).any():
        worst = int(norms.argmax())
        raise ValueError(
            f"{path} is for different images, or images prepared differently: its point for image "
            f"{ids[worst]} is {norms[worst]:.3g} from it in {source.threat.norm}, which exceeds "
            f"the radius {source.threat.epsilon:.4g}; replay an evaluation of these images"
        )
    rows = [engine.padded(array, slots) for array in (points, images)]
    return np.asarray(_pull(norm)(*rows, epsilon, stretched))[: len(part)]


def try_user(evaluation: AttackContext, user: UserAttack) -> Cost:
    """Try a user's points on all surviving images, reusing verdicts in the ledger."""
    runner, sample, outcome, book, _ = evaluation
    start, met, name = time.perf_counter(), int(outcome.standing.sum()), user.name
    outcome.names.append(name)
    evaluation.recall_fooled(name)
    pending = outcome.standing & ~book.rows(name)["known"] & user.covers(sample.ids)
    mine, key = hosts.share(np.flatnonzero(pending)), jax.random.key(sample.seed)
    for first in range(0, len(mine), runner.slots):
        part = mine[first : first + runner.slots]
        images, labels, ids = rows = sample.rows(part)
        part_key = jax.random.fold_in(key, int(ids[0]))
        points = user_attacks.points_of(user, runner.logits_fn, part_key, *rows, sample.threat)
        logits = engine.forward(runner, points, ids, seed=sample.seed)
        sure, norms = checks.verified(points, images, labels, logits, sample.threat)
        others = reached(logits, labels)
        for i, place in enumerate(part.tolist()):
            row: dict[str, Any] = {"attack": name, "fooled": bool(sure[i]), "flat": False}
            row |= {"norm": float(norms[i]), "reached": int(others[i])} if sure[i] else {}
            book.add(place, row, points[i] if sure[i] else None)
        outcome.strike(name, part[sure])
    evaluation.exchange_fooled(name, mine)
    fooled, seconds = met - int(outcome.standing.sum()), time.perf_counter() - start
    return Cost(name, fooled, int(pending.sum()), 0, 0, seconds, 0.0)


@functools.lru_cache
def _pull(norm: str) -> Callable[..., Array]:
    """Compile one program for all radii that projects points, if asked stretched to the radius."""

    def pull(points: Array, images: Array, epsilon: Array, stretched: Array) -> Array:
        deltas, radii = points - images, jnp.broadcast_to(epsilon, len(points))
        if norm == "l0":
            changes = jnp.abs(deltas).max(axis=3, keepdims=True)
            return jnp.where(largest_pixels(changes, radii.astype(int)), points, images)
        sizes = jnp.linalg.norm(deltas.reshape(len(deltas), -1), checks.ORDER[norm], axis=1)
        factor = jnp.where(stretched, jnp.maximum(1, epsilon / jnp.maximum(sizes, 1e-12)), 1)
        moved = GEOMETRIES[norm].project(images + per_image(factor, deltas) * deltas, images, radii)
        inside = ~stretched & (sizes <= epsilon)  # keeps the point's bits
        return jnp.where(per_image(inside, deltas), points, moved)

    return jax.jit(pull)


def network_of(identity: dict[str, Any]) -> list[Any]:
    """Read the identity of a ledger's network; older versions stored less of it."""
    if network := identity.get("fingerprint"):
        return [network[key] for key in fingerprint.EXACT]
    return [identity["network"], identity.get("weights")]
