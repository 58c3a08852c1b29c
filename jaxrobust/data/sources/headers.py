"""Reads image headers: whether all images share a shape, and what decoding changes in them.

Pixels are not read. Images of several sizes show up in the first few headers, so photographs cost
almost nothing. If these agree, all headers are read once and the answer is kept on disk.
"""

import contextlib
import hashlib
import io
import itertools
import json
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
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

_SAMPLE = 32  # images, spread over the source, to look at first
_DECODED = 8  # how many of these to decode, unless a bright one or a photograph comes earlier
_LARGE = 2**20  # pixels
_CHUNK = 256
_REMEMBERED = 1000  # below this many images, looking again costs less than a file
_THREADS = 16  # for slow disks and networks, which answer many reads at once
_ORIENTATION = 0x0112  # of EXIF
_ALPHA = ("RGBA", "LA", "PA", "La", "RGBa")
_PLAIN = ("1", "L", "P", "RGB", *_ALPHA)
_TOLD = {
    "alpha": "transparency, which is ignored as in torchvision, so hidden colors become visible",
    "16 bit": "16 bits per channel, of which only the upper 8 are read",
    "turned": "an EXIF orientation, which is not applied, as in torchvision",
    "animated": "several frames or pages, of which only the first is read",
}

Heads = Callable[[Sequence[int]], Iterable[Any]]  # places -> image files or bytes


class HeaderFacts(NamedTuple):
    """`image_shape` (H, W, channels) if all images have it; `notes` are sentences for people."""

    image_shape: tuple[int, int, int] | None
    channels: int
    notes: tuple[str, ...]


class _Headers:
    """The headers read so far: sizes and kinds -> the places of the images that have them."""

    def __init__(self) -> None:
        self.sizes: dict[tuple[int, int], list[int]] = defaultdict(list)
        self.kinds: dict[str, list[int]] = defaultdict(list)
        self.count = 0
        self.brightest: list[int] = []  # brightest pixel of each decoded image
        self.large = False  # whether one of these is large

    def add(self, other: "_Headers") -> None:
        self.count += other.count
        for old, new in ((self.sizes, other.sizes), (self.kinds, other.kinds)):
            for key, places in new.items():
                old[key] += places  # type: ignore[index]


def look(
    heads: Heads,
    size: int,
    where: str,
    describe: Callable[[int], str],
    identity: Callable[[], str],
    *,
    channels: int | None = None,
    declared: bool = False,
    several_grey: bool = False,
) -> HeaderFacts | None:
    """Read the headers of `size` images; None if none of those read belongs to an image.

    Args:
      heads: places -> image files or bytes; called by several threads.
      where: the source, for messages.
      describe: place -> how a message refers to that image.
      identity: a text that changes with the images; the answer is stored under it.
      channels: number of channels, if fixed; default: 1 if all are gray, else 3.
      declared: whether the source itself declares the size, so that a few images are enough.
      several_grey: whether gray images of several sizes also have one channel; else 3.
    Raises:
      DataError: images with more than 8 bits of gray, or with floats.
    """
    places = np.unique(np.linspace(0, size - 1, min(size, _SAMPLE)).astype(int)).tolist()
    started, computed = time.perf_counter(), time.thread_time()
    looked = _of(places, heads, decode=True)
    waited = time.perf_counter() - started > 2 * (time.thread_time() - computed)
    if not looked.count:
        return None

    def is_settled() -> bool:
        is_colour = bool(channels) or not several_grey or "colour" in looked.kinds
        return len(looked.sizes) > 1 and is_colour

    def facts() -> HeaderFacts:
        return _facts(looked, where, describe, channels, several_grey)

    first = facts()
    if declared or len(places) == size or is_settled():
        return first
    sizes = {key: at[0] for key, at in looked.sizes.items()}
    text = f"{where} {identity()} {sizes} {channels} {several_grey}"
    path = subsets.index_cache() / f"headers-{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"
    try:
        shape, count, notes = json.loads(path.read_text())
        return HeaderFacts(tuple(shape) if shape else None, count, tuple(notes))
    except (OSError, ValueError, TypeError):
        pass  # missing or damaged
    others = np.delete(np.arange(size), places)
    chunks = [others[start : start + _CHUNK].tolist() for start in range(0, len(others), _CHUNK)]
    # Parsing holds the GIL: on a fast disk, threads take three times as long.
    with ThreadPoolExecutor(_THREADS if waited else 1) as pool:
        # As many chunks as there are threads; a second size then stops the loop.
        groups = (chunks[start : start + _THREADS] for start in range(0, len(chunks), _THREADS))
        results = (pool.map(lambda chunk: _of(chunk, heads), group) for group in groups)
        parts = itertools.chain.from_iterable(results)
        for part in tqdm(parts, f"sizes of {where} (once)", len(chunks), delay=3, leave=False):
            looked.add(part)
            if is_settled():
                break
    found_facts = facts()
    if size >= _REMEMBERED:
        with contextlib.suppress(OSError):  # the next process reads the headers again
            path.parent.mkdir(parents=True, exist_ok=True)
            with whole.writing(path) as file:
                file.write_text(json.dumps(found_facts))
    return found_facts


def _of(places: Sequence[int], heads: Heads, decode: bool = False) -> _Headers:
    looked = _Headers()
    for place, head in zip(places, _readable(heads, places), strict=True):
        try:
            with Image.open(head if isinstance(head, str) else io.BytesIO(head)) as image:
                size = (image.height, image.width)
                kinds = list(_kinds(image))
                is_bright = max(looked.brightest, default=0) > plausibility.DARK
                is_enough = is_bright or looked.large or len(looked.brightest) >= _DECODED
                if decode and "deep" not in kinds and not is_enough:
                    with contextlib.suppress(Exception):  # damaged pixels
                        looked.brightest.append(int(decoding.to_pixels(image, "RGB").max()))
                    looked.large |= math.prod(size) > _LARGE
        except Exception:  # a damaged image is reported when it is used
            continue
        looked.count += 1
        looked.sizes[size].append(place)
        for kind in kinds:
            looked.kinds[kind].append(place)
    return looked


def _readable(heads: Heads, places: Sequence[int]) -> Iterable[Any]:
    """Read what is readable; an unreadable record is empty, and is reported when it is used."""
    try:
        return heads(places)
    except DataError:
        if len(places) == 1:
            return [b""]
        return itertools.chain.from_iterable(_readable(heads, [place]) for place in places)


def _kinds(image: Image.Image) -> Iterator[str]:
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
    described = "exif" in image.info or image.format == "TIFF"  # otherwise `getexif` decodes a PNG
    if described and image.getexif().get(_ORIENTATION, 1) not in (0, 1):
        yield "turned"
    if getattr(image, "is_animated", False):
        yield "animated"


def _facts(
    looked: _Headers,
    where: str,
    describe: Callable[[int], str],
    channels: int | None,
    several_grey: bool,
) -> HeaderFacts:
    kinds, count = looked.kinds, looked.count
    if deep := kinds.get("deep"):
        raise DataError(
            f"{where}: {len(deep)} of {count} sampled images have 16-bit or float gray values, "
            f"which would be clipped to 8 bits ({describe(deep[0])}); save them with 8 bits, such "
            "as np.round(x / 257).astype('uint8') for 16-bit images"
        )
    decoded = len(looked.brightest)
    notes = plausibility.of_pixels(max(looked.brightest, default=255), decoded, where)
    for kind in sorted(kinds.keys() - {"grey", "colour"}):
        words = _TOLD.get(kind, f"{kind} colors, which Pillow converts to RGB")
        of = f"{len(kinds[kind])} of {count} inspected images"
        notes += (f"{where}: {of}, such as {describe(kinds[kind][0])}, have {words}",)
    same = len(looked.sizes) == 1
    if not same and count > _SAMPLE:
        (usual, _), (other, places) = list(looked.sizes.items())[:2]
        sizes = f"{other[1]}x{other[0]} pixels, but the images before it have {usual[1]}x{usual[0]}"
        odd = describe(places[0])
        notes += (f"{where}: {odd} has {sizes}, so the image size counts as variable",)
    is_grey = "colour" not in kinds and (same or several_grey)
    channels = channels or (1 if is_grey else 3)
    return HeaderFacts((*next(iter(looked.sizes)), channels) if same else None, channels, notes)
