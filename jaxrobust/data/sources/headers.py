"""What the headers of images say: whether all have one shape, and what decoding changes in them.

Pixels are not read. Images of several sizes show in the first few that are looked at, so that
photographs cost next to nothing; of one size all are, once, and the answer is kept on disk.
"""

import contextlib
import dataclasses
import hashlib
import io
import itertools
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from jaxrobust.data.source import DataError
from jaxrobust.data.sources import plausibility
from jaxrobust.data.splits import subsets
from jaxrobust.data.transforms import decoding
from jaxrobust.runtime.files import whole

_SAMPLE = 32  # images, spread over the source, that are looked at first
_DECODED = 8  # of these, unless a bright one or a photograph comes earlier
_LARGE = 2**20  # pixels
_CHUNK = 256
_REMEMBERED = 1000  # images, below which looking again costs less than a file
_THREADS = 16  # where a disk or a network is slow, which answers many reads at once
_ORIENTATION = 0x0112  # of EXIF
_ALPHA = ("RGBA", "LA", "PA", "La", "RGBa")
_PLAIN = ("1", "L", "P", "RGB", *_ALPHA)
_TOLD = {
    "alpha": "transparency, which is left out, as torchvision does: hidden colours count",
    "16 bit": "16 bits a channel, of which the upper 8 are read",
    "turned": "an EXIF orientation, which is not applied, as in torchvision: they lie as stored",
    "animated": "several frames or pages, of which the first is read",
}


class HeaderFacts(NamedTuple):
    """`image_shape` (H, W, channels) if all images have it; `notes` are sentences for people."""

    image_shape: tuple[int, int, int] | None
    channels: int
    notes: tuple[str, ...]


@dataclasses.dataclass
class _Found:
    sizes: dict[tuple[int, int], int] = dataclasses.field(default_factory=dict)  # -> first image
    kinds: Counter[str] = dataclasses.field(default_factory=Counter)
    first: dict[str, int] = dataclasses.field(default_factory=dict)  # kind -> first image
    brightest: list[int] = dataclasses.field(default_factory=list)  # pixel of an image
    large: bool = False  # whether a decoded one is

    def add(self, other: "_Found") -> None:
        self.kinds += other.kinds
        self.sizes |= {size: at for size, at in other.sizes.items() if size not in self.sizes}
        self.first |= {kind: at for kind, at in other.first.items() if kind not in self.first}

    @property
    def looked_at(self) -> int:
        return self.kinds["grey"] + self.kinds["colour"]


def look(
    heads: Callable[[Sequence[int]], Iterable[Any]],
    size: int,
    where: str,
    describe: Callable[[int], str],
    identity: Callable[[], str],
    *,
    channels: int | None = None,
    declared: bool = False,
    several_grey: bool = False,
) -> HeaderFacts | None:
    """Look at the headers of `size` images; None where none of those looked at is an image.

    Args:
      heads: places -> the images' files or bytes; called by several threads.
      where: the source, for messages.
      describe: a place -> the words for that image.
      identity: the text that changes when the images do, under which the answer is kept.
      channels: those that images have anyway; default: 1 if all are grey, else 3.
      declared: whether the source says itself which size they have, so that a few are enough.
      several_grey: whether grey images of several sizes have one channel too; else 3.
    Raises:
      DataError: images with more than 8 bits of grey, or with floats.
    """
    places = np.unique(np.linspace(0, size - 1, min(size, _SAMPLE)).astype(int)).tolist()
    started, computed = time.perf_counter(), time.thread_time()
    found = _of(places, heads, decode=True)
    waited = time.perf_counter() - started > 2 * (time.thread_time() - computed)
    if not found.looked_at:
        return None
    _refuse_deep(found, where, describe)
    brightest, decoded = max(found.brightest, default=255), len(found.brightest)
    dark = plausibility.of_pixels(brightest, decoded, where)

    def settled(found: _Found) -> bool:
        colour = bool(channels) or not several_grey or bool(found.kinds["colour"])
        return len(found.sizes) > 1 and colour

    if declared or len(places) == size or settled(found):
        return _facts(found, where, describe, channels, several_grey, dark)
    text = f"{where} {identity()} {found.sizes} {channels} {several_grey}"
    path = subsets.index_cache() / f"headers-{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"
    try:
        shape, count, notes = json.loads(path.read_text())
        return HeaderFacts(tuple(shape) if shape else None, count, tuple(notes))
    except (OSError, ValueError, TypeError):
        pass  # not there yet, or damaged
    rest = np.delete(np.arange(size), places)
    chunks = [rest[start : start + _CHUNK].tolist() for start in range(0, len(rest), _CHUNK)]
    # Parsing holds Python's lock, so that threads take three times as long where a disk is fast.
    with ThreadPoolExecutor(_THREADS if waited else 1) as pool:
        results = (pool.map(lambda own: _of(own, heads), part) for part in _batched(chunks))
        every = itertools.chain.from_iterable(results)
        for other in tqdm(every, f"sizes of {where}, once", len(chunks), delay=3, leave=False):
            found.add(other)
            if settled(found):
                break
    _refuse_deep(found, where, describe)
    facts = _facts(found, where, describe, channels, several_grey, dark)
    if size >= _REMEMBERED:
        _remember(path, facts)
    return facts


def _batched(chunks: Sequence[list[int]]) -> Iterable[Sequence[list[int]]]:
    """Yield so many chunks as threads take at once, which another size then stops."""
    return (chunks[start : start + _THREADS] for start in range(0, len(chunks), _THREADS))


def _remember(path: Any, facts: HeaderFacts) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole.writing(path) as part:
            part.write_text(json.dumps(facts))
    except OSError:
        pass  # the next process looks again


def _of(
    places: Sequence[int], heads: Callable[[Sequence[int]], Iterable[Any]], decode: bool = False
) -> _Found:
    found = _Found()
    for place, head in zip(places, _whole(heads, places), strict=True):
        try:
            with Image.open(head if isinstance(head, str) else io.BytesIO(head)) as image:
                size = (image.height, image.width)
                kinds = list(_kinds(image))
                if decode and "deep" not in kinds and _undecided(found):
                    with contextlib.suppress(Exception):  # pixels that are damaged
                        found.brightest.append(int(decoding.to_pixels(image, "RGB").max()))
                    found.large |= math.prod(size) > _LARGE
        except Exception:  # a damaged image, which is named where it is used
            continue
        found.sizes.setdefault(size, place)
        for kind in kinds:
            found.kinds[kind] += 1
            found.first.setdefault(kind, place)
    return found


def _undecided(found: _Found) -> bool:
    bright = max(found.brightest, default=0) > plausibility.DARK
    return not bright and not found.large and len(found.brightest) < _DECODED


def _whole(heads: Callable[[Sequence[int]], Iterable[Any]], places: Sequence[int]) -> Iterable[Any]:
    """Read what can be read; a record that cannot is empty, and is named where it is used."""
    try:
        return heads(places)
    except DataError:
        one_by_one = ([place] for place in places)
        return [b""] if len(places) == 1 else [h for p in one_by_one for h in _whole(heads, p)]


def _kinds(image: Image.Image) -> Iterable[str]:
    mode = image.mode
    yield "grey" if mode in ("1", "L") else "colour"
    if decoding.is_deep(mode):
        yield "deep"
        return
    if mode not in _PLAIN:
        yield mode
    if mode in _ALPHA or "transparency" in image.info:
        yield "alpha"
    stored = getattr(image, "tile", ()) if image.format in ("PNG", "TIFF") else ()
    if mode not in ("1", "L") and "16" in str([tile[3] for tile in stored]):
        yield "16 bit"
    described = "exif" in image.info or image.format == "TIFF"  # else `getexif` decodes a PNG
    if described and image.getexif().get(_ORIENTATION, 1) not in (0, 1):
        yield "turned"
    if getattr(image, "is_animated", False):
        yield "animated"


def _refuse_deep(found: _Found, where: str, describe: Callable[[int], str]) -> None:
    if number := found.kinds["deep"]:
        raise DataError(
            f"{where}: {number} of {found.looked_at} images looked at have grey values of 16 bits "
            f"or floats, which reading as 8 bits would clip ({describe(found.first['deep'])}); "
            "write them with 8 bits, such as np.round(x / 257).astype('uint8') of 16 bits"
        )


def _facts(
    found: _Found,
    where: str,
    describe: Callable[[int], str],
    channels: int | None,
    several_grey: bool,
    notes: tuple[str, ...],
) -> HeaderFacts:
    same = len(found.sizes) == 1
    grey = not found.kinds["colour"] and (same or several_grey)
    channels = channels or (1 if grey else 3)
    for kind, number in sorted(found.kinds.items()):
        if kind not in ("grey", "colour"):
            told = _TOLD.get(kind, f"the colours of {kind}, which Pillow converts to RGB")
            of = f"{number} of {found.looked_at} images looked at"
            notes += (f"{where}: {of} have {told}, such as {describe(found.first[kind])}",)
    if not same and found.looked_at > _SAMPLE:
        (usual, _), (other, place) = list(found.sizes.items())[:2]
        sizes = f"{other[1]}x{other[0]} pixels, the images before it {usual[1]}x{usual[0]}"
        which = describe(place)
        notes += (f"{where}: {which} has {sizes}, so that all count as of several sizes",)
    ((height, width),) = found.sizes if same else ((0, 0),)
    return HeaderFacts((height, width, channels) if same else None, channels, notes)
