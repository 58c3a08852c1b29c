"""Accuracy under common corruptions, each kind in each severity: one record of all of them.

Its figure is 1 - mean error: the mean of the accuracies, as the robustness of CIFAR-10-C is often
told, not in units of AlexNet's errors. An evaluation that was interrupted goes on behind the last
corruption that is done.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxrobust.data import Prepared, Source
from jaxrobust.data.sources import cifar_c
from jaxrobust.data.stream import corrupted_images, pipeline
from jaxrobust.data.stream.corrupted_images import Photographs
from jaxrobust.data.transforms import corruptions
from jaxrobust.data.transforms.corruptions import Corruption as Asked
from jaxrobust.evaluation.bundles import bundle
from jaxrobust.evaluation.bundles.contradictions import CLEAN
from jaxrobust.evaluation.engine import accuracy
from jaxrobust.evaluation.network import collapse, label_checks, reliability
from jaxrobust.evaluation.network.images import ImageSet
from jaxrobust.evaluation.questions import measuring
from jaxrobust.evaluation.questions.flags import GivenFlags
from jaxrobust.evaluation.questions.recording import Evaluation
from jaxrobust.evaluation.records import checked, parts
from jaxrobust.evaluation.records.record import AccuracyRecord
from jaxrobust.runtime.devices import sharding
from jaxrobust.runtime.files import jsonl
from jaxrobust.runtime.processes import hosts
from jaxrobust.runtime.text.progress import say

METHOD = "corruptions"


def settled(given: GivenFlags) -> GivenFlags:
    """Fill in the flags of an evaluation with `--corruptions`; refuse those that contradict it."""
    if given.corruptions is None:
        if given.frost is not None:
            raise ValueError(f"--frost={given.frost} has no effect without --corruptions")
        return given
    wished = wanted(given)
    if given.attack != "clean":
        raise ValueError(
            f"--corruptions is measured without an attack; leave --attack={given.attack} out"
        )
    if given.frost is not None and all(each.kind != "frost" for each in wished):
        raise ValueError(f"--frost={given.frost} has no effect without the corruption frost")
    if not (given.dataset or "").startswith(cifar_c.PREFIX):
        return given
    for flag, value in (("split", given.split), ("frost", given.frost)):
        if value is not None:
            raise ValueError(
                f"--{flag}={value} has no effect on the files of {given.dataset}; leave it out"
            )
    return given._replace(split=str(wished[0]))


def wanted(given: GivenFlags) -> list[Asked]:
    """Read the corruptions of the flag."""
    try:
        return corruptions.chosen(str(given.corruptions))
    except ValueError as error:
        raise ValueError(f"--corruptions={given.corruptions}: {error}") from error


class _Opened(NamedTuple):
    """The corrupted images of an evaluation, and the number that they give it."""

    number: str
    sources: dict[str, Source]  # by the names of the corruptions
    frost: Photographs | None
    published: bool


def _open(evaluation: Evaluation, given: GivenFlags) -> _Opened:
    subject, question, own = evaluation.subject, evaluation.question, evaluation.source
    frost = None
    if given.frost is not None:
        frost = corrupted_images.photographs(given.frost, subject.image_size)
    sources = corrupted_images.each(
        own,
        wanted(given),
        image_size=subject.image_size,
        preprocessing=str(question.preprocessing),
        seed=question.seed,
        frost=frost,
        classes=subject.classes,
        num_classes=subject.network.num_classes,
    )
    published = own.name.startswith(cifar_c.PREFIX)
    drawn = None if published else [given.seed, frost.sha256 if frost else None]
    files = [[name, source.files_sha256] for name, source in sources.items()]
    number = evaluation.number(subject, corruptions=files, drawn=drawn)
    return _Opened(number, sources, frost, published)


def record(evaluation: Evaluation, given: GivenFlags) -> AccuracyRecord:
    """Record the accuracies, computed unless they are there; the first process of a pod writes."""
    opened = _open(evaluation, given)
    if given.bundle:
        place = Path(given.bundle)
        hosts.together(lambda: jax.process_index() or bundle.check_place(place, opened.number))
    measured = evaluation.recorded(opened.number) or _measured(evaluation, given, opened)
    if given.bundle:

        def write() -> None:
            if jax.process_index() == 0:
                _write_bundle(evaluation, measured, opened, place)

        hosts.together(write)
    return measured


def _measured(evaluation: Evaluation, given: GivenFlags, opened: _Opened) -> AccuracyRecord:
    wished, own, number = wanted(given), evaluation.source, opened.number
    words = f"{len(wished)} corruptions, {'files' if opened.published else 'computed'}"
    name, count = evaluation.subject.network.name, evaluation.question.images
    say(f"{name} on {own.where()}: {words}, {count}")
    start = time.perf_counter()
    judge = _judge(evaluation)
    clean = None if opened.published else _answered(judge(own, CLEAN))
    kept = None if clean is None else measuring.verdicts_of(clean, CLEAN, evaluation.images.ids)
    ledger = _ledger(evaluation, number)
    reached = hosts.everyone(_done(ledger))[0]
    for each in wished:
        if (name := str(each)) in reached:
            continue
        judged = judge(opened.sources[name], name)
        if not evaluation.fingerprint.has_answers:
            _answered(judged)
        reached[name] = {
            "kind": each.kind,
            "severity": each.severity,
            "accuracy": float(judged["clean"].mean()),
            "not_finite": int((~judged["finite"]).sum()),
            "right": np.packbits(judged["clean"]).tobytes().hex(),
        }
        if jax.process_index() == 0:
            jsonl.append(ledger, reached[name])
    flags: dict[str, str] = {}
    if clean is not None:
        flags |= reliability.check_answers(clean["finite"])
        flags |= label_checks.check_answers(clean["answers"], clean["labels"], own.num_classes)
        flags |= collapse.flags(clean["answers"], clean["labels"])
    else:
        right = [_right(reached[str(each)], count) for each in wished]
        flags |= reliability.check_accuracy(np.concatenate(right), own.num_classes)
    lost = {name: row.get("not_finite", 0) for name, row in reached.items()}
    if broken := {str(each): lost[str(each)] for each in wished if lost[str(each)]}:
        words = ", ".join(f"{name}: {count}" for name, count in broken.items())
        flags["nan-under-corruption"] = (
            f"images have NaN or infinite logits under corruptions ({words} of "
            f"{evaluation.question.images} each): they count as wrong"
        )
    measured = AccuracyRecord(
        clean=None if kept is None else float(kept.clean.mean()),
        accuracy_after={},
        costs=[],
        flags=flags,
        corruptions={
            "images": "files" if opened.published else "computed",
            "accuracy": {
                kind: {
                    str(each.severity): reached[str(each)]["accuracy"]
                    for each in wished
                    if each.kind == kind
                }
                for kind in dict.fromkeys(each.kind for each in wished)
            },
            "mean": float(np.mean([reached[str(each)]["accuracy"] for each in wished])),
            "frost_sha256": opened.frost.sha256 if opened.frost else None,
            "seconds": time.perf_counter() - start,
        },
    )
    return evaluation.write(number, METHOD, measured, kept)


def _answered(judged: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    reliability.check_answers(judged["finite"])
    return judged


def _judge(evaluation: Evaluation) -> Callable[[Source, str], dict[str, np.ndarray]]:
    subject, question, mesh = evaluation.subject, evaluation.question, sharding.make_mesh()
    size, batch = subject.image_size, evaluation.batch
    net, no_attack = subject.create("float32"), lambda logits_fn, keys, images, labels: images
    counter = accuracy.counter(net, no_attack, mesh=mesh, each="linf")

    def judge(source: Source, bar: str) -> dict[str, np.ndarray]:
        images = accuracy.EvaluatedImages(
            source,
            image_size=size,
            batch_size=-(-batch // mesh.size) * mesh.size,
            places=tuple(evaluation.images.ids.tolist()),
            # Computed images are prepared before they are corrupted.
            preprocessing=None if _fits(source, size) else question.preprocessing,
            workers=subject.workers,
        )
        return accuracy.each(counter, evaluation.weights, images, mesh, bar=bar)

    return judge


def _done(ledger: Path) -> dict[str, dict[str, Any]]:
    return {str(Asked(row["kind"], row["severity"])): row for row in jsonl.read(ledger)}


def _right(row: dict[str, Any], count: int) -> np.ndarray:
    """Read which images were right under a corruption, bool[count]."""
    bits = np.frombuffer(bytes.fromhex(row["right"]), np.uint8)
    return np.unpackbits(bits)[:count].astype(bool)


def _ledger(evaluation: Evaluation, number: str) -> Path:
    return evaluation.out / f"corruptions-{number}.jsonl"


def _write_bundle(
    evaluation: Evaluation, measured: AccuracyRecord, opened: _Opened, place: Path
) -> None:
    ledger, count = _ledger(evaluation, opened.number), evaluation.question.images
    rows, right = _done(ledger), {}
    images: dict[str, ImageSet] = {}
    if measured.verdicts:
        images[CLEAN] = evaluation.images
        right[CLEAN] = checked.verdicts(measured, evaluation.out / "results.jsonl").clean
    for name, source in opened.sources.items():
        packed = rows.get(name, {}).get("right")
        if packed is None:
            raise ValueError(
                f"{ledger} lacks the answers image by image, as those of an older version do; "
                "--bundle needs them: evaluate again with --again, or with another --out DIR"
            )
        right[name] = _right(rows[name], count)
        size, how = evaluation.subject.image_size, str(evaluation.question.preprocessing)
        images[name] = prepared(source, size, how, evaluation.images.ids)
    bundle.of_corruptions(
        place,
        measured,
        images,
        evaluation.images.labels(),
        right,
        ids=evaluation.images.ids,
        split_images=len(evaluation.source),
    )


def prepared(source: Source, size: int, preprocessing: str, places: np.ndarray) -> Prepared:
    """Prepare images of a corrupted source; computed ones were, before corruption."""
    how = pipeline.preprocessing_id(source, size) if _fits(source, size) else preprocessing
    return Prepared(source, image_size=size, preprocessing=how, places=places)


def _fits(source: Source, size: int) -> bool:
    return source.image_shape is not None and source.image_shape[:2] == (size, size)


def table(measured: parts.CorruptionAccuracies) -> list[str]:
    """Write the lines that show the accuracies under corruptions, a kind each."""
    severities = sorted({s for row in measured["accuracy"].values() for s in row})
    lines = ["".join([f"{'severity':18}", *(f"{s:>8}" for s in severities), f"{'mean':>8}"])]
    for kind, row in measured["accuracy"].items():
        cells = [f"{row[s]:8.1%}" if s in row else f"{'-':>8}" for s in severities]
        lines.append("".join([f"{kind:18}", *cells, f"{np.mean(list(row.values())):8.1%}"]))
    return [*lines, f"{'1 - mean error':18}{measured['mean']:8.1%}"]
