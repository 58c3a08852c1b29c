"""Adversarial images and attacks supplied by the user, read and checked.

Points are never moved: a point outside the ball or [0, 1] is rejected, not clipped.
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

ALONE = "user"  # stands for the attacks of an evaluation with only the user's


class UserAttack(NamedTuple):
    """Points from a file, or a function that makes points."""

    flag: str  # for messages: "--points adv.npz"
    file: str  # its name without folders, or the name of the function
    sha256: str | None  # of the file; None: a function without a file
    points: dict[int, np.ndarray] | None = None  # f32[H,W,C] by id
    function: Callable[..., Any] | None = None  # (logits_fn, key, images, labels) -> images

    @property
    def name(self) -> str:
        """The name in verdicts and records, which depends on the content."""
        return f"{self.file} ({self.sha256[:8]})" if self.sha256 else self.file

    def settings(self) -> dict[str, Any]:
        """Return the settings for a record."""
        return {"name": self.name, "file": self.file, "sha256": self.sha256}

    def covers(self, ids: np.ndarray) -> np.ndarray:
        """Mark the images that have points, bool[n]."""
        return np.isin(ids, list(ids if self.points is None else self.points))


def of_flags(attack: str, files: Sequence[str]) -> tuple[str, tuple[UserAttack, ...]]:
    """Read the user's attacks from `--attack` and `--points`; return the other attacks, and them.

    Raises:
      ValueError: a file or function is missing, damaged, or given twice.
    """
    names = attack.split(",")
    calls = [name for name in names if functions.is_name(name) or name.endswith(".py")]
    users: dict[str, UserAttack] = {}
    for user in (*map(of_function, calls), *map(of_file, files)):
        if user.name in users:
            raise ValueError(f"{user.flag} is given twice; give it once")
        users[user.name] = user
    others = ",".join(name for name in names if name not in calls)
    return ALONE if users and others in ("", "clean") else others, tuple(users.values())


def of_function(name: str) -> UserAttack:
    """Find the function named by `FILE.py:NAME` or `package.module:NAME`."""
    function = functions.find("--attack", name)
    file, _, variable = function.name.rpartition(":")
    display = f"{Path(file).name}:{variable}"
    return UserAttack(f"--attack={name}", display, function.sha256, function=function.function)


def of_file(path: str) -> UserAttack:
    """Read `ids` int[M] and `images` [M,H,W,C] of an .npz, uint8 or floats in [0, 1]."""
    flag = f"--points {path}"
    try:
        content = Path(path).read_bytes()
        if not (content.startswith(b"\x93NUMPY") or zipfile.is_zipfile(io.BytesIO(content))):
            raise ValueError("not a zip file")
        stored = np.load(io.BytesIO(content), allow_pickle=False)
        arrays = {} if isinstance(stored, np.ndarray) else dict(stored.items())
    except OSError as error:
        raise ValueError(f"{flag} cannot be read ({error.strerror or error})") from error
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError) as error:
        raise ValueError(
            f"{flag} is not an .npz file of plain arrays ({error}); save it with numpy.savez"
        ) from error
    if missing := [key for key in ("ids", "images") if key not in arrays]:
        raise ValueError(
            f"{flag} has no array {missing[0]!r} (it has {', '.join(arrays) or 'no named ones'}); "
            "save ids=..., int[M], and images=..., [M,H,W,C], with numpy.savez"
        )
    ids, images = arrays["ids"], arrays["images"]
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise ValueError(f"{flag}: ids are {ids.dtype}{list(ids.shape)}; save integers, int[M]")
    if images.ndim != 4 or len(images) != len(ids):
        raise ValueError(
            f"{flag}: images have shape {images.shape} for {len(ids)} ids; save one image for each "
            "id, [M,H,W,C], channels last"
        )
    if not len(ids):
        raise ValueError(f"{flag} has no points; save one for each image to test")
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
        return np.asarray(np.divide(images, np.float32(255), dtype=np.float32))
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(
            f"{flag}: images are {images.dtype}; give floats in [0, 1], or uint8 from 0 to 255"
        )
    return images.astype(np.float32)


def _check_range(flag: str, points: np.ndarray, ids: np.ndarray) -> None:
    """Raise if points are not finite or lie outside [0, 1]."""
    flat = points.reshape(len(points), -1)
    bad = ~np.isfinite(flat).all(axis=1)
    if bad.any():
        raise ValueError(
            f"{flag}: {bad.sum()} of {len(points)} images have NaN or infinite pixels, such as "
            f"image {ids[bad][0]}; leave them out"
        )
    by = np.maximum(-flat.min(axis=1, initial=0), flat.max(axis=1, initial=1) - 1)
    if not (by > 0).any():
        return
    worst = int(by.argmax())
    remedy = "divide by 255, or save uint8" if by[worst] > 1 else "clip them to [0, 1] yourself"
    raise ValueError(
        f"{flag}: {(by > 0).sum()} of {len(points)} images are outside [0, 1], image {ids[worst]} "
        f"by {by[worst]:.3g}; {remedy}, or leave them out"
    )


def check(users: Sequence[UserAttack], images: Any, ids: np.ndarray, threat: Threat) -> None:
    """Raise if a file has points of other images than these, [N,H,W,C], or outside their ball."""
    places = {image: place for place, image in enumerate(ids.tolist())}
    for user in users:
        if user.points is None:
            continue
        if others := sorted(user.points.keys() - places.keys()):
            raise ValueError(
                f"{user.flag} has {counted(len(others), 'id')} outside the {len(ids)} images of "
                f"this evaluation, such as {others[0]}; leave them out, or evaluate more images"
            )
        point_ids = sorted(user.points)
        outside: dict[int, float] = {}
        for start in range(0, len(point_ids), 64):
            part = point_ids[start : start + 64]
            points = np.stack([user.points[image] for image in part])
            clean = images[np.array([places[image] for image in part])]
            outside |= _outside(user.flag, points, clean, np.array(part), threat)
        _refuse_outside(user.flag, outside, len(point_ids), threat)


def _outside(
    flag: str, points: np.ndarray, images: np.ndarray, ids: np.ndarray, threat: Threat
) -> dict[int, float]:
    """Measure how far points lie outside the ball, by id; points inside are left out."""
    if points.shape[1:] != images.shape[1:]:
        remedy = "put channels last" if points.shape[1] in (1, 3) else "give points of that shape"
        raise ValueError(
            f"{flag}: images have shape {points.shape[1:]}, but the evaluation uses "
            f"{images.shape[1:]}; {remedy}"
        )
    nothing = np.ones((len(points), 1), np.float32)  # any logits
    _, norms = checks.verified(points, images, np.zeros(len(points), int), nothing, threat)
    far = norms > checks.most(threat.epsilon)
    return dict(zip(ids[far].tolist(), (norms[far] - threat.epsilon).tolist(), strict=True))


def _refuse_outside(flag: str, outside: dict[int, float], count: int, threat: Threat) -> None:
    if outside:
        worst = max(outside, key=lambda image: outside[image])
        raise ValueError(
            f"{flag}: {len(outside)} of {count} points are outside the {threat.norm} ball of "
            f"radius {threat.epsilon:.6g}, the one for image {worst} by {outside[worst]:.3g}; "
            "move them into the ball, or leave them out"
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
    """Return points f32[n,H,W,C] for images that `user` covers, all in [0, 1] and the ball."""
    if user.points is not None:
        return np.stack([user.points[image] for image in ids.tolist()])
    assert user.function is not None
    plain = partial(jax.jit(lambda network, points: network(points)), logits_fn)
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
