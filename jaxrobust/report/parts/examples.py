"""The hardest and the easiest images of an evaluation, with their adversarial versions."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup
from PIL import Image

from jaxrobust.data import Prepared
from jaxrobust.data.sources import registry
from jaxrobust.evaluation.records.record import AccuracyRecord, AttackSettings
from jaxrobust.report import markup
from jaxrobust.report.gathered import ReportedEvaluation, section
from jaxrobust.report.parts import sentences
from jaxrobust.runtime.files import jsonl
from jaxrobust.types import Threat

_EACH = 4  # number of easiest and of hardest images
_SIDE = 96  # maximum side of a picture in pixels; larger images are reduced
RULE = (
    "Easiest: fooled by the first attack that fools any, in the fewest iterations. Hardest: fooled "
    "only by the last attack, in the most iterations. Ties go to the smaller image number. From "
    "left to right: the image, its adversarial version, and the perturbation, amplified until its "
    "largest change is full black or white around gray."
)


class Fooled(NamedTuple):
    """An adversarial image on disk."""

    image: int  # its place in the split
    attack: str
    iterations: int
    file: Path
    stored: int  # its place in the file


class Album:
    """Pictures for a page, up to a limit on its size."""

    def __init__(self, budget: int = 1_200_000) -> None:
        self._left = budget

    def part(self, one: ReportedEvaluation) -> Markup | None:
        """Return the pictures of an evaluation, or a sentence on why they are missing."""
        if self._left <= 0:
            return markup.parts.note(
                "Images are not shown here, because the page would be too large. To see them, "
                "report this evaluation alone."
            )
        try:
            shown = _part(one)
        except (ValueError, OSError, ImportError) as error:
            return markup.parts.note(f"The images cannot be shown: {error}")
        self._left -= len(shown or "")
        return shown


def _part(one: ReportedEvaluation) -> Markup | None:
    searches = searched(one)
    if one.verdicts is None or not searches:
        return None
    shape: tuple[int, ...] = ()
    points, attacks = [], []
    by = dict(zip(one.verdicts.image_ids.tolist(), one.verdicts.fooled_by.tolist(), strict=True))
    for search in searches:
        shape, images = fooled(search.ledger)
        prefixed = [f._replace(attack=f"{search.prefix}{f.attack}") for f in images]
        # In a union, an image belongs to the first threat that fools it.
        points += [f for f in prefixed if not search.prefix or by.get(f.image) == f.attack]
        attacks += [f"{search.prefix}{name}" for name in search.attacks]
    if not points:
        return markup.parts.note("No attack fooled an image, so none is shown.")
    easy, hard = choose(points, attacks)
    clean = _images(one, shape)
    labels = dict(zip(one.verdicts.image_ids.tolist(), one.verdicts.labels.tolist(), strict=True))

    def pictures(title: str, chosen: Sequence[Fooled]) -> Markup:
        labelled = [(f, one.class_name(labels.get(f.image, -1))) for f in chosen]
        shown = [_pictures(fooling, clean, shape, label) for fooling, label in labelled]
        return markup.parts.images(title, shown)

    small = f" Pictures are reduced to {_SIDE} pixels." if max(shape[:2]) > _SIDE else ""
    union = " The attacks of one threat come before those of the next." if searches[1:] else ""
    inside = pictures("The easiest images to fool", easy)
    inside += pictures("The hardest images that were fooled", hard)
    return Markup("<section>{}{}</section>").format(inside, markup.parts.note(RULE + union + small))


class Search(NamedTuple):
    """The search under one threat of an evaluation."""

    prefix: str  # of its attacks' names in the verdicts
    ledger: Path
    attacks: list[str]


def searched(one: ReportedEvaluation) -> list[Search]:
    """Find the adversarial images of an evaluation or its members, if they are on disk."""
    record, folder = one.record, one.file.parent
    number, attacks = record.evaluation, record.attacks
    searches = []

    def asked(record: AccuracyRecord, attacks: list[AttackSettings]) -> tuple[Any, ...]:
        images = (record.dataset, record.split, record.image_ids, record.preprocessing)
        return (record.weights_sha256, *images, record.seed, record.model, attacks)

    if record.worst_case:
        for count, part in enumerate(record.worst_case):
            ledger = folder / f"ledger-{part['evaluation'] or f'{number}-{count}'}.jsonl"
            searches.append(Search(f"{Threat.of(part)}: ", ledger, part["attacks"]))
    elif record.method != sentences.UNION:
        searches = [Search("", folder / f"ledger-{number}.jsonl", [a["name"] for a in attacks])]
    else:
        for count, threat in enumerate(dict.fromkeys(record.threats)):
            member = [a for a, of in zip(attacks, record.threats, strict=True) if of == threat]
            ledger = folder / f"ledger-{number}-{count}.jsonl"
            if not ledger.is_file():  # use a separate evaluation of this threat in the folder
                rows = map(AccuracyRecord.from_json, jsonl.read(one.file))
                same = [r for r in rows if asked(r, r.attacks) == asked(record, member)]
                ledger = folder / f"ledger-{same[-1].evaluation if same else None}.jsonl"
            searches.append(Search(f"{threat}: ", ledger, [attack["name"] for attack in member]))
    return [search for search in searches if search.ledger.is_file()]


def fooled(ledger: Path) -> tuple[tuple[int, ...], list[Fooled]]:
    """Return the shape (H, W, C) of the images of a ledger, and the fooled ones."""
    shape: tuple[int, ...] = ()
    points = []
    others = sorted(ledger.parent.glob(f"{ledger.stem}.process-*.jsonl"))
    for file in (ledger, *others):
        rows = jsonl.read(file)
        shape = shape or tuple((rows[0].get("identity") or {}).get("image") or () if rows else ())
        for row in rows[1:]:
            if row.get("fooled") and "stored" in row:
                fields = int(row["image"]), str(row["attack"]), int(row.get("iterations") or 0)
                points.append(Fooled(*fields, file.with_suffix(".images"), int(row["stored"])))
    if len(shape) != 3:
        raise ValueError(f"{ledger} does not store the size of its images; evaluate again")
    return shape, points


def choose(points: Sequence[Fooled], attacks: Sequence[str]) -> tuple[list[Fooled], list[Fooled]]:
    """Return the easiest and the hardest points by `RULE`, without overlap."""
    again = [f"{name} (full)" for name in attacks]  # after a search in lower precision
    order = {name: at for at, name in enumerate([*attacks, *again])}

    def effort(one: Fooled) -> tuple[int, int]:
        return order.get(one.attack, -1), one.iterations  # replayed points are the easiest

    most = min(_EACH, (len(points) + 1) // 2)
    easiest = sorted(points, key=lambda f: (effort(f), f.image))[:most]
    hardest = sorted(points, key=lambda f: (*(-e for e in effort(f)), f.image))
    taken = {f.image for f in easiest}
    return easiest, [f for f in hardest if f.image not in taken][:_EACH]


def _images(one: ReportedEvaluation, shape: tuple[int, ...]) -> Any:
    record, data = one.record, section(one.config, "data")
    data = data if data.get("name") == record.dataset else {}
    settings = {"data_dir": data.get("dir"), "classes": data.get("classes")}
    source = registry.open_source(str(record.dataset), str(record.split), **settings)
    places = range(int(one.verdicts.image_ids.max()) + 1 if one.verdicts is not None else 0)
    source, preprocessing = source.for_channels(shape[-1]), str(record.preprocessing)
    return Prepared(source, image_size=shape[0], preprocessing=preprocessing, places=places)


def _pictures(
    fooling: Fooled, clean: Any, shape: tuple[int, ...], label: str
) -> tuple[str, dict[str, str]]:
    """Return a caption, and the pictures by their alternative texts."""
    image = clean[[fooling.image]][0]
    count = int(np.prod(shape))
    point = np.fromfile(fooling.file, np.float32, count, offset=4 * count * fooling.stored)
    if len(point) != count:
        raise ValueError(f"{fooling.file} is truncated; copy it again")
    added = point.reshape(shape) - image
    largest = float(np.abs(added).max())
    grey = 0.5 + added / (2 * largest) if largest else np.full(shape, 0.5)
    name = f"image {fooling.image}, {label}"
    shown = {
        f"{name}, original": _uri(image, smooth=True),
        f"{name}, adversarial": _uri(point.reshape(shape), smooth=True),
        f"perturbation of {name}, amplified": _uri(grey, smooth=False),
    }
    times = f", amplified {0.5 / largest:.3g} times" if largest else ""
    search = f"{fooling.attack}, {fooling.iterations} iterations{times}"
    return f"Image {fooling.image}, {label}: {search}", shown


def _uri(image: np.ndarray, *, smooth: bool) -> str:
    pixels = np.round(255 * np.clip(image, 0, 1)).astype(np.uint8)
    drawn = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels[..., :3])
    if max(drawn.size) > _SIDE:
        method = Image.Resampling.BOX if smooth else Image.Resampling.NEAREST
        scale = _SIDE / max(drawn.size)
        drawn = drawn.resize((round(drawn.width * scale), round(drawn.height * scale)), method)
    png = io.BytesIO()
    drawn.save(png, "png", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"
