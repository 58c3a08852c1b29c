"""Write a bundle: what anyone needs to check an accuracy with one forward pass per image.

A bundle stores each adversarial image as its difference from the clean image, which is not stored.
The perturbation is rounded to a few levels on either side of 0 and scaled to the radius; `claims`
restores and checks this rounded image. If the network no longer misclassifies it, more levels are
used. In l0 the values are rounded away from 0, so the same pixels change. Corrupted images are not
stored at all: the verifier has the data set's files, or computes the images from the record's seed.
"""

import ast
import contextlib
import hashlib
import json
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxrobust.attacks.fixed_steps import is_cascade
from jaxrobust.evaluation.bundles import claims, claims_torch, contradictions, findings
from jaxrobust.evaluation.bundles.claims import Logits
from jaxrobust.evaluation.bundles.contradictions import BundleFacts, ImageRow
from jaxrobust.evaluation.engine import engine
from jaxrobust.evaluation.network import checks
from jaxrobust.evaluation.network.images import ImageSet
from jaxrobust.evaluation.network.user_attacks import ALONE
from jaxrobust.evaluation.records import checked
from jaxrobust.evaluation.records.record import AccuracyRecord
from jaxrobust.evaluation.records.verdicts import Verdicts
from jaxrobust.runtime.files import jsonl, whole
from jaxrobust.runtime.processes import hosts
from jaxrobust.runtime.text.progress import say
from jaxrobust.types import Threat

PROGRAM = "verify.py"
LEVELS = (1, 2, 4, 8, 32, 127)  # of a difference, on either side of 0, tried in this order
_PART_BYTES = 64 * 2**20  # maximum size of a file of differences
_ENCODING = (
    "images.jsonl has a line for each image: its place in the split, label, verdict ('' if it "
    "stands, 'clean' if misclassified without an attack, else the attack) and the sha256 of the "
    "clean image, f32[H,W,C] in [0, 1] (uint8 / 255), little-endian. If an attack fooled it, "
    "`bytes` of `file` from `offset` on hold the difference, compressed by zlib. With levels: int8 "
    "steps; the adversarial image is clip(clean + steps * step, 0, 1) in float32. With 0 levels: "
    "the differences of the float32 bit patterns, modulo 2^32, lowest bytes of all values first."
)
_CORRUPTED_ENCODING = (
    "images.jsonl has a line for each image: its place in the split, label, `right` (a digit for "
    "each of `corruptions`, in their order: 1 if the network classifies it correctly, else 0) and "
    "the sha256 of the image under all of these corruptions in this order, uint8[H,W,C] each. "
    "`clean` is the unchanged image, KIND-SEVERITY a common corruption."
)


def check(flags: Any, count: int) -> None:
    """Raise if no bundle can be written for these flags with `count` threats and image sizes."""
    if not flags.bundle:
        return
    if count > 1:
        raise ValueError(
            "--bundle supports one threat and image size; run once for each, with the same --out"
        )
    if flags.attack != ALONE and not is_cascade(flags.attack) and flags.corruptions is None:
        raise ValueError(
            f"--bundle needs adversarial images, which --attack={flags.attack} does not store; use "
            "--attack=apgd-ce or autoattack"
        )
    place = Path(flags.bundle)
    if place.exists() and not (place / claims.SUMS).is_file() and not _empty(place):
        raise ValueError(f"--bundle {place} exists but is not a bundle; name a new folder")


def recorded(evaluation: Any, subject: Any, place: Path) -> AccuracyRecord:
    """Record a threat and write its bundle in the first process; raise if `place` is taken."""
    number, question = evaluation.number(subject), evaluation.question
    if not question.noreplay:  # replay also accepts an equal record with another number
        hosts.together(lambda: jax.process_index() or check_place(place, number))
    record = evaluation.record(subject)
    more: Any = {}
    if question.users:  # all processes choose the number together
        more = {"ledger": evaluation.ledger(evaluation.begun(subject))}

    def write() -> None:
        if jax.process_index() == 0:
            images = evaluation.images
            logits = forward(evaluation.logits_of("float32"), images.shape[1:], question.batch)
            split = len(evaluation.source)
            of_record(place, record, evaluation.out, images, logits, split_images=split, **more)

    hosts.together(write)
    return record


def of_record(
    place: Path,
    record: AccuracyRecord,
    out: Path,
    images: ImageSet,
    logits: Logits,
    *,
    batch: int = 64,
    split_images: int | None = None,
    ledger: Path | None = None,
) -> None:
    """Write the bundle of an evaluation under one threat, unless it exists.

    `ledger` defaults to the file named after the evaluation's number.
    """
    if check_place(place, str(record.evaluation)):
        say(f"the bundle {place} already exists; nothing is written")
        return
    if record.fast:
        raise ValueError(
            f"the record {record.evaluation} comes from the fast version, whose verdicts are not "
            "AutoAttack's; complete the standard evaluation with --finish, and bundle that"
        )
    if not record.verdicts:
        raise ValueError(
            f"the record {record.evaluation} has no per-image verdicts, like records from older "
            "versions; evaluate again with --out DIR"
        )
    verdicts = checked.verdicts(record, out / "results.jsonl")
    points = _stored_points(ledger or out / f"ledger-{record.evaluation}.jsonl", verdicts)
    size = int(np.prod(images.shape[1:]))

    def point(place: int) -> np.ndarray:
        file, number = points[place]
        values = np.fromfile(file, np.float32, size, offset=number * 4 * size)
        if values.size < size:
            raise ValueError(f"{file} is truncated; for --bundle, evaluate again with --out DIR")
        return values.reshape(images.shape[1:])

    write(BundledEvaluation(record, verdicts, images, point), place, logits, batch, split_images)


class BundledEvaluation(NamedTuple):
    """An evaluation under one threat, of which there will be a bundle."""

    record: AccuracyRecord
    verdicts: Verdicts
    images: ImageSet
    point: Callable[[int], np.ndarray]  # place -> the image of an attack that fooled the network


def write(
    evaluated: BundledEvaluation, place: Path, logits: Logits, batch: int, split_images: int | None
) -> None:
    """Write a bundle, whose points `logits` confirms."""
    record, verdicts, images, _ = evaluated
    levels, unsure = dict.fromkeys((*LEVELS, 0), 0), 0

    def rows(part: Path) -> Iterator[ImageRow]:
        nonlocal unsure
        files = offset = 0
        for start in range(0, len(verdicts.labels), batch):
            places = np.arange(start, min(start + batch, len(verdicts.labels)))
            clean = images[places]
            coded = _coded_points(evaluated, places, clean, logits)
            for at, image in zip(places.tolist(), clean, strict=True):
                row: ImageRow = {
                    "image": int(verdicts.image_ids[at]),
                    "label": int(verdicts.labels[at]),
                    "verdict": str(verdicts.fooled_by[at]),
                    "sha256": claims.image_sha256(image),
                }
                if at in coded:
                    count, step, code, sure = coded[at]
                    levels[count] += 1
                    unsure += not sure
                    if offset and offset + len(code) > _PART_BYTES:
                        files, offset = files + 1, 0
                    name = f"differences-{files}.bin"
                    with (part / name).open("ab") as file:
                        file.write(code)
                    row |= {"levels": count, "step": step, "file": name}
                    row |= {"offset": offset, "bytes": len(code)}
                    offset += len(code)
                yield row

    with _written(place, "" if record.task else program()) as part:
        _write_rows(part, rows(part))
        about: BundleFacts = {
            "schema": claims.TASK_SCHEMA if record.task else claims.SCHEMA,
            "image": list(images.shape[1:]),
            "encoding": _ENCODING,
            "levels": {str(count): number for count, number in levels.items() if number},
            "near_the_boundary": unsure,  # images, by `claims.MARGIN`
            "record": record.to_json(),
            "split_images": split_images or len(images),
        }
        (part / claims.ABOUT).write_text(json.dumps(about, indent=1) + "\n")
    exact = f", {levels[0]} of them exact" if levels[0] else ""
    near = f"; {unsure} are misclassified by barely more than rounding error" if unsure else ""
    _announce(place, f"{sum(levels.values())} adversarial images{exact}", near)


def of_corruptions(
    place: Path,
    record: AccuracyRecord,
    images: Mapping[str, ImageSet],
    labels: np.ndarray,
    right: Mapping[str, np.ndarray],
    *,
    ids: np.ndarray,
    split_images: int,
    batch: int = 64,
) -> None:
    """Write the bundle of an evaluation under common corruptions, unless it exists.

    Args:
      images, right: the images and bool[N], whether the network classifies each correctly, by the
        name of the corruption, or `clean` if that was measured.
      labels, ids: i[N]; ids are the images' places in the split.
      split_images: number of images in the split.
    Raises:
      ValueError: the folder holds another bundle.
    """
    if check_place(place, str(record.evaluation)):
        say(f"the bundle {place} already exists; nothing is written")
        return
    about: BundleFacts = {
        "schema": contradictions.CORRUPTED_SCHEMA,
        "image": list(next(iter(images.values())).shape[1:]),
        "encoding": _CORRUPTED_ENCODING,
        "corruptions": list(images),
        "record": record.to_json(),
        "split_images": split_images,
    }
    marks = np.stack([right[name] for name in images], axis=1)

    def rows() -> Iterator[ImageRow]:
        for start in range(0, len(labels), batch):
            places = np.arange(start, min(start + batch, len(labels)))
            sums = [hashlib.sha256() for _ in places]
            for corrupted in images.values():
                for digest, image in zip(sums, corrupted[places], strict=True):
                    digest.update(claims.pixels(image))
            for at, digest in zip(places.tolist(), sums, strict=True):
                yield {
                    "image": int(ids[at]),
                    "label": int(labels[at]),
                    "sha256": digest.hexdigest(),
                    "right": "".join(str(int(mark)) for mark in marks[at]),
                }

    with _written(place, program()) as part:
        (part / claims.ABOUT).write_text(json.dumps(about, indent=1) + "\n")
        _write_rows(part, rows())
    _announce(place, f"answers for {len(labels):,} images under {len(images)} corruptions")


def _write_rows(part: Path, rows: Iterator[ImageRow]) -> None:
    with (part / claims.ROWS).open("w") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")


def _announce(place: Path, content: str, remark: str = "") -> None:
    size = sum(file.stat().st_size for file in place.iterdir())
    say(f"bundle {place}: {content}, {size / 2**20:.1f} MiB{remark}")


@contextlib.contextmanager
def _written(place: Path, text: str) -> Iterator[Path]:
    """Yield a folder for a bundle's files; add program and hashes, then rename it to `place`."""
    part = place.with_name(f".{place.name}.part")
    shutil.rmtree(part, ignore_errors=True)  # left by a killed process
    part.mkdir(parents=True)
    try:
        with whole.explained(place):
            yield part
            if text:
                (part / PROGRAM).write_text(text)
            names = sorted(file.name for file in part.iterdir())
            sums = [f"{claims.file_sha256(part / name)}  {name}\n" for name in names]
            (part / claims.SUMS).write_text("".join(sums))
        if place.exists():
            place.rmdir()  # an empty folder
        part.rename(place)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def check_place(place: Path, evaluation: str, *, of_task: bool = False) -> bool:
    """Tell whether a folder holds the evaluation's bundle; raise if it holds a different bundle."""
    if not place.exists() or _empty(place):
        return False
    there = claims.read(place, of_task=of_task).record["evaluation"]
    if there != evaluation:
        raise ValueError(
            f"{place} holds the bundle of evaluation {there}, not of {evaluation}; name "
            "another folder"
        )
    return True


def _empty(place: Path) -> bool:
    return place.is_dir() and not any(place.iterdir())


def forward(
    logits_fn: Any, image: tuple[int, ...], batch: int | None = None, *, operand: str = ""
) -> Logits:
    """Compile a network, at the precision of verdicts, into one program for f32[n,H,W,C], any n."""
    runner = engine.make(logits_fn, slots=batch, image_size=max(image[:2]), operand=operand)
    with jax.set_mesh(runner.mesh):
        runner = engine.trace(runner, image)

    def logits(images: np.ndarray, ids: Sequence[int]) -> np.ndarray:
        with jax.set_mesh(runner.mesh):
            return engine.forward(runner, images, np.asarray(ids, np.uint32))

    return logits


class Coded(NamedTuple):
    """The difference of an adversarial image from the clean one."""

    levels: int  # 0: it is exact
    step: float
    code: bytes
    sure: bool  # misclassified by at least `claims.MARGIN`


def encoded(
    adversarial: np.ndarray,
    images: np.ndarray,
    labels: np.ndarray,
    ids: np.ndarray,
    logits: Logits,
    threat: Threat,
) -> list[Coded]:
    """Encode the differences of n images, each with the fewest levels that keep it adversarial.

    Prefers the fewest levels at which the margin of error is `claims.MARGIN`; failing that, the
    fewest at which the network errs at all, else the exact difference. Images are f32[n,H,W,C].
    """
    best: list[Coded | None] = [None] * len(images)
    for levels in (*LEVELS, 0):
        todo = [i for i, coded in enumerate(best) if coded is None or not coded.sure]
        if not todo:
            break
        tried = [_coded(adversarial[i], images[i], levels, threat) for i in todo]
        points = np.stack(
            [
                claims.restored(code, images[i], levels, step)
                for i, (step, code) in zip(todo, tried, strict=True)
            ]
        )
        answers = logits(points, ids[todo].tolist())
        holds, _ = checks.verified(points, images[todo], labels[todo], answers, threat)
        sure = holds & (claims.margin(answers, labels[todo]) < -claims.MARGIN)
        for i, step_and_code, ok, firm in zip(todo, tried, holds, sure, strict=True):
            if firm or (best[i] is None and (ok or not levels)):
                best[i] = Coded(levels, *step_and_code, sure=bool(firm))
    return [coded for coded in best if coded is not None]


def _coded(
    adversarial: np.ndarray, image: np.ndarray, levels: int, threat: Threat
) -> tuple[float, bytes]:
    """Return the length of a step and the compressed steps; with 0 levels the exact difference."""
    if not levels:
        bits = [np.ascontiguousarray(a, "<f4").view("<u4") for a in (adversarial, image)]
        planes = (bits[0] - bits[1]).ravel().view(np.uint8).reshape(-1, 4).T
        return 0.0, zlib.compress(np.ascontiguousarray(planes).tobytes(), 6)
    delta = adversarial.astype(np.float64) - image.astype(np.float64)
    if threat.norm == "l0":
        steps, step = np.sign(delta) * np.ceil(np.abs(delta) * levels), 1 / levels
    else:
        largest = float(np.abs(delta).max()) or 1.0
        steps = np.rint(delta * (levels / largest))
        step = threat.epsilon / (checks.length(steps, threat.norm) or 1.0)
    code = zlib.compress(np.ascontiguousarray(steps.astype(np.int8)).tobytes(), 6)
    return float(np.float32(step)), code


def _coded_points(
    evaluated: BundledEvaluation, places: np.ndarray, clean: np.ndarray, logits: Logits
) -> dict[int, Coded]:
    """Encode the adversarial images at `places`; `clean` holds the clean images there."""
    record, verdicts, _, point = evaluated
    hit = np.flatnonzero(verdicts.clean[places] & ~verdicts.robust[places])
    fooled = places[hit]
    adversarial = np.array(clean[hit])
    for at, place in enumerate(fooled.tolist()):
        adversarial[at] = point(place)
    labels, ids = verdicts.labels[fooled], verdicts.image_ids[fooled]
    differences = encoded(adversarial, clean[hit], labels, ids, logits, record.threats[0])
    return dict(zip(fooled.tolist(), differences, strict=True))


def _stored_points(ledger: Path, verdicts: Verdicts) -> dict[int, tuple[Path, int]]:
    """Locate the adversarial images of an evaluation: place -> (file, index of the image in it)."""
    wanted = {
        (int(verdicts.image_ids[place]), str(verdicts.fooled_by[place])): place
        for place in np.flatnonzero(verdicts.clean & ~verdicts.robust).tolist()
    }
    points = {}
    for file in [ledger, *sorted(ledger.parent.glob(f"{ledger.stem}.process-*.jsonl"))]:
        for row in jsonl.read(file):
            key = (row.get("image"), row.get("attack"))
            if row.get("fooled") and key in wanted:
                points[wanted[key]] = (file.with_suffix(".images"), int(row["stored"]))
    missing = len(wanted) - len(points)
    if missing or not all(file.is_file() for file, _ in points.values()):
        raise ValueError(
            f"{ledger} lacks the adversarial images for {missing} verdicts, which --bundle needs; "
            "evaluate again with --out DIR"
        )
    return points


def program() -> str:
    """Return the text of each bundle's program: `claims_torch` and the modules it needs."""
    doc, last = _parted(claims_torch)
    needed = {"Contradictions": contradictions, "Claims": claims, "Findings": findings}
    parts = [
        f"# --- {head} ---\n\n{_parted(module)[1].strip()}\n" for head, module in needed.items()
    ]
    return "\n\n".join([doc, *parts, f"# --- With PyTorch ---\n{last}"])


def _parted(module: ModuleType) -> tuple[str, str]:
    """Split a module's text into its docstring and the rest, without imports of `jaxrobust`."""
    text = Path(module.__file__ or "").read_text()
    tree, rows = ast.parse(text), text.splitlines(keepends=True)
    for node in reversed(tree.body):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("jaxrobust"):
            del rows[node.lineno - 1 : node.end_lineno]
    end = tree.body[0].end_lineno or 0
    return "".join(rows[:end]), "".join(rows[end:])
