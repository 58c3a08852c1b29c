"""When a command stops: --against a record, until one is ahead, or --until_width of an interval."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxrobust.attacks import ensembles, fixed_steps
from jaxrobust.data.sources import registry
from jaxrobust.evaluation.questions.flags import GivenFlags
from jaxrobust.evaluation.questions.questions import Question
from jaxrobust.evaluation.questions.target import Subject
from jaxrobust.evaluation.records import checked, comparable, records, stopping
from jaxrobust.evaluation.records.record import AccuracyRecord, check
from jaxrobust.evaluation.records.stopping import StopRule
from jaxrobust.evaluation.records.verdicts import HashedImages
from jaxrobust.runtime.files import jsonl
from jaxrobust.runtime.text.progress import say
from jaxrobust.weights.store import hashes

_SHOWN = 6  # evaluations that a message lists


class RecordFound(NamedTuple):
    """A record that can be compared with, and the file that holds it."""

    record: AccuracyRecord
    file: Path


def check_flags(given: GivenFlags, several: Sequence[str]) -> None:
    """Refuse flags of a stop that contradict others; `several` names flags of many evaluations."""
    own = flag(given)
    if own is None:
        known = ("tie",) if given.certify is not None else ("alpha", "tie")
        for name in known:
            if (value := getattr(given, name)) is not None:
                of = "--against, --until_width or --certify" if name == "alpha" else "--against"
                raise ValueError(f"--{name}={value:g} belongs to {of}; give that, or leave it out")
        return
    if given.certify is not None:
        raise ValueError(f"{own} stops attacks, and --certify has none; leave one of them out")
    if given.against and given.until_width is not None:
        raise ValueError("--against and --until_width each say when to stop; give one of them")
    if given.alpha is not None and not 0 < given.alpha < 1:
        raise ValueError(
            f"--alpha={given.alpha:g} is the probability of a false alarm; give one between 0 and "
            "1, such as 0.05"
        )
    if given.tie is not None and not given.against:
        raise ValueError(f"--tie={given.tie:g} belongs to --against; give that, or leave it out")
    for name in ("tie", "until_width"):
        points = getattr(given, name)
        if points is not None and not 0 < points < 100:
            raise ValueError(f"--{name}={points:g} must be above 0 and below 100 points")
    _check_beside(given, own, several)


def flag(given: GivenFlags | Question) -> str | None:
    """Name the flag that stops an evaluation; None: none does."""
    if given.against:
        return "--against"
    return None if given.until_width is None else "--until_width"


def _check_beside(given: GivenFlags, own: str, several: Sequence[str]) -> None:
    if not fixed_steps.is_cascade(given.attack):
        raise ValueError(
            f"{own} needs attacks that go on image by image, such as --attack=autoattack; leave "
            f"{given.attack} out"
        )
    if given.version == "rand":
        raise ValueError(f"{own} is of networks whose answers are fixed, not of --version=rand")
    beside = {
        "--search_dtype=bfloat16": given.search_dtype == "bfloat16",
        "--replay": bool(given.replay),
        "--worst_case": given.worst_case,
        "--union_only": given.union_only,
        "--corruptions": bool(given.corruptions),
        "--bundle": bool(given.bundle),
    }
    found = [*(name for name, there in beside.items() if there), *several]
    if found:
        raise ValueError(
            f"{own} stops one plain evaluation in float32; leave {' and '.join(found)} out, or "
            f"leave {own} out"
        )


def check_images(question: Question, images: int) -> None:
    """Refuse a width that an evaluation of so many images cannot have."""
    if question.until_width is not None:
        try:
            stopping.check_width(question.until_width / 100, question.images or images)
        except ValueError as error:
            raise ValueError(f"--until_width={question.until_width:g}: {error}") from error


def rule(
    question: Question,
    subject: Subject,
    source: registry.Source,
    images: str,
    each: HashedImages | None = None,
) -> tuple[StopRule, dict[str, Any]]:
    """Make the rule that the flags ask for, and what its record notes of the other network.

    `images` is the hash of the images' content, `each` that of each image; None: it is unknown.
    """
    alpha = 0.05 if question.alpha is None else question.alpha
    if question.until_width is not None:
        return StopRule(width=question.until_width / 100, alpha=alpha), {}
    place = str(question.against)
    ours = _ours(
        question, subject, source, images, records.ranges(each.ids.tolist()) if each else ""
    )
    other = found(place, ours)
    own = checked.verdicts(other.record, other.file)
    if count := int(comparable.replayed(own).sum()):
        raise ValueError(
            f"--against={place}: replayed points decided {count} of its images, which the attacks "
            "alone might have left standing; evaluate it again with --noreplay"
        )
    if each is not None:
        _check_images(place, other.record, ours, own.images, each)
    tie = None if question.tie is None else question.tie / 100
    name = (other.record.model or {}).get("name")
    about = {"evaluation": other.record.evaluation, "model": name, "weights": other.record.weights}
    return StopRule(against=own, tie=tie, alpha=alpha), {"against": about}


def _check_images(place: str, *both: Any) -> None:
    if words := comparable.image_differences(*both):
        raise ValueError(
            f"--against={place} is of other images: {words}; give an evaluation of these images"
        )
    if not comparable.same_images_shown(*both):
        say(
            f"WARNING: that --against={place} is of the same images is known by their names alone: "
            "no hashes of each image, which older versions did not note, show it"
        )


def _ours(
    question: Question, subject: Subject, source: registry.Source, images: str, image_ids: str
) -> AccuracyRecord:
    """Make what the record of this evaluation will say of its question."""
    architecture: Any = dataclasses.asdict(subject.network)
    classes = int(subject.network.num_classes or 0)
    how = (subject.norm, question.version, question.names, question.overrides())
    fitted = [
        ensembles.fit(setting, classes, lambda text: None) for setting in ensembles.plan(*how)
    ]
    attacks: list[Any] = [subject.ball.settings() | setting._asdict() for setting in fitted]
    return AccuracyRecord(
        dataset=source.name,
        split=source.split,
        ids_sha256=source.ids_sha256 or None,
        classes_sha256=hashes.classes_sha256(source.classes),
        image_ids=image_ids,
        preprocessing=question.preprocessing,
        model=architecture,
        method=question.method,
        search_dtype=question.search_dtype,
        attacks=attacks,
        fingerprint={"images": images},
        seed=question.seed,
    )


def found(place: str, ours: AccuracyRecord) -> RecordFound:
    """Find the record that PLACE[#NUMBER] names; refuse those that ours cannot be compared with."""
    folder, _, wanted = (place, "", "") if Path(place).exists() else place.partition("#")
    held = [one for one in _held(Path(folder)) if str(one.record.evaluation).startswith(wanted)]
    if not held:
        number = f" {wanted}" if wanted else ""
        raise ValueError(
            f"--against={place} has no evaluation{number}; name the folder of one, a run, or "
            "results.jsonl, with #NUMBER behind it where it holds several"
        )
    wrong = {id(one): differences(one.record, ours) for one in held}
    fit = [one for one in held if not wrong[id(one)]]
    if len(fit) == 1:
        return fit[0]
    if fit:
        raise ValueError(
            f"--against={place} holds {len(fit)} evaluations of this question; name one of them: "
            f"{_listed(folder, fit)}"
        )
    if len(held) == 1:
        raise ValueError(
            f"--against={place} (there) cannot be compared with this evaluation (here): "
            f"{wrong[id(held[0])]}; give the same images, radius and attacks"
        )
    raise ValueError(
        f"none of the {len(held)} evaluations of --against={place} can be compared with this one; "
        f"the last (there) differs from it (here): {wrong[id(held[-1])]}"
    )


def _held(folder: Path) -> list[RecordFound]:
    """Read the records of a folder, a run or a file, the last of each number."""
    inside = [folder / "results.jsonl", folder / "evaluation" / "results.jsonl"]
    held: dict[tuple[Path, str], RecordFound] = {}
    for file in inside if folder.is_dir() else [folder]:
        for row in jsonl.read(file) if file.is_file() else ():
            record = AccuracyRecord.from_json(row)
            if record.evaluation and record.attacks:
                check(record, str(file))
                held[file, record.evaluation] = RecordFound(record, file)
    return [*held.values()]


def _listed(folder: str, held: Sequence[RecordFound]) -> str:
    of = [
        (one.record.evaluation, records.attack_line(one.record), one.record.weights) for one in held
    ]
    names = [f"{folder}#{number} ({attack}, {which})" for number, attack, which in of]
    more = f", and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def differences(there: AccuracyRecord, here: AccuracyRecord) -> str:
    """Say why a record cannot be compared with image after image; "" if it can."""
    texts = [comparable.question_differences(there, here)]
    if comparable.other_pictures(there, here):
        texts.append(comparable.OTHER_PICTURES)
    if not there.verdicts:
        texts.append("it has no verdicts image by image")
    order = (there.stopped or {}).get("order_seed")
    if there.stopped and order != here.seed:
        texts.append(
            f"it stopped in the order of images of seed {order}, and this one has that of seed "
            f"{here.seed}"
        )
    return "; ".join(text for text in texts if text)
