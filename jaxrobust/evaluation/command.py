"""The accuracy of a network as the command line asks for it: checked, computed, recorded, told.

Several threats and image sizes are several records, and one more of all threats together: an image
counts there if it survives every one.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxrobust.data import pipeline, sources
from jaxrobust.evaluation import flags, measuring, questions, records, verdicts
from jaxrobust.evaluation import subject as subjects
from jaxrobust.evaluation.flags import Given
from jaxrobust.evaluation.questions import Question, Threat
from jaxrobust.evaluation.subject import Subject
from jaxrobust.evaluation.verdicts import Verdicts
from jaxrobust.runtime import compilation, hardware, hosts
from jaxrobust.runtime.progress import say
from jaxrobust.types import Weights
from jaxrobust.weights import hashes
from jaxrobust.weights.checkpoint import disk_full

Record = dict[str, Any]


def answer(
    given: Given, sizes: Sequence[int | None] = (), threats: Sequence[str] = ()
) -> tuple[str, bool]:
    """Return the answer for people, and whether this process is the one that prints it.

    Args:
      given: the flags.
      sizes: the sides of images to evaluate at, one after the other; none: `given.image_size`.
      threats: the balls, NORM:RADIUS; none: norm and radius of `given`.
    Raises:
      ValueError: flags that contradict each other or the weights, before anything compiles.
    """
    given = flags.placed(given)
    flags.check(given)
    balls = _balls(given, threats)
    if len(set(sizes)) < len(sizes):
        said = ", ".join(map(str, sizes))
        raise ValueError(f"--image_size={said} has one of them twice; give it once")
    run, out = (Path(place) if place else None for place in (given.workdir, given.out))
    compilation.use_persistent_cache((run or out or Path("runs/evaluation")).parent)
    found: list[Record] = []
    for size in sizes or (given.image_size,):
        place, more = _of_size(given._replace(image_size=size), balls, run=run, out=out)
        found += more
    if jax.process_index():
        return "", False
    return (
        records.answer(found[0], place) if len(found) == 1 else records.table(found, place)
    ), True


def _balls(given: Given, threats: Sequence[str]) -> list[Threat]:
    """Return the threats of the flags, none where norm and radius are one or the run's.

    Raises:
      ValueError: none that can be meant, one that is there twice, or both forms.
    """
    balls = [questions.threat(text) for text in threats]
    if balls and (given.norm or given.epsilon is not None):
        raise ValueError("--threat says norm and radius; leave --norm and --epsilon out")
    if len(set(balls)) < len(balls):
        raise ValueError(f"--threat={', '.join(threats)} has one of them twice; give it once")
    if balls and given.attack == "clean":
        raise ValueError("--threat has no effect on --attack=clean; leave it out")
    if given.union_only and (len(balls) < 2):
        raise ValueError("--union_only needs more than one --threat")
    return balls


def _of_size(
    given: Given, balls: list[Threat], *, run: Path | None, out: Path | None
) -> tuple[Path, list[Record]]:
    """Return the folder and the records of all threats at one image size, and of their union."""
    origin = flags.origin(given)
    one = balls[0] if balls else None
    subject, source = subjects.settled(
        origin,
        network={"num_classes": given.num_classes, "image_size": given.image_size},
        dataset=given.dataset,
        split=given.split,
        classes=given.classes,
        data_dir=given.data_dir,
        norm=one.norm if one else given.norm,
        epsilon=one.epsilon if one else given.epsilon,
    )
    size = known(subject.network.image_size)
    which, subject, weights = flags.weights(given, subject, source)
    asked = Question(
        attack=given.attack,
        version=given.version,
        images=given.n,
        batch=given.batch,
        seed=given.seed,
        preprocessing=subjects.preprocessing(origin, size, source, given.preprocessing),
        search_dtype=given.search_dtype,
        steps=given.steps,
        targets=given.targets,
        restarts=given.restarts,
        relative_step=given.relative_step,
        union_only=given.union_only,
    )
    name = re.sub(r"[^\w.-]+", "-", subject.network.name)
    place = out or (run / "evaluation" if run else Path("runs") / f"evaluation-{name}")
    several = [replace(subject, norm=b.norm, epsilon=b.epsilon) for b in balls] or [subject]
    for each in several:
        questions.check(asked, each, source)
    evaluation = Evaluation(several[0], source, which, weights, asked, place)
    if len(several) == 1:
        return place, [evaluation.record(several[0])]
    found = [] if given.union_only else [evaluation.record(each) for each in several]
    return place, [*found, evaluation.union(several, found)]


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
        source: sources.Source,
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
        _claim(out)
        self.subject, self.source, self.which, self.weights = subject, source, which, weights
        self.out = out
        self.sha256 = subject.arrays_sha256 or hashes.weights_sha256(*weights)
        self.function = subject.origin()
        self.logits_of = measuring.networks_of(subject, weights)
        self.size: dict[str, int] | None = None

    def record(self, subject: Subject) -> Record:
        """Return the record of one ball, computed unless it is there.

        The processes of a pod share the images; all get the record, the first one writes it.
        """
        identity = self.identity(subject)
        hosts.agree(identity)
        number = records.number_of(identity)
        if there := self.there(number):
            return there
        self.tell(subject)
        found = self.found(subject, number)
        return self.kept(number, self.asked.method, found)

    def identity(self, subject: Subject) -> dict[str, Any]:
        """Return what tells this evaluation from others."""
        source, asked, network = self.source, self.asked, subject.network
        own = subject.classes or source.name.startswith("folder:")
        replaced = source.name.startswith(("npz:", "hf:"))  # by other data under the same name
        chosen = [source.ids_sha256, hashes.classes_sha256(source.classes) if own else None]
        chosen += [source.files_sha256] if replaced else []
        how = [subject.norm, subject.epsilon, asked.seed, asked.search_dtype]
        return {
            "network": [
                network.name,
                network.image_size,
                dict(network.options),
                self.sha256,
                *self.made,
            ],
            "data": [
                source.name,
                source.split,
                asked.images,
                asked.preprocessing,
                *(value for value in chosen if value),
            ],
            "attack": [asked.method, *([] if asked.attack == "clean" else how)],
        }

    @property
    def made(self) -> list[str]:
        """Return the hash of the user's function that is the network or makes it, if one does."""
        return [self.function["sha256"]] if self.function else []

    def there(self, number: str) -> Record | None:
        """Return the record of an evaluation that was done before; None: it was not."""
        known = [r for r in records.read(self.out) if r.get("evaluation") == number]
        if not hosts.first(bool(known)):
            return None
        if not known:  # a host that does not see the first one's records
            return {"evaluation": number}
        say(f"done before, {known[-1]['time']}; nothing is computed (to do it again: --out DIR)")
        return known[-1]

    def tell(self, subject: Subject) -> None:
        """Say what begins."""
        said = f" ({self.which})" if self.which else ""
        ball = "" if self.asked.attack == "clean" else f", {subject.norm} {subject.epsilon:.4g}"
        say(
            f"{subject.network.name}{said} on {self.source.where()}: {self.asked.method}{ball} on "
            f"{self.asked.images} images, {hardware.devices()}"
        )
        if idle := hardware.left_idle():
            say(f"WARNING: {idle}")

    def found(
        self, subject: Subject, number: str, standing: np.ndarray | None = None
    ) -> dict[str, Any]:
        """Compute what one ball's record needs."""
        if not self.asked.searches:
            return measuring.counted(subject, self.source, self.weights, self.asked)
        return measuring.searched(
            subject,
            self.source,
            self.logits_of,
            self.asked,
            name=" ".join([subject.network.name, self.sha256, *self.made, "float32"]),
            ledger=self.out / f"ledger-{number}.jsonl",
            standing=standing,
        )

    def union(self, several: list[Subject], done: list[Record]) -> Record:
        """Return the record of all balls: an image is robust if nothing in any of them fools it.

        `done` are their records; without, what one ball has fooled is not attacked in the next.
        """
        identity = {"union": [self.identity(subject) for subject in several], "all": bool(done)}
        number = records.number_of(identity)
        if there := self.there(number):
            return there
        if done and jax.process_index():  # the records of the first process are enough
            return {"evaluation": number}
        found = [_of_record(record, self.out) for record in done]
        for count, subject in enumerate(several if not done else ()):
            self.tell(subject)
            standing = _joined(found, several).robust if count else None
            found.append(self.found(subject, f"{number}-{count}", standing))
        return self.kept(number, "union", _united(found, several))

    def kept(self, number: str, method: str, found: dict[str, Any]) -> Record:
        """Return the record of what was found, written by the first process."""
        found = dict(found)
        after, each, costs = (found.pop(key) for key in ("accuracy_after", "verdicts", "costs"))
        top5 = {key: found.pop(key) for key in ("clean_top5",) if key in found}
        subject, asked, source = self.subject, self.asked, self.source
        network = subject.network
        file = verdicts.file_of(number)
        if self.size is None:
            size, channels = known(network.image_size), known(network.in_channels)
            self.size = records.size(subject.create("float32"), self.weights, size, channels)
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
                "training": _training(subject, self.which),
            },
            **found,
            more={
                "evaluation": number,
                "model": asdict(network),
                "method": method,
                "search_dtype": asked.search_dtype,
                "accuracy_after": after,
            }
            | top5
            | ({"function": self.function} if self.function else {}),
        )
        if jax.process_index() == 0:
            verdicts.write(self.out / file, number, each)
            records.append(self.out / "results.jsonl", record)
        return record


def _of_record(record: Record, out: Path) -> dict[str, Any]:
    """Return what a record that is there says, as `measuring` does."""
    keys = ("attacks", "clean", "robust", "flags", "costs", "accuracy_after")
    return {key: record[key] for key in keys} | {
        "verdicts": verdicts.read(out / str(record["verdicts"]))
    }


def _joined(found: list[dict[str, Any]], several: list[Subject]) -> Verdicts:
    """Return the verdicts of all balls: the first of them that fools an image has its name there.

    Those after the first may know only images that stood before them.
    """
    first = found[0]["verdicts"]
    fooled_by = np.array(first.fooled_by, dtype=object)
    norms = np.array(first.norms)
    for each, subject in zip(found, several, strict=False):
        own = each["verdicts"]
        places = np.searchsorted(first.image_ids, own.image_ids)
        hit = own.clean & ~own.robust
        new = hit & ((fooled_by[places] == "") | (own is first))
        ball = Threat(subject.norm, float(subject.epsilon or 0))
        fooled_by[places[new]] = [f"{ball}: {name}" for name in own.fooled_by[new]]
        norms[places[new]] = own.norms[new]
    return first._replace(fooled_by=fooled_by.astype(str), norms=norms)


def _united(found: list[dict[str, Any]], several: list[Subject]) -> dict[str, Any]:
    """Return what the record of a union needs, from what was found in each ball."""
    after = {}
    for count, subject in enumerate(several, 1):
        ball = Threat(subject.norm, float(subject.epsilon or 0))
        after[str(ball)] = float(_joined(found[:count], several).robust.mean())
    whole = _joined(found, several)
    flags = {
        f"{Threat(subject.norm, float(subject.epsilon or 0))}: {name}": text
        for each, subject in zip(found, several, strict=True)
        for name, text in each.get("flags", {}).items()
    }
    return {
        "attacks": [settings for each in found for settings in each["attacks"]],
        "clean": float(whole.clean.mean()),
        "robust": float(whole.robust.mean()),
        "accuracy_after": after,
        "flags": flags,
        "verdicts": whole,
        "costs": [cost for each in found for cost in each["costs"]],
    }


def _training(subject: Subject, which: str | None) -> dict[str, Any] | None:
    """Return what is known of how the weights were trained, if they are a run's."""
    if not (which and isinstance(subject.config, dict) and "phases" in subject.config):
        return None
    return records.training(subject.config, which.partition(",")[0])


def _claim(out: Path) -> None:
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
