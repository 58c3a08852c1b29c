"""Stopping rules: --against a record, until one is ahead, or --until_width of an interval."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

from jaxrobust.attacks import ensembles
from jaxrobust.data.sources import registry
from jaxrobust.evaluation.questions.stated import GivenFlags
from jaxrobust.evaluation.questions.target import Subject
from jaxrobust.evaluation.records import checked, records, stopping
from jaxrobust.evaluation.records.record import AccuracyRecord, check
from jaxrobust.evaluation.records.stopping import StopRule
from jaxrobust.evaluation.records.verdicts import HashedImages
from jaxrobust.runtime.files import jsonl
from jaxrobust.runtime.text.progress import say
from jaxrobust.weights.store import hashes

_SHOWN = 6  # evaluations listed in a message


class RecordFound(NamedTuple):
    """A record to compare with, and its file."""

    record: AccuracyRecord
    file: Path


def check_images(question: GivenFlags, images: int) -> None:
    """Raise if an evaluation of this many images cannot reach the width."""
    if question.until_width is not None:
        try:
            stopping.check_width(question.until_width / 100, question.n or images)
        except ValueError as error:
            raise ValueError(f"--until_width={question.until_width:g}: {error}") from error


def rule(
    question: GivenFlags,
    subject: Subject,
    source: registry.Source,
    images: str,
    hashed: HashedImages | None = None,
) -> tuple[StopRule, dict[str, Any]]:
    """Make the rule that the flags ask for, and the facts about the other network for the record.

    `images` is the hash of the images' content, `hashed` holds one per image; None: unknown.
    """
    alpha = 0.05 if question.alpha is None else question.alpha
    if question.until_width is not None:
        return StopRule(width=question.until_width / 100, alpha=alpha), {}
    place = str(question.against)
    here = _record_here(question, subject, source, images, hashed)
    record, file = found(place, here)
    other_verdicts = checked.verdicts(record, file)
    if count := int(checked.replayed(other_verdicts).sum()):
        raise ValueError(
            f"--against={place}: replayed points decided {count} of its images, which might have "
            "survived the attacks alone; evaluate it again with --noreplay"
        )
    if hashed is not None:
        both = (record, here, other_verdicts.images, hashed)
        if words := checked.image_differences(*both):
            raise ValueError(
                f"--against={place} evaluated different images: {words}; give an evaluation of "
                "these images"
            )
        if not checked.same_images_shown(*both):
            say(
                f"WARNING: only the image names show that --against={place} evaluated the same "
                "images; per-image hashes, which older versions did not store, are missing"
            )
    tie = None if question.tie is None else question.tie / 100
    about = {"evaluation": record.evaluation, "model": (record.model or {}).get("name")}
    return StopRule(against=other_verdicts, tie=tie, alpha=alpha), {
        "against": about | {"weights": record.weights}
    }


def _record_here(
    question: GivenFlags,
    subject: Subject,
    source: registry.Source,
    images: str,
    hashed: HashedImages | None,
) -> AccuracyRecord:
    """Build the fields that describe this evaluation's question in its future record."""
    architecture: Any = dataclasses.asdict(subject.network)
    classes = int(subject.network.num_classes or 0)
    plan = ensembles.plan(subject.norm, question.version, question.names, question.overrides())
    fitted = [ensembles.fit(setting, classes, lambda text: None) for setting in plan]
    attacks: list[Any] = [subject.ball.settings() | setting._asdict() for setting in fitted]
    return AccuracyRecord(
        dataset=source.name,
        split=source.split,
        ids_sha256=source.ids_sha256 or None,
        classes_sha256=hashes.classes_sha256(source.classes),
        image_ids=records.ranges(hashed.ids.tolist()) if hashed else "",
        preprocessing=question.preprocessing,
        model=architecture,
        method=question.method,
        search_dtype=question.search_dtype,
        attacks=attacks,
        fingerprint={"images": images},
        seed=question.seed,
    )


def found(place: str, here: AccuracyRecord) -> RecordFound:
    """Find the record named by PLACE[#NUMBER]; raise if it is not comparable with `here`."""
    folder, _, wanted = (place, "", "") if Path(place).exists() else place.partition("#")
    listed = [one for one in _listed(Path(folder)) if str(one.record.evaluation).startswith(wanted)]
    if not listed:
        number = f" {wanted}" if wanted else ""
        raise ValueError(
            f"--against={place} has no evaluation{number}; name a run, the folder of an "
            "evaluation, or its results.jsonl, and add #NUMBER to choose one of several"
        )
    wrong = [differences(one.record, here) for one in listed]
    fit = [one for one, words in zip(listed, wrong, strict=True) if not words]
    if len(fit) == 1:
        return fit[0]
    if fit:
        names = [
            f"{folder}#{record.evaluation} ({records.attack_line(record)}, {record.weights})"
            for record, _ in fit
        ]
        more = f", and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        raise ValueError(
            f"--against={place} holds {len(fit)} evaluations of this question; name one of them: "
            f"{', '.join(names[:_SHOWN])}{more}"
        )
    if len(listed) == 1:
        raise ValueError(
            f"--against={place} (there) cannot be compared with this evaluation (here): "
            f"{wrong[0]}; give the same images, radius and attacks"
        )
    raise ValueError(
        f"none of the {len(listed)} evaluations of --against={place} can be compared with this "
        f"one; the last (there) differs from it (here): {wrong[-1]}"
    )


def _listed(folder: Path) -> list[RecordFound]:
    """Read the records of a folder, a run or a file, keeping the last of each number."""
    inside = [folder / "results.jsonl", folder / "evaluation" / "results.jsonl"]
    listed: dict[tuple[Path, str], RecordFound] = {}
    for file in inside if folder.is_dir() else [folder]:
        for row in jsonl.read(file) if file.is_file() else ():
            record = AccuracyRecord.from_json(row)
            if record.evaluation and record.attacks:
                check(record, str(file))
                listed[file, record.evaluation] = RecordFound(record, file)
    return [*listed.values()]


def differences(there: AccuracyRecord, here: AccuracyRecord) -> str:
    """Say why two records cannot be compared image by image; "" if they can."""
    texts = [checked.question_differences(there, here)]
    if checked.other_pictures(there, here):
        texts.append(checked.OTHER_PICTURES)
    if not there.verdicts:
        texts.append("it has no per-image verdicts")
    order = (there.stopped or {}).get("order_seed")
    if there.stopped and order != here.seed:
        texts.append(
            f"it stopped in the image order of seed {order}, but this one uses the order of seed "
            f"{here.seed}"
        )
    return "; ".join(text for text in texts if text)
