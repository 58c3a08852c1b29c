"""The records of an evaluation: computed unless they exist, and stored with their verdicts."""

import copy
import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxrobust.attacks import ensembles
from jaxrobust.data import Prepared
from jaxrobust.data.sources import registry
from jaxrobust.data.splits import spread
from jaxrobust.data.stream import pipeline
from jaxrobust.evaluation.engine import replay
from jaxrobust.evaluation.engine.autoattack import autoattack
from jaxrobust.evaluation.network import fingerprint, reliability, tracing
from jaxrobust.evaluation.network.images import Subset
from jaxrobust.evaluation.network.user_attacks import ALONE
from jaxrobust.evaluation.questions import earlier, measuring, stops
from jaxrobust.evaluation.questions.stated import GivenFlags, stop_of
from jaxrobust.evaluation.questions.target import Subject
from jaxrobust.evaluation.records import checked, of_weights, records, verdicts
from jaxrobust.evaluation.records.record import (
    AccuracyRecord,
    Measured,
    NetworkFingerprint,
    NetworkSize,
    TrainingFacts,
)
from jaxrobust.evaluation.records.stopping import StopRule
from jaxrobust.runtime.devices import idle, in_use
from jaxrobust.runtime.files import folders
from jaxrobust.runtime.processes import hosts
from jaxrobust.runtime.text.progress import say
from jaxrobust.types import Weights
from jaxrobust.weights.store import hashes

_LOW = 0.5  # clean accuracy
_TURNED = 0.005  # share of clean answers that rounding may change


class Evaluation:
    """A network and its images, for several questions that share compiled programs."""

    def __init__(
        self,
        subject: Subject,
        source: registry.Source,
        weights_name: str | None,
        weights: Weights,
        question: GivenFlags,
        out: Path,
    ) -> None:
        if question.n > len(source):
            say(f"{source.where()} has only {len(source):,} images; evaluating all of them")
        size = subject.image_size
        self.question = question._replace(
            n=min(len(source), question.n or len(source)),
            preprocessing=pipeline.preprocessing_id(source, size, question.preprocessing),
        )
        self.subject, self.source, self.weights = subject, source, weights
        self.which = weights_name
        self.out = out
        self.function = subject.origin()
        self.logits_of = measuring.networks_of(subject, weights)
        preprocessing, count = str(self.question.preprocessing), self.question.n
        self.images = Prepared(source, image_size=size, preprocessing=preprocessing, images=count)
        images = self._image_fields()
        ledgers = [earlier.ledgers_named(Path(folder), images) for folder in question.replay]
        self.given = [path for paths in ledgers for path in paths]
        logits_fn = self.logits_of("float32")
        here = Mesh(np.array(jax.local_devices()[:1]), ("device",))
        network = tracing.argument("logits_fn", logits_fn, here)
        options: Any = {"operand": "keys" if subject.keyed else "", "labels": self.images.labels}
        self.fingerprint = fingerprint.of_network(network, self.images, batch=self.batch, **options)
        self.questions: dict[str, str] = {}  # number -> hash of its question
        self._size: list[NetworkSize] = []  # filled on first use, shared by all questions
        self._clean: list[verdicts.Verdicts] = []  # likewise

    def with_question(self, question: GivenFlags) -> "Evaluation":
        """Ask another checked question of the same network and images."""
        settled = {key: getattr(self.question, key) for key in ("n", "preprocessing")}
        if (question := question._replace(**settled)) == self.question:
            return self
        other = copy.copy(self)
        other.question, other.given = question, self.given if question.replay else []
        return other

    def record(self, subject: Subject) -> AccuracyRecord:
        """Record one threat, unless recorded before; the first process writes the record."""
        question, rule = self.question, None
        about: dict[str, Any] = {}
        if stop_of(question):
            images = self.images.content_sha256()
            rule, about = stops.rule(question, subject, self.source, images, self.hashed)
        elif question.finish:
            self._check_begun(subject)
        number = self.number(subject, **({"stop": rule.settings()} if rule else {}))
        is_plain = rule is None and question.version != ensembles.FAST
        if there := self.recorded(number) or (is_plain and self._without_replay(subject)):
            return there
        if is_plain:
            expected: dict[str, Any] = {"dataset": self.source.name, "split": self.source.split}
            expected |= {"method": question.method, "seed": question.seed, "weights": self.which}
            expected |= {"image_ids": records.ranges(self.images.ids.tolist())}
            earlier.warn_of_older(self.out, expected, subject.ball)
        self.announce(subject)
        begun = self.begun(subject)
        if rule is None:
            ledgers = self.ledgers_to_replay(subject, begun)
            return self.write(
                number, question.method, *self.measure(subject, begun, ledgers=ledgers)
            )
        measured = self.measure(subject, begun, stop=rule)
        measured = measured.noting(stopped=(measured.record.stopped or {}) | about)
        return self.write(number, f"{question.method}, stopped", *measured)

    def begun(self, subject: Subject) -> str:
        """Choose the number of the ledger to continue.

        The fast version continues the ledger of the standard version, an evaluation with a user's
        attacks the one without them, and an evaluation that stops the plain one.
        """
        question = self.question
        if question.users and question.attack != ALONE:
            question = question._replace(users=())
        if question.version == ensembles.FAST:
            return self._of_version("standard").number(subject)
        return self.with_question(question).number(subject)

    def _of_version(self, version: str) -> "Evaluation":
        return self.with_question(self.question._replace(version=version, finish=False))

    def _check_begun(self, subject: Subject) -> None:
        """Raise if there is no evaluation of the fast version to finish."""
        number = self._of_version(ensembles.FAST).number(subject)
        records_there = records.read(self.out)
        if not hosts.first(any(r.evaluation == number and r.fast for r in records_there)):
            raise ValueError(
                f"--finish completes an evaluation by --version=fast, but {self.out} has none for "
                "this network with these images, norm, radius and seed; run --version=fast first, "
                "or leave --finish out"
            )

    def number(self, subject: Subject, **more: Any) -> str:
        """Choose the number of an evaluation, the same in all processes."""
        return self.numbered(self.identity(subject) | more)

    def numbered(self, identity: dict[str, Any]) -> str:
        """Choose the number for an identity, the same in all processes.

        The number of a finished or begun evaluation of the same network is reused, even if another
        version of this package or of JAX began it.
        """
        hosts.agree(identity)
        text = json.dumps(identity, sort_keys=True)
        for key in ("program", "gradient"):  # these differ between versions
            text = text.replace(getattr(self.fingerprint, key), key)
        question = records.number_of({"asked": text})
        chosen = earlier.number(
            self.out,
            identity,
            question,
            self.fingerprint,
            again=self.question.again,
            confirmed=self._confirms,
        )
        number = hosts.everyone(chosen)[0]
        self.questions[number] = question
        return number

    def _confirms(self, record: AccuracyRecord) -> bool:
        """Compare the clean answers of all images with the verdicts of an older version's record.

        A few may differ by rounding.
        """
        about = (
            f"the record {record.evaluation} is from an older version, which probed only eight "
            "noisy images, and the network's program has changed"
        )
        there = checked.if_there(record, self.out / "results.jsonl")
        if there is None or self.subject.keyed or jax.process_count() > 1:
            say(f"WARNING: {about}; nothing else confirms that it is for this network")
            return True
        plain = self.question._replace(attack="clean", start=None, l1_rule=None)
        if not self._clean:
            of_all = (self.subject, self.source, self.weights, plain, self.images.ids)
            self._clean.append(measuring.counted(*of_all).verdicts)
        earlier_verdicts, now = verdicts.aligned([there, self._clean[0]])
        n, changed = len(now.clean), int((earlier_verdicts.clean != now.clean).sum())
        if changed > _TURNED * n:
            say(f"{about}; {changed:,} of {n:,} clean answers differ, so it is not used")
            return False
        say(f"WARNING: {about}; only {n:,} clean answers show that it is for this network")
        return True

    def identity(self, subject: Subject) -> dict[str, Any]:
        """Return the facts that identify this evaluation."""
        source, question, network = self.source, self.question, subject.network
        classes = [hashes.classes_sha256(source.classes)] if subject.classes else []
        settings = [*subject.ball.settings().values(), question.seed, question.search_dtype]
        chosen = subject.chosen and "selection" in of_weights.training_flags(
            self._training(subject)
        )
        return {
            "network": [network.name, *self.fingerprint.exact.values()],
            "data": [
                *(source.name, source.split, question.n, question.preprocessing),
                *(self.images.content_sha256(), *classes),
            ],
            "attack": [question.method, *([] if question.attack == "clean" else settings)],
            # The record of equal weights chosen on other images differs.
            **({"chosen": subject.chosen} if chosen else {}),
            **({"replay": sorted(path.stem for path in self.given)} if self.given else {}),
            **({"replay": None} if question.noreplay else {}),
        }

    @property
    def hashed(self) -> verdicts.HashedImages:
        """The images' places in the split and their hashes."""
        return verdicts.HashedImages(self.images.ids, self.images.image_hashes())

    @property
    def batch(self) -> int:
        """The batch size of attacks with fixed steps."""
        return min(self.question.batch or self.subject.batch_size, self.question.n)

    def recorded(self, number: str) -> AccuracyRecord | None:
        """Find the record of an earlier evaluation; None if there is none."""
        return earlier.recorded(self.out, number, self.fingerprint.versions)

    def _without_replay(self, subject: Subject) -> AccuracyRecord | None:
        """With --noreplay, find the record of an evaluation that had nothing to replay."""
        if not self.question.noreplay or self.question.again:
            return None
        identity = {k: v for k, v in self.identity(subject).items() if k != "replay"}
        there = self.recorded(self.numbered(identity))
        return there if there and not there.replayed else None

    def ledger(self, number: str) -> Path:
        """Return the path of an evaluation's ledger."""
        return self.out / f"ledger-{number}.jsonl"

    def ledgers(self, number: str) -> list[Path]:
        """Find the ledgers of an evaluation, of all processes of a pod.

        A process killed before its first verdict leaves an empty file, which is skipped.
        """
        names = (f"ledger-{number}.jsonl", f"ledger-{number}.process-")
        paths = [path for path in replay.ledgers(self.out) if path.name.startswith(names)]
        return hosts.everyone(paths)[0]

    def ledgers_to_replay(self, subject: Subject, number: str) -> list[Path]:
        """Find the ledgers in this folder to replay: this network's at other radii."""
        question = self.question  # a user's attacks alone should not be helped by replay
        if question.noreplay or question.attack == ALONE or not question.replays:
            return []
        network = (self.fingerprint, subject.ball.norm)
        paths = earlier.ledgers_beside(
            self.out, number, *network, self._image_fields(), self.hashed
        )
        return hosts.everyone(list(paths))[0]  # the first process decides

    def _image_fields(self) -> dict[str, Any]:
        return {
            "dataset": self.source.name,
            "split": self.source.split,
            "ids_sha256": self.source.ids_sha256,
            "preprocessing": self.question.preprocessing,
            "image_size": self.subject.network.image_size,
        }

    def announce(self, subject: Subject, standing: np.ndarray | None = None) -> None:
        """Print which evaluation begins, on all images or on the survivors."""
        question = self.question
        images = question.n if standing is None else int(standing.sum())
        weights = f" ({self.which})" if self.which else ""
        ball = "" if question.attack == "clean" else f", {subject.ball}"
        say(
            f"{subject.network.name}{weights} on {self.source.where()}: {question.method}{ball} on "
            f"{images} images, {in_use.devices()}"
        )
        if words := idle.accelerator():
            say(f"WARNING: {words}")

    def measure(
        self,
        subject: Subject,
        number: str,
        *,
        standing: np.ndarray | None = None,
        beyond: np.ndarray | None = None,
        ledgers: Sequence[Path] = (),
        stop: StopRule | None = None,
    ) -> Measured:
        """Measure everything that the record of one threat needs."""
        if not self.question.searches:
            of, ids = (subject, self.source, self.weights), self.images.ids
            if not self.fingerprint.has_answers:  # no noisy image has, so check all clean images
                plain = self.question._replace(attack="clean", start=None, l1_rule=None)
                measuring.counted(*of, plain, ids)  # raises if none has either
            measured = measuring.counted(
                *of, self.question, ids if standing is None else ids[standing]
            )
            if not self.question.fixed:
                return measured
            slopes = reliability.check_slopes(self.fingerprint.computed_probe)
            return measured.noting(flags=measured.record.flags | slopes)
        question, labels, rows = self.question, self.images.labels(), np.arange(len(self.images))
        images: Any = self.images
        if standing is not None:
            rows = np.flatnonzero(standing)
            images, labels = Subset(self.images, rows), labels[rows]
        decides = self.logits_of("float32")
        if question.version == "rand" and not subject.keyed:
            decides = jax.tree_util.Partial(_without_keys, decides)
        searches = question.search_dtype != "float32"
        result = autoattack(
            decides,
            images,
            labels,
            **subject.ball.settings(),
            version=question.version,
            attacks=question.names,
            overrides=question.overrides(),
            seed=question.seed,
            batch_size=question.batch or subject.slots_for(len(labels)),
            image_ids=self.images.ids[rows].tolist(),
            ledger=self.ledger(number),
            identity=self.fingerprint._replace(question=self.questions[number.partition("-")[0]]),
            search_fn=self.logits_of(question.search_dtype) if searches else None,
            replay=[*ledgers, *self.given],
            robust_beyond=None if beyond is None else beyond[rows],
            rule=question.rule,
            draws=question.draws,
            stop=stop,
            users=question.users,
        )
        measured = result.measured()
        clean = measured.record.clean
        if subject.flag and standing is None and clean is not None and clean < _LOW:
            say(
                f"{subject.network.name} classifies {clean:.1%} of the clean images correctly; "
                "if it expects normalized images or [-1, 1] instead of [0, 1], "
                f"jaxrobust doctor {subject.flag} {subject.network.name} --dataset "
                f"{self.source.name} detects this; move the normalization into the network"
            )
        return measured

    @property
    def size(self) -> NetworkSize:
        """Count the network's parameters and multiply-adds."""
        if not self._size:
            net, channels = self.subject.create("float32"), self.subject.network.in_channels or 0
            self._size.append(of_weights.size(net, self.weights, self.subject.image_size, channels))
        return self._size[0]

    def write(
        self,
        number: str,
        method: str,
        record: AccuracyRecord,
        by_image: verdicts.Verdicts | None,
        begun_by: dict[str, str] | None = None,
    ) -> AccuracyRecord:
        """Write the record of a measurement in the first process, and return it."""
        subject, question, source = self.subject, self.question, self.source
        weights = None if subject.net else self.weights
        training = self._training(subject)
        labels = self.images.labels() if by_image is None else by_image.labels
        doubts = spread.choice_flags(
            source, labels, self.images.choice
        ) | of_weights.training_flags(training)
        network: NetworkFingerprint = {
            **fingerprint.resolved(self.fingerprint._asdict()),
            "images": self.images.content_sha256(),
            "question": self.questions[number],
        }
        if begun_by:
            network["begun_by"] = begun_by
        architecture: Any = dataclasses.asdict(subject.network)
        function: Any = self.function
        config = subject.config
        record = dataclasses.replace(
            record,
            config_sha256=None if config is None else hashes.config_sha256(config),
            weights=self.which,
            weights_sha256=hashes.weights_sha256(*weights) if weights else None,
            dataset=source.name,
            split=source.split,
            image_ids=record.image_ids or records.ranges(self.images.ids.tolist()),
            image_choice=self.images.choice,
            preprocessing=question.preprocessing or "",
            dtype="float32" if weights else None,
            seed=question.seed,
            flags=record.flags | doubts,
            verdicts=None if by_image is None else verdicts.file_of(number),
            interval=(
                None
                if record.stopped
                else records.intervals(record.clean, record.robust, question.n)
            ),
            costs=records.with_step_rules(record.costs or ()),
            size=self.size,
            training=training,
            ids_sha256=source.ids_sha256 or None,
            classes_sha256=hashes.classes_sha256(source.classes),
            evaluation=number,
            model=architecture,
            method=method,
            search_dtype=question.search_dtype,
            fingerprint=network,
            function=function,
        ).stamped()
        if jax.process_index() == 0:
            if by_image is not None:
                at = np.searchsorted(self.hashed.ids, by_image.image_ids)
                by_image = by_image._replace(hashes=self.hashed.hashes[at])
                verdicts.write(self.out / verdicts.file_of(number), number, by_image)
            records.append(self.out / "results.jsonl", record)
        return record

    def _training(self, subject: Subject) -> TrainingFacts | None:
        return of_weights.training(
            subject.history or [],
            dataset=self.source.name,
            split=self.source.split,
            files_sha256=self.source.files_sha256,
        )


def _without_keys(logits_fn: Any, images: Any, keys: Any) -> Any:
    del keys
    return logits_fn(images)


def claim(out: Path) -> None:
    """Make the folder; raise if it is not writable, before any long computation."""
    with folders.writing("out", out):
        out.mkdir(parents=True, exist_ok=True)
        if not os.access(out, os.W_OK):
            raise PermissionError(None, "Permission denied")
