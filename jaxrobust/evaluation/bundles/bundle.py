"""Write a bundle: what anyone needs to check a robust accuracy with one forward pass an image.

The adversarial images that an evaluation keeps are stored as differences from the clean ones, which
are not stored. A difference is rounded to few levels and scaled to the radius wherever the network
misclassifies what comes out; `claims` restores and checks just that.
"""

import ast
import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

import jax
import numpy as np

from jaxrobust.attacks.fixed_steps import is_cascade
from jaxrobust.evaluation.bundles import (
    claims,
    claims_corrupted,
    claims_torch,
    contradictions,
    contradictions_corrupted,
)
from jaxrobust.evaluation.bundles.claims import Logits
from jaxrobust.evaluation.bundles.contradictions import BundleFacts, ImageRow
from jaxrobust.evaluation.bundles.differences import LEVELS, Coded, encoded
from jaxrobust.evaluation.engine import engine
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
_PART_BYTES = 64 * 2**20  # of a file of differences, after which the next begins
_ENCODING = (
    "images.jsonl has a line for each image: its place in the split, label, verdict ('': it "
    "stands, 'clean': misclassified as it is, else the attack) and the sha256 of the clean image, "
    "f32[H,W,C] in [0, 1] (uint8 / 255), little-endian. Of one that an attack fooled, `bytes` of "
    "`file` from `offset` on are the difference, compressed by zlib. With levels: int8 steps; the "
    "adversarial image is clip(clean + steps * step, 0, 1) in float32. With 0 levels: what the bit "
    "patterns of the float32 values differ by, modulo 2^32, the lowest bytes of all values first."
)


def check(given: Any, count: int) -> None:
    """Refuse flags of `count` threats and image sizes that no bundle can be made of."""
    if not given.bundle:
        return
    if count > 1:
        raise ValueError(
            "--bundle is of one threat at one image size; make one for each, from the same --out"
        )
    searched = given.attack == ALONE or is_cascade(given.attack)
    if not searched and given.corruptions is None:
        raise ValueError(
            f"--bundle needs adversarial images, which --attack={given.attack} does not keep; "
            "take --attack=apgd-ce or autoattack"
        )
    place = Path(given.bundle)
    if place.exists() and not (place / claims.SUMS).is_file() and not _empty(place):
        raise ValueError(f"--bundle {place} is there and is no bundle; name a new folder")


def recorded(evaluation: Any, subject: Any, place: Path) -> AccuracyRecord:
    """Record a ball, and write its bundle in the first process; refuse a `place` that is taken."""
    number, question = evaluation.number(subject), evaluation.question
    if not question.noreplay:  # which takes an equal record of another number too
        hosts.together(lambda: jax.process_index() or check_place(place, number))
    record = evaluation.record(subject)

    def write() -> None:
        if jax.process_index() == 0:
            images = evaluation.images
            logits = forward(evaluation.logits_of("float32"), images.shape[1:], question.batch)
            split = len(evaluation.source)
            more: Any = {"split_images": split}
            if question.users:
                more["ledger"] = evaluation.ledger(evaluation.begun(subject))
            of_record(place, record, evaluation.out, images, logits, **more)

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
    """Write the bundle of an evaluation under one threat, unless it is there.

    `ledger` is that of the evaluation's number by default.
    """
    if check_place(place, str(record.evaluation)):
        say(f"the bundle {place} is there already; nothing is written")
        return
    if record.fast:
        raise ValueError(
            f"the record {record.evaluation} is of the fast version, whose verdicts are not "
            "AutoAttack's; make the standard evaluation of it by --finish, and a bundle of that"
        )
    if not record.verdicts:
        raise ValueError(
            f"the record {record.evaluation} has no verdicts image by image, as those of an "
            "older version; evaluate again with --out DIR"
        )
    own = checked.verdicts(record, out / "results.jsonl")
    ledger = ledger or out / f"ledger-{record.evaluation}.jsonl"
    points = _Points(ledger, own, tuple(images.shape[1:]))
    whole_split = split_images or len(images)
    about: BundleFacts = {"record": record.to_json(), "split_images": whole_split}
    with written(place) as part:
        levels, unsure = _write(part, about, own, images, points, logits, batch)
    size = sum(file.stat().st_size for file in place.iterdir())
    fooled = sum(levels.values())
    exact = f", {levels[0]} of them exact" if levels.get(0) else ""
    near = f"; {unsure} are misclassified by little more than rounding" if unsure else ""
    say(f"bundle {place}: {fooled} adversarial images{exact}, {size / 2**20:.1f} MiB{near}")


@contextlib.contextmanager
def written(place: Path) -> Iterator[Path]:
    """Give a folder for the files of a bundle, which becomes `place` with program and hashes."""
    part = place.with_name(f".{place.name}.part")
    shutil.rmtree(part, ignore_errors=True)  # of one that was killed
    part.mkdir(parents=True)
    try:
        with whole.explained(place):
            yield part
            (part / PROGRAM).write_text(program())
            names = sorted(file.name for file in part.iterdir())
            sums = [f"{claims.file_sha256(part / name)}  {name}\n" for name in names]
            (part / claims.SUMS).write_text("".join(sums))
        if place.exists():
            place.rmdir()  # an empty folder
        part.rename(place)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def check_place(place: Path, evaluation: str) -> bool:
    """Look for the bundle of an evaluation in a folder, and refuse one that holds another's."""
    if not place.exists() or _empty(place):
        return False
    there = claims.read(place).record["evaluation"]
    if there != evaluation:
        raise ValueError(
            f"--bundle {place} holds the bundle of evaluation {there}, not of {evaluation}; name "
            "another folder"
        )
    return True


def _empty(place: Path) -> bool:
    return place.is_dir() and not any(place.iterdir())


def forward(logits_fn: Any, image: tuple[int, ...], batch: int | None = None) -> Logits:
    """Make a network, as verdicts see it, one program for any number of arrays f32[n,H,W,C]."""
    runner = engine.make(logits_fn, slots=batch, image_size=max(image[:2]))
    with jax.set_mesh(runner.mesh):
        runner = engine.trace(runner, image)

    def logits(images: np.ndarray) -> np.ndarray:
        with jax.set_mesh(runner.mesh):
            return engine.forward(runner, images)

    return logits


def _write(
    folder: Path,
    about: BundleFacts,
    own: Verdicts,
    images: ImageSet,
    points: "_Points",
    logits: Logits,
    batch: int,
) -> tuple[dict[int, int], int]:
    attack = about["record"]["attacks"][0]
    threat = Threat.of(attack)
    files, levels, unsure = _Files(folder), dict.fromkeys((*LEVELS, 0), 0), 0
    with (folder / claims.ROWS).open("w") as rows:
        for start in range(0, len(own.image_ids), batch):
            which = np.arange(start, min(start + batch, len(own.image_ids)))
            clean = images[which]
            hit = np.flatnonzero(own.clean[which] & ~own.robust[which])
            labels = own.labels[which[hit]]
            adversarial = np.stack([points[which[i]] for i in hit]) if len(hit) else clean[:0]
            made = encoded(adversarial, clean[hit], labels, logits, threat)
            coded = dict(zip(hit.tolist(), made, strict=True))
            for i, place in enumerate(which.tolist()):
                row: ImageRow = {
                    "image": int(own.image_ids[place]),
                    "label": int(own.labels[place]),
                    "verdict": str(own.fooled_by[place]),
                    "sha256": claims.image_sha256(clean[i]),
                }
                if i in coded:
                    levels[coded[i].levels] += 1
                    unsure += not coded[i].sure
                    row = {**row, **files.add(coded[i])}
                rows.write(json.dumps(row) + "\n")
    files.close()
    about = {
        "schema": claims.SCHEMA,
        "image": list(images.shape[1:]),
        "encoding": _ENCODING,
        "levels": {str(count): number for count, number in levels.items() if number},
        "near_the_boundary": unsure,  # images, by `claims.MARGIN`
        **about,
    }
    (folder / claims.ABOUT).write_text(json.dumps(about, indent=1) + "\n")
    return {count: number for count, number in levels.items() if number}, unsure


class _Files:
    """The files of differences, one after the other."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._count = folder, 0
        self._file: BinaryIO | None = None

    def add(self, coded: Coded) -> ImageRow:
        """Store a difference; return its part of a row."""
        if self._file is None or self._file.tell() + len(coded.code) > _PART_BYTES:
            self.close()
            self._file = (self._folder / f"differences-{self._count}.bin").open("wb")
            self._count += 1
        offset = self._file.tell()
        self._file.write(coded.code)
        name = Path(self._file.name).name
        row: ImageRow = {"levels": coded.levels, "step": coded.step}
        return {**row, "file": name, "offset": offset, "bytes": len(coded.code)}

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


class _Points:
    """The adversarial images of an evaluation, by place, from its ledger."""

    def __init__(self, ledger: Path, own: Verdicts, shape: tuple[int, ...]) -> None:
        self._shape, self._where = shape, {}
        wanted = {
            (int(own.image_ids[place]), str(own.fooled_by[place])): place
            for place in np.flatnonzero(own.clean & ~own.robust).tolist()
        }
        for file in [ledger, *sorted(ledger.parent.glob(f"{ledger.stem}.process-*.jsonl"))]:
            for row in jsonl.read(file):
                key = (row.get("image"), row.get("attack"))
                if row.get("fooled") and key in wanted:
                    self._where[wanted[key]] = (file.with_suffix(".images"), int(row["stored"]))
        missing = len(wanted) - len(self._where)
        if missing or not all(file.is_file() for file, _ in self._where.values()):
            raise ValueError(
                f"{ledger} lacks adversarial images of its evaluation ({missing} verdicts); "
                "--bundle needs them: evaluate again with --out DIR"
            )

    def __getitem__(self, place: int) -> np.ndarray:
        file, stored = self._where[int(place)]
        size = int(np.prod(self._shape))
        point = np.fromfile(file, np.float32, size, offset=stored * 4 * size)
        if point.size < size:
            raise ValueError(f"{file} is cut off; --bundle needs it: evaluate again with --out DIR")
        return point.reshape(self._shape)


def program() -> str:
    """Make the program in every bundle: the text of `claims_torch`, with what that needs."""
    needed = {
        "Contradictions": contradictions,
        "Contradictions of common corruptions": contradictions_corrupted,
        "Claims": claims,
        "Claims of common corruptions": claims_corrupted,
    }
    doc, last = _parted(claims_torch)
    parts = [f"# --- {head} ---\n\n{_parted(own)[1].strip()}\n" for head, own in needed.items()]
    return "\n\n".join([doc, *parts, f"# --- With PyTorch ---\n{last}"])


def _parted(module: ModuleType) -> tuple[str, str]:
    """Split a module's text into its docstring and the rest, without what it imports of ours."""
    text = Path(module.__file__ or "").read_text()
    tree, rows = ast.parse(text), text.splitlines(keepends=True)
    for node in reversed(tree.body):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("jaxrobust"):
            del rows[node.lineno - 1 : node.end_lineno]
    end = tree.body[0].end_lineno or 0
    return "".join(rows[:end]), "".join(rows[end:])
