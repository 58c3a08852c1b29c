"""The worst case of a function over three norms, in a program; the attacks are in `three_norms`.

Code of the command line for weights and data is only imported when needed.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Unpack

import jax
import numpy as np

from jaxrobust.attacks.inputs import check_array
from jaxrobust.data.splits import balance
from jaxrobust.evaluation.engine.autoattack import autoattack
from jaxrobust.evaluation.engine.result import AutoAttackResult, CallerFacts
from jaxrobust.evaluation.network import checks, fingerprint, reliability, tracing
from jaxrobust.evaluation.network.images import clipped, hashed
from jaxrobust.evaluation.records import records
from jaxrobust.evaluation.records.record import AccuracyRecord, Measured, WorstCasePart, keys_of
from jaxrobust.evaluation.records.verdicts import Verdicts
from jaxrobust.runtime.devices import sharding
from jaxrobust.runtime.text.progress import say
from jaxrobust.types import NORMS, Array, Classifier, Threat, check_number, check_threat

if TYPE_CHECKING:
    from jaxrobust.evaluation.questions.questions import GivenFlags


class WorstCaseResult(NamedTuple):
    """The verdicts on N images."""

    clean: np.ndarray  # bool[N], classified correctly
    robust: np.ndarray  # bool[N], no attack succeeded
    fooled_by: np.ndarray  # str[N]: threat and attack; "clean"; "" if robust
    parts: list[WorstCasePart]  # of each attack
    accuracy_after: dict[str, float | None]  # accuracy after each attack, in order
    flags: dict[str, str]  # reasons to doubt the numbers, with remedies
    autoattack: AutoAttackResult  # on the images that reached it
    verdicts: Verdicts  # for each image
    own: AccuracyRecord  # the record of all attacks together

    def table(self) -> str:
        """Format the accuracies as a table."""
        n = len(self.clean)
        lines = [f"{'clean':28} {self.clean.mean():8.2%} of {n}"]
        for part, (name, after) in zip(self.parts, self.accuracy_after.items(), strict=True):
            alone = part["robust"]
            cell = f"{after:8.2%} left" if alone is None else f"{alone:8.2%}"
            lines.append(f"{name:28} {cell} of {n if alone is None else part['images']}")
        low, high = checks.binomial_interval(int(self.robust.sum()), n)
        lines.append(
            f"{'worst case':28} {self.robust.mean():8.2%}, 95% interval {low:.1%} to {high:.1%}"
        )
        lines += records.notes_of(self.own)
        return "\n".join([*lines, *(f"flag {name}: {text}" for name, text in self.flags.items())])

    def _typed_record(self, **facts: Unpack[CallerFacts]) -> AccuracyRecord:
        fields: Any = {key.name: getattr(self.own, key.name) for key in keys_of(AccuracyRecord)}
        values = {name: value for name, value in fields.items() if value is not None}
        autoattack_result = self.autoattack.typed_record(**facts)
        return dataclasses.replace(autoattack_result, **(values | {"worst_case": self.parts}))

    def record(self, **facts: Unpack[CallerFacts]) -> dict[str, Any]:
        """Make the record's JSON; arguments as in `AutoAttackResult.record`."""
        return self._typed_record(**facts).to_json()

    def save(self, path: str | Path, **facts: Unpack[CallerFacts]) -> dict[str, Any]:
        """Append the record to a file of JSON lines and return it, like `AutoAttackResult.save`."""
        return records.save(Path(path), self.verdicts, lambda: self._typed_record(**facts))


def worst_case(
    logits_fn: Callable[..., Array],
    images: np.ndarray | Array,
    labels: np.ndarray | Array,
    *,
    radii: Mapping[str, float] | None = None,
    union_only: bool = False,
    seed: int = 0,
    batch_size: int = 128,
    ledger: str | Path | None = None,
    verbose: bool = True,
) -> WorstCaseResult:
    """Measure accuracy under PGD and AutoAttack in Linf, PGD in L2 and PGD in L1.

    For one process.

    Args:
      logits_fn: see `autoattack`.
      images: f32[N,H,W,C] in [0, 1]; pixels up to 1e-6 outside are clipped.
      labels: i[N].
      radii: for "linf", "l2" and "l1"; default for missing norms: those of Tang et al. 2022 for
        images of 32 and 224 px.
      union_only: each attack only runs on survivors, AutoAttack last, which gives the worst case
        alone. Otherwise each attack sees all images.
      seed: for all random draws.
      batch_size: images at a time; verdicts do not depend on it.
      ledger: of AutoAttack, see `autoattack`.
      verbose: progress and a table on stderr.
    """
    from jaxrobust.evaluation.questions import several
    from jaxrobust.evaluation.questions.questions import GivenFlags
    from jaxrobust.papers import three_norms

    check_array("images", images)
    check_array("labels", labels)
    checks.check_images(np.asarray(images), np.asarray(labels))
    inside, overshot = clipped(np.asarray(images))
    pixels, right = np.ascontiguousarray(inside, np.float32), np.asarray(labels, np.int32)
    if not len(pixels):
        raise ValueError("there are no images; pass at least one")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: pass an int of at least 1")
    within = _radii(pixels.shape[1:], radii or {})
    identity = _answering(logits_fn, pixels, right, batch_size)
    measured: list[Measured] = []
    questions = three_norms.questions(GivenFlags(seed=seed), skips=union_only)
    threats = [within[norm] for norm, _ in questions]
    autoattack_result: Any = None
    for count, (threat, (_, question)) in enumerate(zip(threats, questions, strict=True)):
        standing = np.ones(len(pixels), bool)
        if union_only and count:
            standing = several.joined(measured, threats).robust
        ids = np.flatnonzero(standing)
        if question.fixed:
            arguments = (logits_fn, pixels, right, ids, threat, question)
            measured.append(_stepped(*arguments, batch_size=batch_size))
            continue
        autoattack_result = autoattack(
            logits_fn,
            pixels[ids],
            right[ids],
            **threat.settings(),
            attacks=question.names,
            overrides=question.overrides(),
            seed=seed,
            image_ids=ids.tolist(),
            ledger=ledger,
            identity=identity,
            verbose=verbose,
        )
        measured.append(autoattack_result.measured())
    names = [f"{ball} {q.attack}" for ball, (_, q) in zip(threats, questions, strict=True)]
    methods = [question.method for _, question in questions]
    rows = several.parts_of(measured, threats, methods, [None] * len(measured), skips=union_only)
    record, verdicts, _ = several.united(measured, threats, names)
    images_sha256 = hashed(pixels, right, verdicts.image_ids)
    record = dataclasses.replace(
        record,
        image_ids=records.ranges(verdicts.image_ids.tolist()),
        clipped=overshot,
        flags=record.flags | balance.flags(right, autoattack_result.about["classes"]),
        images_sha256=images_sha256,
        fingerprint={**autoattack_result.about["fingerprint"], "images": images_sha256},
        method="union",
        interval=records.intervals(record.clean, record.robust, len(pixels)),
    )
    result = WorstCaseResult(
        clean=verdicts.clean,
        robust=verdicts.robust,
        fooled_by=verdicts.fooled_by,
        parts=rows,
        accuracy_after=record.accuracy_after or {},
        flags=record.flags,
        autoattack=autoattack_result,
        verdicts=verdicts,
        own=dataclasses.replace(record, evaluation=_number(record, rows, autoattack_result)),
    )
    if verbose:
        say(result.table())
    return result


def _number(
    record: AccuracyRecord, rows: list[WorstCasePart], autoattack_result: AutoAttackResult
) -> str:
    names = ("attacks", "costs", "image_ids", "clipped", "images_sha256", "fingerprint")
    facts = {name: getattr(record, name) for name in names if getattr(record, name) is not None}
    about = facts | {"parts": rows} | records.identity(autoattack_result.about)
    return records.number_of(records.identity(about))


def _answering(
    logits_fn: Callable[..., Array], images: np.ndarray, labels: np.ndarray, batch_size: int
) -> fingerprint.Fingerprint:
    network = tracing.argument("logits_fn", logits_fn, sharding.make_mesh())
    network_identity = fingerprint.of_network(network, images, batch=batch_size, labels=labels)
    if (
        not network_identity.has_answers
    ):  # for images like these, so check all of them before any attack
        parts = (images[i : i + batch_size] for i in range(0, len(images), batch_size))
        logits = [
            np.asarray(network(np.resize(part, (batch_size, *part.shape[1:]))))[: len(part)]
            for part in parts
        ]
        reliability.check_answers(checks.answered(np.concatenate(logits)))
    return network_identity


def _radii(image: tuple[int, ...], radii_given: Mapping[str, float]) -> dict[str, Threat]:
    from jaxrobust.papers import three_norms

    if unknown := sorted(radii_given.keys() - set(NORMS)):
        norms = ", ".join(NORMS)
        raise ValueError(f"radii contains {', '.join(unknown)}; choose norms from {norms}")
    height, width, channels = image
    side = height if height == width else 0  # the study's images are square
    threats = [
        Threat(norm, check_number("epsilon", epsilon)) for norm, epsilon in radii_given.items()
    ]
    write = lambda norms: f"radii={{{', '.join(f'{n!r}: RADIUS' for n in norms)}}}"  # noqa: E731
    by_norm = three_norms.radii(side, threats, write=write)
    for threat in by_norm.values():
        check_threat(threat, max(height, width), channels)
    return by_norm


def _stepped(
    logits_fn: Callable[..., Array],
    images: np.ndarray,
    labels: np.ndarray,
    ids: np.ndarray,
    ball: Threat,
    question: "GivenFlags",
    *,
    batch_size: int,
) -> Measured:
    from jaxrobust.evaluation.engine import accuracy
    from jaxrobust.evaluation.questions import measuring

    settings, attack = measuring.attack_of(question, ball)
    start, parts = time.perf_counter(), []
    key = jax.random.key(question.seed)
    network = tracing.argument("logits_fn", logits_fn, sharding.make_mesh())

    @jax.jit
    def judged(network: Any, *batch: Array) -> dict[str, Array]:
        net = Classifier(lambda key: ({}, {}), lambda params, stats, x: (network(x), stats))
        judging = accuracy.Judging(net, attack, "float32", norm=ball.norm, moved=True)
        return accuracy.judged({}, {}, *batch, judging=judging)

    for first in range(0, max(len(ids), 1), batch_size):
        places = np.resize(ids[first : first + batch_size], batch_size)  # one shape is compiled
        there = np.arange(batch_size) < len(ids) - first
        judgement = jax.device_get(
            judged(network, images[places], labels[places], there, places, key)
        )
        parts.append({name: values[there] for name, values in judgement.items()})
    reached = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    classes = 1 + int(max(labels.max(), reached["answers"].max(initial=0)))  # at least
    seconds = time.perf_counter() - start
    return measuring.answered(reached, question, ids, settings, seconds, classes)
