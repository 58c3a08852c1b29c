"""Accuracy under common corruptions of each kind and severity, in one record.

The reported figure is 1 - mean error, the mean of the accuracies, as is common for CIFAR-10-C. It
is not relative to AlexNet's errors. An interrupted evaluation resumes after the last complete
corruption.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxrobust.data import Prepared, Source
from jaxrobust.data.sources import cifar_c
from jaxrobust.data.stream import corrupted_images, pipeline
from jaxrobust.evaluation.bundles import bundle
from jaxrobust.evaluation.bundles.contradictions import CLEAN
from jaxrobust.evaluation.engine import accuracy
from jaxrobust.evaluation.network import collapse, label_checks, reliability
from jaxrobust.evaluation.network.images import ImageSet
from jaxrobust.evaluation.questions import measuring, mistakes
from jaxrobust.evaluation.questions.recording import Evaluation
from jaxrobust.evaluation.questions.stated import GivenFlags
from jaxrobust.evaluation.records import checked
from jaxrobust.evaluation.records.record import AccuracyRecord, CorruptionAccuracies
from jaxrobust.runtime.devices import sharding
from jaxrobust.runtime.files import jsonl
from jaxrobust.runtime.processes import hosts
from jaxrobust.runtime.text.progress import say

METHOD = "corruptions"


def record(evaluation: Evaluation, flags: GivenFlags) -> AccuracyRecord:
    """Record the accuracies, unless recorded before; the first process of a pod writes."""
    subject, question, source = evaluation.subject, evaluation.question, evaluation.source
    size, frost = subject.image_size, None
    if flags.frost is not None:
        frost = corrupted_images.photographs(flags.frost, size)
    frost_sha256 = frost.sha256 if frost else None
    sources = corrupted_images.each(
        source,
        mistakes.corruptions_of(flags),
        image_size=size,
        preprocessing=str(question.preprocessing),
        seed=question.seed,
        frost=frost,
        classes=subject.classes,
        num_classes=subject.network.num_classes,
    )
    drawn = None if _is_published(source) else [flags.seed, frost_sha256]
    files = [[name, of_name.files_sha256] for name, of_name in sources.items()]
    number = evaluation.number(subject, corruptions=files, drawn=drawn)
    ledger = evaluation.out / f"corruptions-{number}.jsonl"
    place = Path(flags.bundle) if flags.bundle else None
    is_first = jax.process_index() == 0
    if place:
        hosts.together(lambda: is_first and bundle.check_place(place, number))
    measured = evaluation.recorded(number)
    measured = measured or _measured(evaluation, number, sources, frost_sha256, ledger)
    if place:

        def write() -> None:
            if is_first:
                _write_bundle(evaluation, measured, sources, ledger, place)

        hosts.together(write)
    return measured


def _is_published(source: Source) -> bool:
    return source.name.startswith(cifar_c.PREFIX)


def _measured(
    evaluation: Evaluation,
    number: str,
    sources: dict[str, Source],
    frost_sha256: str | None,
    ledger: Path,
) -> AccuracyRecord:
    source, count, start = evaluation.source, evaluation.question.n, time.perf_counter()
    kind_of_images = "files" if _is_published(source) else "computed"
    say(
        f"{evaluation.subject.network.name} on {source.where()}: {len(sources)} corruptions "
        f"({kind_of_images}), {count} images"
    )
    judge = _judge(evaluation)
    clean = verdicts = None
    if not _is_published(source):
        clean = judge(source, CLEAN)
        reliability.check_answers(clean["finite"])
        verdicts = measuring.verdicts_of(clean, CLEAN, evaluation.images.ids)
    done = hosts.everyone(_done(ledger))[0]
    for name, of_name in sources.items():
        if name in done:
            continue
        judged = judge(of_name, name)
        if not evaluation.fingerprint.has_answers:
            reliability.check_answers(judged["finite"])
        corruption, _, severity = name.rpartition("-")
        done[name] = {
            "kind": corruption,
            "severity": int(severity),
            "accuracy": float(judged["clean"].mean()),
            "not_finite": int((~judged["finite"]).sum()),
            "right": np.packbits(judged["clean"]).tobytes().hex(),
        }
        if jax.process_index() == 0:
            jsonl.append(ledger, done[name])
    rows = {name: done[name] for name in sources}
    if clean is not None:
        flags = reliability.check_answers(clean["finite"])
        flags |= label_checks.check_answers(clean["answers"], clean["labels"], source.num_classes)
        flags |= collapse.flags(clean["answers"], clean["labels"])
    else:
        right = [_right(row, count) for row in rows.values()]
        flags = reliability.check_accuracy(np.concatenate(right), source.num_classes)
    lost = {name: row.get("not_finite", 0) for name, row in done.items()}
    if words := ", ".join(f"{name}: {lost[name]}" for name in rows if lost[name]):
        flags["nan-under-corruption"] = (
            f"some images have NaN or infinite logits under corruptions ({words}; {count} images "
            "each) and count as wrong"
        )
    accuracy: dict[str, dict[str, float]] = {}
    for row in rows.values():
        accuracy.setdefault(row["kind"], {})[str(row["severity"])] = row["accuracy"]
    measured = AccuracyRecord(
        clean=None if verdicts is None else float(verdicts.clean.mean()),
        accuracy_after={},
        costs=[],
        flags=flags,
        corruptions={
            "images": kind_of_images,
            "accuracy": accuracy,
            "mean": float(np.mean([row["accuracy"] for row in rows.values()])),
            "frost_sha256": frost_sha256,
            "seconds": time.perf_counter() - start,
        },
    )
    return evaluation.write(number, METHOD, measured, verdicts)


def _judge(evaluation: Evaluation) -> Callable[[Source, str], dict[str, np.ndarray]]:
    subject, question, mesh = evaluation.subject, evaluation.question, sharding.make_mesh()
    net, no_attack = subject.create("float32"), lambda logits_fn, keys, images, labels: images
    counter = accuracy.counter(net, no_attack, mesh=mesh, norm="linf")

    def judge(source: Source, bar: str) -> dict[str, np.ndarray]:
        images = accuracy.EvaluatedImages(
            source,
            image_size=subject.image_size,
            batch_size=-(-evaluation.batch // mesh.size) * mesh.size,
            places=tuple(evaluation.images.ids.tolist()),
            # Computed images are prepared before they are corrupted.
            preprocessing=None if _fits(source, subject.image_size) else question.preprocessing,
            workers=subject.workers,
        )
        return accuracy.each(counter, evaluation.weights, images, mesh, bar=bar)

    return judge


def _done(ledger: Path) -> dict[str, dict[str, Any]]:
    return {f"{row['kind']}-{row['severity']}": row for row in jsonl.read(ledger)}


def _right(row: dict[str, Any], count: int) -> np.ndarray:
    """Decode which images were classified correctly under a corruption, bool[count]."""
    bits = np.frombuffer(bytes.fromhex(row["right"]), np.uint8)
    return np.unpackbits(bits)[:count].astype(bool)


def _write_bundle(
    evaluation: Evaluation,
    measured: AccuracyRecord,
    sources: dict[str, Source],
    ledger: Path,
    place: Path,
) -> None:
    rows, ids = _done(ledger), evaluation.images.ids
    size, preprocessing = evaluation.subject.image_size, str(evaluation.question.preprocessing)
    images: dict[str, ImageSet] = {}
    right = {}
    if measured.verdicts:
        images[CLEAN] = evaluation.images
        right[CLEAN] = checked.verdicts(measured, evaluation.out / "results.jsonl").clean
    for name, source in sources.items():
        if rows.get(name, {}).get("right") is None:
            raise ValueError(
                f"{ledger} lacks the per-image answers that --bundle needs, like ledgers from "
                "older versions; evaluate again with --again, or with another --out DIR"
            )
        right[name] = _right(rows[name], evaluation.question.n)
        images[name] = prepared(source, size, preprocessing, ids)
    labels, split = evaluation.images.labels(), len(evaluation.source)
    bundle.of_corruptions(place, measured, images, labels, right, ids=ids, split_images=split)


def prepared(source: Source, size: int, preprocessing: str, places: np.ndarray) -> Prepared:
    """Prepare images of a corrupted source; computed images were prepared before corruption."""
    if _fits(source, size):
        preprocessing = pipeline.preprocessing_id(source, size)
    return Prepared(source, image_size=size, preprocessing=preprocessing, places=places)


def _fits(source: Source, size: int) -> bool:
    return source.image_shape is not None and source.image_shape[:2] == (size, size)


def table(measured: CorruptionAccuracies) -> list[str]:
    """Format the accuracies under corruptions, one line per kind."""
    severities = sorted({s for row in measured["accuracy"].values() for s in row})
    lines = ["".join([f"{'severity':18}", *(f"{s:>8}" for s in severities), f"{'mean':>8}"])]
    for kind, row in measured["accuracy"].items():
        cells = [f"{row[s]:8.1%}" if s in row else f"{'-':>8}" for s in severities]
        lines.append("".join([f"{kind:18}", *cells, f"{np.mean(list(row.values())):8.1%}"]))
    return [*lines, f"{'1 - mean error':18}{measured['mean']:8.1%}"]
