"""The records of an evaluation: each is computed unless it is there, and kept with its verdicts."""

import copy
import itertools
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxrobust.data import Prepared
from jaxrobust.data.sources import registry
from jaxrobust.data.stream import pipeline
from jaxrobust.evaluation.engine import replay
from jaxrobust.evaluation.network import fingerprint, reliability, tracing
from jaxrobust.evaluation.questions import measuring
from jaxrobust.evaluation.questions.questions import Question
from jaxrobust.evaluation.questions.target import Subject
from jaxrobust.evaluation.records import records, trained, verdicts
from jaxrobust.runtime.devices import hardware
from jaxrobust.runtime.processes import hosts
from jaxrobust.runtime.text.progress import say
from jaxrobust.types import Weights
from jaxrobust.weights.store import hashes
from jaxrobust.weights.store.checkpoint import disk_full

Record = dict[str, Any]
_LOW = 0.5  # clean accuracy
# What only some records have.
_SAID = (
    *("clean_top5", "stable", "local_lipschitz", "ladder", "corruptions"),
    *("worst_case", "union"),
    *records.SAID,
)


class Evaluation:
    """A network and its images, of which several things are asked; what compiles is shared.

    Attributes:
      which: the weights in words; None: they have no name.
      weights: f32, on all devices.
      out: holds the records, and the ledgers that interrupted evaluations continue from; of a pod,
        a folder that all hosts see.
    """

    def __init__(
        self,
        subject: Subject,
        source: registry.Source,
        which: str | None,
        weights: Weights,
        asked: Question,
        out: Path,
    ) -> None:
        """Take a settled subject, of whatever ball, and a checked question."""
        if asked.images > len(source):
            say(f"{source.where()} has {len(source)} images, not {asked.images}: taking all")
        size = known(subject.network.image_size)
        self.asked = asked._replace(
            images=min(len(source), asked.images or len(source)),
            preprocessing=pipeline.preprocessing_id(source, size, asked.preprocessing),
        )
        claim(out)
        self.subject, self.source, self.which, self.weights = subject, source, which, weights
        self.out = out
        self.function = subject.origin()
        self.logits_of = measuring.networks_of(subject, weights)
        self.images = Prepared(
            source,
            image_size=size,
            preprocessing=str(self.asked.preprocessing),
            images=self.asked.images,
        )
        self.given = [path for folder in asked.replay for path in self.replayed(Path(folder))]
        logits_fn = self.logits_of("float32")
        here = Mesh(np.array(jax.local_devices()[:1]), ("device",))
        network = tracing.argument("logits_fn", logits_fn, here)
        self.fingerprint = fingerprint.of_network(
            network, self.images, each=self.batch, keyed=subject.keyed
        )
        self.questions: dict[str, str] = {}  # number -> hash of what is asked
        self.size: dict[str, int] = {}  # once it is known, to all that asks of this network

    def asking(self, asked: Question) -> "Evaluation":
        """Return what asks a checked question of the same network and images."""
        settled = {key: getattr(self.asked, key) for key in ("images", "preprocessing")}
        if (asked := asked._replace(**settled)) == self.asked:
            return self
        other = copy.copy(self)
        other.asked, other.given = asked, self.given if asked.replay else []
        return other

    def replayed(self, folder: Path) -> list[Path]:
        """Return the ledgers of a folder of --replay.

        Raises:
          ValueError: there are none, or they are of other images.
        """
        found = replay.ledgers(folder)
        if not found:
            raise ValueError(
                f"--replay={folder} has no ledger; name the folder of an evaluation, such as "
                "RUN/evaluation"
            )
        for record in records.read(folder):
            if words := self.apart(record):
                raise ValueError(
                    f"--replay={folder} is of other images: {words}; replay an evaluation of these"
                )
        return found

    def record(self, subject: Subject) -> Record:
        """Return the record of one ball, computed unless it is there.

        The processes of a pod share the images; all get the record, the first one writes it.
        """
        number = self.number(subject)
        if there := self.there(number) or self.plain(subject):
            return there
        self.tell_older(subject)
        self.tell(subject)
        found = self.found(subject, number, ledgers=self.own(subject, number))
        return self.kept(number, self.asked.method, found)

    def number(self, subject: Subject, **more: Any) -> str:
        """Return the number of an evaluation, the same in all processes."""
        return self.numbered(self.identity(subject) | more)

    def numbered(self, identity: dict[str, Any]) -> str:
        """Return the number of what has this identity, the same in all processes.

        It is that of an evaluation which is there, done or begun, if that is of the same network:
        also of one that another version of this package or of JAX began. With `again` it is one
        that no record has.
        """
        hosts.agree(identity)
        exact, question = records.number_of(identity), self._question(identity)
        number = hosts.everyone(self._number_there(identity, exact, question))[0]
        self.questions[number] = question
        return number

    def _question(self, identity: dict[str, Any]) -> str:
        """Hash an identity but for the network's programs, which versions write differently."""
        text = json.dumps(identity, sort_keys=True)
        for key in ("program", "gradient"):
            text = text.replace(getattr(self.fingerprint, key), key)
        return records.number_of({"asked": text})

    def _number_there(self, identity: dict[str, Any], exact: str, question: str) -> str:
        done = {r.get("evaluation"): r for r in records.read(self.out)}
        if self.asked.again:
            numbers = (records.number_of(identity | {"again": k}) for k in itertools.count(1))
            return next(number for number in numbers if number not in done)
        known = {number: r.get("fingerprint") for number, r in done.items() if number}
        for path in replay.ledgers(self.out):
            known.setdefault(_number_in(path), replay.header(path).get("fingerprint"))
        same = {
            number: theirs
            for number, theirs in known.items()
            if theirs and not fingerprint.apart(theirs, self.fingerprint._asdict())
        }
        if exact in same or exact not in known:
            asked = [key for key, theirs in same.items() if theirs.get("question") == question]
            asked.sort(key=lambda number: (number not in done, number != exact))
            return asked[0] if asked else exact
        # A program calls code that its text does not show, such as a callback's, which has changed.
        numbers = (records.number_of(identity | {"unlike": k}) for k in itertools.count(1))
        return next(number for number in numbers if number in same or number not in known)

    def identity(self, subject: Subject) -> dict[str, Any]:
        """Return what tells this evaluation from others."""
        source, asked, network = self.source, self.asked, subject.network
        classes = [hashes.classes_sha256(source.classes)] if subject.classes else []
        how = [*subject.ball.settings().values(), asked.seed, asked.search_dtype]
        seen = trained.seen_before(_training(subject, self.which, source))
        return {
            "network": [network.name, *self.fingerprint.exact.values()],
            "data": [
                source.name,
                source.split,
                asked.images,
                asked.preprocessing,
                self.images.content_sha256(),
                *classes,
            ],
            "attack": [asked.method, *([] if asked.attack == "clean" else how)],
            # Equal weights that were chosen elsewhere have a record which says otherwise.
            **({"chosen": subject.chosen} if subject.chosen and "selection" in seen else {}),
        } | self.replays()

    def replays(self) -> dict[str, Any]:
        """Return what of an evaluation's identity says which others are replayed."""
        there = {"replay": sorted(path.stem for path in self.given)} if self.given else {}
        return there | ({"replay": None} if self.asked.noreplay else {})

    @property
    def batch(self) -> int:
        """Return the images that attacks of fixed steps take at a time."""
        return min(self.asked.batch or self.subject.batch_size, self.asked.images)

    def there(self, number: str) -> Record | None:
        """Return the record of an evaluation that was done before; None: it was not."""
        known = [r for r in records.read(self.out) if r.get("evaluation") == number]
        if not hosts.first(bool(known)):
            return None
        if not known:  # a host that does not see the first one's records
            return {"evaluation": number}
        say(
            f"done before, {known[-1]['time']}{self._otherwise(known[-1])}; nothing is computed "
            "(--again computes it anew beside that)"
        )
        return known[-1]

    def _otherwise(self, record: Record) -> str:
        """Say which versions made a record, if they are not today's."""
        here = self.fingerprint.versions
        theirs = (record.get("fingerprint") or {}).get("versions") or {}
        if not fingerprint.other_versions(theirs, here):
            return ""
        return f", by {fingerprint.words(theirs)} (here: {fingerprint.words(here)})"

    def tell_older(self, subject: Subject) -> None:
        """Say that a record of an older version seems to answer, but does not prove of what."""
        ours = {
            "dataset": self.source.name,
            "split": self.source.split,
            "method": self.asked.method,
            "seed": self.asked.seed,
            "image_ids": records.ids_of(self.asked.images),
            "weights": self.which,
        }
        for record in records.read(self.out):
            ball = [(a.get("norm"), a.get("epsilon")) for a in record["attacks"][:1]]
            alike = all(record.get(key) == value for key, value in ours.items())
            alike = alike and ball in ([], [tuple(subject.ball.settings().values())])
            if alike and "evaluation" in record and "fingerprint" not in record:
                say(
                    f"the record of {record['time']} (commit {record['commit'][:12]}) in {self.out}"
                    " is of an older version, which noted neither what the network computes nor "
                    "the images' bytes: it may be of others, and is not taken for an answer"
                )
                return

    def plain(self, subject: Subject) -> Record | None:
        """Return the record of an evaluation that found nothing to replay, if none is to be."""
        if not self.asked.noreplay or self.asked.again:
            return None
        identity = {k: v for k, v in self.identity(subject).items() if k != "replay"}
        there = self.there(self.numbered(identity))
        return there if there and not there.get("replayed") else None

    def ledger(self, number: str) -> Path:
        """Return the file that an evaluation continues from."""
        return self.out / f"ledger-{number}.jsonl"

    def ledgers(self, number: str) -> list[Path]:
        """Return the files of an evaluation, those of all processes of a pod."""
        there = [self.ledger(number), *self.out.glob(f"ledger-{number}.process-*.jsonl")]
        return hosts.everyone(sorted(path for path in there if path.exists()))[0]

    def own(self, subject: Subject, number: str) -> list[Path]:
        """Return the ledgers of this folder that are replayed: this network's at other radii."""
        if self.asked.noreplay or not self.asked.replays:
            return []
        done = {r.get("evaluation"): r for r in records.read(self.out)}
        found = []
        for path in replay.ledgers(self.out):
            of = _number_in(path)
            if of == number or of not in done or self.apart(done[of]):
                continue
            head = replay.header(path)
            same = replay.network_of(head) == list(self.fingerprint.exact.values())
            if same and head["norm"] == subject.norm:
                found.append(path)
        return hosts.everyone(found)[0]  # as the first process sees the folder

    def apart(self, record: Record) -> str:
        """Return in words how the images of a record differ from these; nothing where unknown."""
        source, network = self.source, self.subject.network
        ours = {
            "dataset": source.name,
            "split": source.split,
            "ids_sha256": source.ids_sha256,
            "preprocessing": self.asked.preprocessing,
            "image_size": network.image_size,
        }
        theirs = {key: record.get(key) for key in ours}
        theirs["image_size"] = (record.get("model") or {}).get("image_size")
        return hosts.differences({k: v for k, v in theirs.items() if v is not None}, ours)

    def tell(self, subject: Subject, standing: np.ndarray | None = None) -> None:
        """Say what begins, on all images or on those that stand."""
        images = self.asked.images if standing is None else int(standing.sum())
        said = f" ({self.which})" if self.which else ""
        ball = "" if self.asked.attack == "clean" else f", {subject.ball}"
        say(
            f"{subject.network.name}{said} on {self.source.where()}: {self.asked.method}{ball} on "
            f"{images} images, {hardware.devices()}"
        )
        if idle := hardware.left_idle():
            say(f"WARNING: {idle}")

    def found(
        self,
        subject: Subject,
        number: str,
        *,
        standing: np.ndarray | None = None,
        beyond: np.ndarray | None = None,
        ledgers: Sequence[Path] = (),
    ) -> dict[str, Any]:
        """Compute what one ball's record needs.

        Args:
          standing: bool[N], the only images to look at; None: all.
          beyond: bool[N], robust at a larger radius; None: not known.
          ledgers: what is replayed, beside what the flags name.
        """
        if not self.asked.searches:
            self.check_answers()
            how = (subject, self.source, self.weights, self.asked)
            found = measuring.counted(*how, standing=standing)
            slopes = (
                reliability.check_slopes(self.fingerprint.computed_probe)
                if self.asked.fixed
                else {}
            )
            return found | {"flags": found["flags"] | slopes}
        found = measuring.searched(
            subject,
            self.images,
            self.logits_of,
            self.asked,
            known=self.fingerprint._replace(question=self.questions[number.partition("-")[0]]),
            ledger=self.ledger(number),
            standing=standing,
            beyond=beyond,
            replay=[*ledgers, *self.given],
        )
        if subject.flag and standing is None and found["clean"] < _LOW:
            say(
                f"{subject.network.name} is right on {found['clean']:.1%} of the clean images; if "
                "it expects others than those in [0, 1], such as normalised ones or [-1, 1], "
                f"jaxrobust doctor {subject.flag} {subject.network.name} --dataset "
                f"{self.source.name} finds it, and the normalisation belongs into the network"
            )
        return found

    def check_answers(self) -> None:
        """Refuse a network of which no image has finite logits, before anything is attacked.

        The images are looked at if those noisy ones that the fingerprint has seen had none.
        Raises:
          ValueError: with what to do.
        """
        if not self.fingerprint.has_answers:
            clean = self.asked._replace(attack="clean", start=None, l1_rule=None)
            measuring.counted(self.subject, self.source, self.weights, clean)

    def kept(self, number: str, method: str, found: dict[str, Any]) -> Record:
        """Return the record of what was found, written by the first process."""
        found = dict(found)
        after, each, costs = (found.pop(key) for key in ("accuracy_after", "verdicts", "costs"))
        begun_by = found.pop("begun_by", None)
        said = {key: found.pop(key) for key in _SAID if key in found}
        subject, asked, source = self.subject, self.asked, self.source
        network = subject.network
        file = None if each is None else verdicts.file_of(number)
        if not self.size:
            side, channels = known(network.image_size), known(network.in_channels)
            net = subject.create("float32")
            self.size.update(records.size(net, self.weights, side, channels))
        known_training = _training(subject, self.which, source)
        found["flags"] = (found.get("flags") or {}) | trained.seen_before(known_training)
        record = records.accuracy_record(
            config=subject.config,
            weights=self.which,
            params=None if subject.net else self.weights.params,
            stats=None if subject.net else self.weights.stats,
            dataset=source.name,
            split=source.split,
            image_ids=records.ids_of(asked.images),
            preprocessing=asked.preprocessing or "",
            dtype=None if subject.net else "float32",
            seed=asked.seed,
            ids_sha256=source.ids_sha256,
            classes=source.classes,
            n=asked.images,
            known={
                "verdicts": file,
                "costs": costs,
                "size": self.size,
                "training": known_training,
            },
            **found,
            more={
                "evaluation": number,
                "model": asdict(network),
                "method": method,
                "search_dtype": asked.search_dtype,
                "accuracy_after": after,
                "fingerprint": fingerprint.told(self.fingerprint._asdict())
                | {"images": self.images.content_sha256(), "question": self.questions[number]}
                | ({"begun_by": begun_by} if begun_by else {}),
            }
            | said
            | ({"function": self.function} if self.function else {}),
        )
        if jax.process_index() == 0:
            if file:
                verdicts.write(self.out / file, number, each)
            records.append(self.out / "results.jsonl", record)
        return record


def _training(
    subject: Subject, which: str | None, source: registry.Source
) -> dict[str, Any] | None:
    """Return what is known of how the weights were trained, if they are a run's."""
    if not (which and isinstance(subject.config, dict) and "phases" in subject.config):
        return None
    on: dict[str, Any] = {"dataset": source.name, "split": source.split, "chosen": subject.chosen}
    return trained.training(subject.config, which.partition(",")[0], **on)


def _number_in(path: Path) -> str:
    """Return the number of the evaluation that a ledger is of, by its name."""
    return path.stem.removeprefix("ledger-").partition(".")[0].partition("-")[0]


def claim(out: Path) -> None:
    """Make the folder; refuse one that cannot be written, before hours go into it."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not os.access(out, os.W_OK):
            raise PermissionError(None, "Permission denied")
    except OSError as error:
        if disk_full(error):
            raise
        raise ValueError(
            f"cannot write to --out {out} ({error.strerror}); name a folder that can be written"
        ) from error


def known(size: int | None) -> int:
    """Return what a settled subject knows."""
    assert size is not None, "settled"
    return size
