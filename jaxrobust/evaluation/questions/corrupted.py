"""Accuracy under common corruptions, each kind in each severity: one record of all of them.

Its figure is 1 - mean error: the mean of the accuracies, as the robustness of CIFAR-10-C is often
told, not in units of AlexNet's errors. An evaluation that was interrupted goes on behind the last
corruption that is done.
"""

import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from jaxrobust.data import Source, open_source
from jaxrobust.data.sources import cifar_c
from jaxrobust.data.stream import corrupted_images
from jaxrobust.data.stream.corrupted_images import Photographs
from jaxrobust.data.transforms import corruptions
from jaxrobust.data.transforms.corruptions import Corruption as Asked
from jaxrobust.evaluation.engine import accuracy
from jaxrobust.evaluation.network import collapse, reliability
from jaxrobust.evaluation.questions import measuring
from jaxrobust.evaluation.questions.flags import GivenFlags
from jaxrobust.evaluation.questions.recording import Evaluation
from jaxrobust.evaluation.records import parts
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


def record(evaluation: Evaluation, given: GivenFlags) -> AccuracyRecord:
    """Record the accuracies, computed unless they are there; the first process of a pod writes."""
    wished, own = wanted(given), evaluation.source
    published = own.name.startswith(cifar_c.PREFIX)
    size = evaluation.subject.image_size
    frost = None if given.frost is None else corrupted_images.photographs(given.frost, size)
    sources = {each: _source(evaluation, each, frost, published) for each in wished}
    drawn = None if published else [given.seed, frost.sha256 if frost else None]
    files = [[str(each), source.files_sha256] for each, source in sources.items()]
    number = evaluation.number(evaluation.subject, corruptions=files, drawn=drawn)
    if there := evaluation.recorded(number):
        return there
    words = f"{len(wished)} corruptions, {'files' if published else 'computed'}"
    name, count = evaluation.subject.network.name, evaluation.question.images
    say(f"{name} on {own.where()}: {words}, {count}")
    start = time.perf_counter()
    judge = _judge(evaluation)
    clean = None if published else _answered(judge(own, "clean"))
    verdicts = None if clean is None else measuring.verdicts_of(clean, "clean")
    ledger = evaluation.out / f"corruptions-{number}.jsonl"
    reached, unanswered = hosts.everyone(_done(ledger))[0]
    for each, source in sources.items():
        if each in reached:
            continue
        judged = judge(source, str(each))
        if not evaluation.fingerprint.has_answers:
            _answered(judged)
        reached[each] = float(judged["clean"].mean())
        unanswered[each] = int((~judged["finite"]).sum())
        if jax.process_index() == 0:
            row = {"kind": each.kind, "severity": each.severity, "accuracy": reached[each]}
            jsonl.append(ledger, row | {"not_finite": unanswered[each]})
    flags: dict[str, str] = {}
    if clean is not None:
        flags |= reliability.check_answers(clean["finite"])
        flags |= collapse.flags(clean["answers"], clean["labels"])
    if broken := {str(each): unanswered.get(each, 0) for each in wished if unanswered.get(each)}:
        words = ", ".join(f"{name}: {count}" for name, count in broken.items())
        flags["nan-under-corruption"] = (
            f"images have NaN or infinite logits under corruptions ({words} of "
            f"{evaluation.question.images} each): they count as wrong"
        )
    measured = AccuracyRecord(
        clean=None if verdicts is None else float(verdicts.clean.mean()),
        accuracy_after={},
        costs=[],
        flags=flags,
        corruptions={
            "images": "files" if published else "computed",
            "accuracy": {
                kind: {str(each.severity): reached[each] for each in wished if each.kind == kind}
                for kind in dict.fromkeys(each.kind for each in wished)
            },
            "mean": float(np.mean([reached[each] for each in wished])),
            "frost_sha256": frost.sha256 if frost else None,
            "seconds": time.perf_counter() - start,
        },
    )
    return evaluation.write(number, METHOD, measured, verdicts)


def _answered(judged: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    reliability.check_answers(judged["finite"])
    return judged


def _source(
    evaluation: Evaluation, wished: Asked, frost: Photographs | None, published: bool
) -> Source:
    subject, own = evaluation.subject, evaluation.source
    if published:
        classes, count = subject.classes, subject.network.num_classes
        return open_source(own.name, str(wished), classes=classes, num_classes=count)
    return corrupted_images.corrupted(
        own,
        wished,
        image_size=subject.image_size,
        preprocessing=str(evaluation.question.preprocessing),
        seed=evaluation.question.seed,
        frost=frost,
    )


def _judge(evaluation: Evaluation) -> Callable[[Source, str], dict[str, np.ndarray]]:
    subject, question, mesh = evaluation.subject, evaluation.question, sharding.make_mesh()
    size, batch = subject.image_size, evaluation.batch
    net, no_attack = subject.create("float32"), lambda logits_fn, keys, images, labels: images
    counter = accuracy.counter(net, no_attack, mesh=mesh, each="linf")

    def judge(source: Source, bar: str) -> dict[str, np.ndarray]:
        there = source.image_shape is not None and source.image_shape[:2] == (size, size)
        images = accuracy.EvaluatedImages(
            source,
            image_size=size,
            batch_size=-(-batch // mesh.size) * mesh.size,
            limit=question.images,
            # Computed images are prepared before they are corrupted.
            preprocessing=None if there else question.preprocessing,
            workers=subject.workers,
        )
        return accuracy.each(counter, evaluation.weights, images, mesh, bar=bar)

    return judge


def _done(ledger: Path) -> tuple[dict[Asked, float], dict[Asked, int]]:
    rows = {Asked(row["kind"], row["severity"]): row for row in jsonl.read(ledger)}
    broken = {each: row["not_finite"] for each, row in rows.items() if "not_finite" in row}
    return {each: row["accuracy"] for each, row in rows.items()}, broken


def table(measured: parts.CorruptionAccuracies) -> list[str]:
    """Write the lines that show the accuracies under corruptions, a kind each."""
    severities = sorted({s for row in measured["accuracy"].values() for s in row})
    lines = ["".join([f"{'severity':18}", *(f"{s:>8}" for s in severities), f"{'mean':>8}"])]
    for kind, row in measured["accuracy"].items():
        cells = [f"{row[s]:8.1%}" if s in row else f"{'-':>8}" for s in severities]
        lines.append("".join([f"{kind:18}", *cells, f"{np.mean(list(row.values())):8.1%}"]))
    return [*lines, f"{'1 - mean error':18}{measured['mean']:8.1%}"]
