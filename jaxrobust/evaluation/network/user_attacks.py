"""Adversarial images and attacks that a user brings: read, and checked before anything counts.

No point is moved: one outside of the ball or of [0, 1] is refused, not clipped.
"""

import hashlib
import io
import zipfile
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrobust.evaluation.network import checks
from jaxrobust.runtime.commandline import functions
from jaxrobust.runtime.text.progress import say
from jaxrobust.runtime.text.spelling import counted
from jaxrobust.types import Threat

ALONE = "user"  # in place of the attacks of an evaluation that has a user's alone


class UserAttack(NamedTuple):
    """Points of a file, or a function that makes points."""

    flag: str  # that names it, for messages: "--points adv.npz"
    file: str  # its name without folders, or that of the function
    sha256: str | None  # of the file; None: a function without one
    points: dict[int, np.ndarray] | None = None  # f32[H,W,C] by id
    function: Callable[..., Any] | None = None  # (logits_fn, key, images, labels) -> images

    @property
    def name(self) -> str:
        """Name it in verdicts and records, so that another content has another name."""
        return f"{self.file} ({self.sha256[:8]})" if self.sha256 else self.file

    def settings(self) -> dict[str, Any]:
        """Describe it for a record."""
        return {"name": self.name, "file": self.file, "sha256": self.sha256}

    def covers(self, ids: np.ndarray) -> np.ndarray:
        """Mark the images that it has points for, bool[n]."""
        every = np.ones(len(ids), bool)
        return every if self.points is None else np.isin(ids, list(self.points))


def of_flags(attack: str, files: Sequence[str]) -> tuple[str, tuple[UserAttack, ...]]:
    """Read the user's part of `--attack` and `--points`; return the other attacks, and it.

    Raises:
      ValueError: a file or function that is missing, damaged, or given twice.
    """
    names = attack.split(",")
    own = [name for name in names if functions.is_name(name) or name.endswith(".py")]
    users = [*map(of_function, own), *map(of_file, files)]
    if repeated := [one.flag for at, one in enumerate(users) if one.name in _names(users[:at])]:
        raise ValueError(f"{repeated[0]} is given twice; give it once")
    others = ",".join(name for name in names if name not in own)
    if users and others in ("", "clean"):
        others = ALONE
    return others, tuple(users)


def _names(users: Sequence[UserAttack]) -> list[str]:
    return [one.name for one in users]


def of_function(name: str) -> UserAttack:
    """Find the function that `FILE.py:NAME` or `package.module:NAME` says."""
    found = functions.find("--attack", name)
    own = Path(found.name.rpartition(":")[0]).name + ":" + found.name.rpartition(":")[2]
    return UserAttack(f"--attack={name}", own, found.sha256, function=found.function)


def of_file(path: str) -> UserAttack:
    """Read `ids` int[M] and `images` [M,H,W,C] of an .npz, uint8 or floats in [0, 1]."""
    flag = f"--points {path}"
    try:
        content = Path(path).read_bytes()
        if not (content.startswith(b"\x93NUMPY") or zipfile.is_zipfile(io.BytesIO(content))):
            raise ValueError("not a zip file")
        stored = np.load(io.BytesIO(content), allow_pickle=False)
        there = {} if isinstance(stored, np.ndarray) else {key: stored[key] for key in stored.files}
    except OSError as error:
        raise ValueError(f"{flag}: cannot read it ({error.strerror or error})") from error
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError) as error:
        raise ValueError(
            f"{flag} is no .npz file of plain arrays ({error}); save it by numpy.savez"
        ) from error
    if missing := [key for key in ("ids", "images") if key not in there]:
        raise ValueError(
            f"{flag} has no array {missing[0]!r}, but {', '.join(there) or 'none that is named'}; "
            "save ids=..., int[M], and images=..., [M,H,W,C], by numpy.savez"
        )
    ids, images = there["ids"], there["images"]
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise ValueError(f"{flag}: ids are {ids.dtype}{list(ids.shape)}; save integers, int[M]")
    if images.ndim != 4 or len(images) != len(ids):
        raise ValueError(
            f"{flag}: images have shape {images.shape} for {len(ids)} ids; save one image for each "
            "id, [M,H,W,C], channels last"
        )
    if not len(ids):
        raise ValueError(f"{flag} has no points; save one for each image that is to be tried")
    values, counts = np.unique(ids, return_counts=True)
    if (counts > 1).any():
        raise ValueError(
            f"{flag} repeats {counted(int((counts > 1).sum()), 'id')}, such as "
            f"{values[counts > 1][0]}; save one point for each image"
        )
    points = _floats(flag, images)
    _check_range(flag, points, ids)
    unit = "from 0 to 255" if images.dtype == np.uint8 else "from 0 to 1"
    say(f"{flag}: {len(ids)} points, {images.dtype} {unit}")
    sha256 = hashlib.sha256(content).hexdigest()
    return UserAttack(flag, Path(path).name, sha256, dict(zip(ids.tolist(), points, strict=True)))


def _floats(flag: str, images: np.ndarray) -> np.ndarray:
    if images.dtype == np.uint8:
        return np.divide(images, np.float32(255), dtype=np.float32)
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(
            f"{flag}: images are {images.dtype}; give floats in [0, 1], or uint8 from 0 to 255"
        )
    return images.astype(np.float32)


def _check_range(flag: str, points: np.ndarray, ids: np.ndarray) -> None:
    """Refuse points that are not finite, or outside of [0, 1]."""
    flat = points.reshape(len(points), -1)
    bad = ~np.isfinite(flat).all(axis=1)
    if bad.any():
        raise ValueError(
            f"{flag}: {bad.sum()} of {len(points)} images have NaN or infinite pixels, as image "
            f"{ids[bad][0]}; leave them out"
        )
    by = np.maximum(-flat.min(axis=1, initial=0), flat.max(axis=1, initial=1) - 1)
    if not (by > 0).any():
        return
    worst = int(by.argmax())
    remedy = "divide by 255, or save uint8" if by[worst] > 1 else "clip them to [0, 1] yourself"
    raise ValueError(
        f"{flag}: {(by > 0).sum()} of {len(points)} images leave [0, 1], image {ids[worst]} by "
        f"{by[worst]:.3g}; {remedy}, or leave them out"
    )


def check(users: Sequence[UserAttack], images: Any, ids: np.ndarray, threat: Threat) -> None:
    """Refuse points of files that are not of these images, [N,H,W,C], or outside of their ball."""
    for user in users:
        if user.points is not None:
            _check_points(user, user.points, images, ids, threat)


def _check_points(
    user: UserAttack,
    by_id: dict[int, np.ndarray],
    images: Any,
    ids: np.ndarray,
    threat: Threat,
) -> None:
    places = {image: place for place, image in enumerate(ids.tolist())}
    if others := sorted(by_id.keys() - places.keys()):
        raise ValueError(
            f"{user.flag}: {counted(len(others), 'id')} not among the {len(ids)} images of this "
            f"evaluation, such as {others[0]}; leave them out, or evaluate more images"
        )
    own = sorted(by_id)
    outside: dict[int, float] = {}
    for start in range(0, len(own), 64):
        part = own[start : start + 64]
        points = np.stack([by_id[image] for image in part])
        clean = images[np.array([places[image] for image in part])]
        outside |= _outside(user.flag, points, clean, np.array(part), threat)
    _refuse_outside(user.flag, outside, len(own), threat)


def _outside(
    flag: str, points: np.ndarray, images: np.ndarray, ids: np.ndarray, threat: Threat
) -> dict[int, float]:
    """Measure by how much points are outside of the ball, by ids, of those that are."""
    if points.shape[1:] != images.shape[1:]:
        remedy = "put channels last" if points.shape[1] in (1, 3) else "give points of that shape"
        raise ValueError(
            f"{flag}: images are {points.shape[1:]}, and those of the evaluation "
            f"{images.shape[1:]}; {remedy}"
        )
    nothing = np.ones((len(points), 1), np.float32)  # logits, whatever they are
    _, norms = checks.verified(points, images, np.zeros(len(points), int), nothing, threat)
    far = norms > checks.most(threat.epsilon)
    return dict(zip(ids[far].tolist(), (norms[far] - threat.epsilon).tolist(), strict=True))


def _refuse_outside(flag: str, outside: dict[int, float], of: int, threat: Threat) -> None:
    if outside:
        worst = max(outside, key=lambda image: outside[image])
        raise ValueError(
            f"{flag}: {len(outside)} of {of} points are outside of the ball of {threat.norm} "
            f"{threat.epsilon:.6g}, that of image {worst} by {outside[worst]:.3g}; bring them into "
            "the ball, or leave them out"
        )


def points_of(
    user: UserAttack,
    logits_fn: Callable[..., Any],
    key: Any,
    images: np.ndarray,
    labels: np.ndarray,
    ids: np.ndarray,
    threat: Threat,
) -> np.ndarray:
    """Give the points f32[n,H,W,C] of some images that it `covers`, all in [0, 1] and the ball."""
    if user.points is not None:
        return np.stack([user.points[image] for image in ids.tolist()])
    assert user.function is not None
    plain = partial(jax.jit(lambda network, given: network(given)), logits_fn)
    with functions.explained("--attack", user.flag.removeprefix("--attack=")):
        points = np.asarray(user.function(plain, key, jnp.asarray(images), jnp.asarray(labels)))
    if points.shape != images.shape:
        raise ValueError(
            f"{user.flag} returned an array {points.shape} for images {images.shape}; return an "
            "adversarial image for each"
        )
    if points.dtype == np.uint8:
        raise ValueError(f"{user.flag} returned uint8; return floats in [0, 1]")
    points = _floats(user.flag, points)
    _check_range(user.flag, points, ids)
    outside = _outside(user.flag, points, images, ids, threat)
    _refuse_outside(user.flag, outside, len(points), threat)
    return points
