"""The accuracy of a network as the command line asks for it: checked, computed, recorded, told.

Several threats and image sizes are several records, and one more of all threats together: an image
counts there if it survives every one. The threats of a run that trained with several norms are
those, where no flag names others.
"""

import contextlib
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from jaxrobust.attacks.fixed_steps import is_cascade
from jaxrobust.data import Prepared
from jaxrobust.data.sources import registry
from jaxrobust.data.splits import spread
from jaxrobust.data.stream import pipeline
from jaxrobust.evaluation.bundles import bundle
from jaxrobust.evaluation.network import first_figure
from jaxrobust.evaluation.questions import certified, corrupted, flags, questions, several, stops
from jaxrobust.evaluation.questions import target as subjects
from jaxrobust.evaluation.questions.flags import GivenFlags
from jaxrobust.evaluation.questions.questions import Question
from jaxrobust.evaluation.questions.recording import Evaluation
from jaxrobust.evaluation.questions.several import ThreatMember
from jaxrobust.evaluation.questions.target import Subject
from jaxrobust.evaluation.records import records
from jaxrobust.evaluation.records.record import AccuracyRecord
from jaxrobust.evaluation.records.records import attack_line, notes_of
from jaxrobust.runtime import rooms
from jaxrobust.runtime.commandline import threats as threat_flags
from jaxrobust.runtime.devices import compilation
from jaxrobust.runtime.text import patience
from jaxrobust.runtime.text.progress import say
from jaxrobust.types import Threat, Weights, check_threat, fraction


def answer(
    given: GivenFlags,
    sizes: Sequence[int | None] = (),
    threats: Sequence[str] = (),
    ladder: str | None = None,
) -> tuple[str, bool]:
    """Answer the command for people, and say whether this process is the one that prints it."""
    written, place = evaluated(given, sizes, threats, ladder)
    return ("", False) if jax.process_index() else (told(written, place), True)


def evaluated(
    given: GivenFlags,
    sizes: Sequence[int | None] = (),
    threats: Sequence[str] = (),
    ladder: str | None = None,
) -> tuple[list[AccuracyRecord], Path]:
    """Make the records that the command asks for, and name the folder that keeps them."""
    given = flags.placed(flags.of_shipped(given))
    flags.check(given)
    many = {"--image_size": len(sizes) > 1, "--threat": len(threats) > 1, "--ladder": bool(ladder)}
    several_of = [name for name, there in many.items() if there]
    given = flags.of_users(given, several_of)
    flags.check_fast(given, several_of)
    stops.check_flags(given, several_of)
    if given.finish:
        given = given._replace(version="standard")
    if given.worst_case:
        _three_norms().check(given, ladder)
    given = certified.settled(corrupted.settled(given))
    if given.certify is not None and (threats or ladder):
        flag = "ladder" if ladder else "threat"
        raise ValueError(f"--certify finds the radius of each image itself; leave --{flag} out")
    if given.worst_case:
        balls = _three_norms().balls(threats)
    else:
        balls = _rungs(given, threats, ladder) if ladder else _balls(given, threats)
    if len(set(sizes)) < len(sizes):
        listed = ", ".join(map(str, sizes))
        raise ValueError(f"--image_size={listed} has one of them twice; give it once")
    if given.corruptions and len(sizes) > 1:
        raise ValueError("--corruptions takes one --image_size; give it once")
    if given.bundle and given.version == "rand":
        raise ValueError("--bundle is of networks whose answers are fixed, not of --version=rand")
    bundle.check(given, max(len(sizes), 1) * max(len(balls), 1))
    if len(balls) > 1 and not (threats or ladder or given.worst_case):
        _check_own(given, balls)
    run, out = (Path(place) if place else None for place in (given.workdir, given.out))
    compilation.use_persistent_cache((run or out or Path("runs/evaluation")).parent)
    written: list[AccuracyRecord] = []
    for size in sizes or (given.image_size,):
        own = given._replace(image_size=size)
        place, more = _of_size(own, balls, bool(ladder), run=run, out=out)
        written += more
    return written, place


def told(written: Sequence[AccuracyRecord], place: Path) -> str:
    """Write records for people; `place` keeps them."""
    return _of_one(written[0], place) if len(written) == 1 else _of_several(written, place)


def _three_norms() -> Any:
    """Import the attacks of --worst_case."""
    return rooms.resolve(rooms.entries("EVALUATIONS")["worst_case"])


def _balls(given: GivenFlags, threats: Sequence[str]) -> list[Threat]:
    balls = [threat_flags.parse(text) for text in threats] or flags.own_balls(given)
    if balls and (given.norm or given.epsilon is not None):
        raise ValueError("--threat says norm and radius; leave --norm and --epsilon out")
    if len(set(balls)) < len(balls):
        raise ValueError(f"--threat={', '.join(threats)} has one of them twice; give it once")
    if balls and given.attack == "clean":
        raise ValueError("--threat has no effect on --attack=clean; leave it out")
    if given.union_only and (len(balls) < 2):
        raise ValueError("--union_only needs more than one --threat")
    return balls


def _check_own(given: GivenFlags, balls: Sequence[Threat]) -> None:
    """Refuse flags of one evaluation for all norms that a run trained in."""
    fast = "--finish" if given.finish else "--version=fast" * (given.version == "fast")
    if one := fast or stops.flag(given):
        written = [f"{ball.norm}:{fraction(ball.epsilon)}" for ball in balls]
        raise ValueError(
            f"{one} is of one evaluation, and {given.workdir} trained in {len(balls)} norms; name "
            f"one of them: --threat={' or --threat='.join(written)}"
        )


def _rungs(given: GivenFlags, threats: Sequence[str], ladder: str) -> list[Threat]:
    if threats or given.norm or given.epsilon is not None:
        raise ValueError("--ladder says norm and radii; leave --threat, --norm and --epsilon out")
    if given.union_only or given.noreplay:
        flag = "union_only" if given.union_only else "noreplay"
        raise ValueError(f"--{flag} contradicts --ladder, whose radii share what they find")
    if not is_cascade(given.attack) or given.version == "rand":
        raise ValueError(
            "--ladder needs attacks that go on image by image, such as --attack=autoattack; "
            f"leave out {'--version=rand' if given.version == 'rand' else given.attack}"
        )
    return threat_flags.ladder(ladder)


def _of_size(
    given: GivenFlags, balls: list[Threat], climbs: bool, *, run: Path | None, out: Path | None
) -> tuple[Path, list[AccuracyRecord]]:
    """Make the folder and the records of all threats at one image size, and of their union."""
    if given.worst_case:
        given = given._replace(norm="linf", epsilon=_three_norms().LINF)  # until its size is known
    elif balls:
        given = given._replace(**balls[-1].settings())  # the largest rung
    with _of("reading the network and its images"):
        origin, subject, source = flags.settled(given)
        size = subject.image_size
        which, subject, weights = flags.weights(given, subject, source)
        source = source.for_channels(subject.network.in_channels)
    shared = {key: getattr(given, key) for key in Question._fields if key in GivenFlags._fields}
    shared["preprocessing"] = subjects.preprocessing(origin, size, source, given.preprocessing)
    if given.certify is not None:
        shared |= {"draws": None, "alpha": None}  # which are of the noise
    question = Question(**shared, images=given.n)
    name = re.sub(r"[^\w.-]+", "-", subject.network.name)
    place = out or (run / "evaluation" if run else Path("runs") / f"evaluation-{name}")
    asking = _asking(given, question, subject, balls)
    for own, each in asking:
        if each.ball.epsilon or not climbs:
            questions.check(own, each, source)
    stops.check_images(question, len(source))
    if given.shipped:
        _first_figure(given, subject, source, weights)
    with _of("looking at what tells this network and these images from others"):
        evaluation = Evaluation(subject, source, which, weights, question, place)
    if climbs:
        return place, several.ladder(evaluation, [each for _, each in asking])
    if given.corruptions:
        return place, [corrupted.record(evaluation, given)]
    if given.certify is not None:
        return place, [certified.record(evaluation, given)]
    if given.bundle:
        return place, [bundle.recorded(evaluation, asking[0][1], Path(given.bundle))]
    if len(asking) == 1:
        return place, [evaluation.record(asking[0][1])]
    members = [ThreatMember(evaluation.with_question(own), each) for own, each in asking]
    written = [] if given.union_only else [own.record(each) for own, each in members]
    last = several.union(evaluation, members, written, worst_case=given.worst_case)
    return place, [*written, last]


def _first_figure(
    given: GivenFlags, subject: Subject, source: registry.Source, weights: Weights
) -> None:
    """Say the clean accuracy before anything else compiles, and what may follow it."""
    how = pipeline.preprocessing_id(source, subject.image_size, given.preprocessing)
    number = min(given.n or len(source), len(source))
    sizes: Any = {"image_size": subject.image_size, "preprocessing": how, "images": number}
    share = first_figure.clean(subject.create("float32"), weights, Prepared(source, **sizes))
    name = given.shipped
    say(f"{name}: {share:.1%} of {number} images of {subject.dataset} are right without an attack")
    if given.attack != questions.AUTOATTACK:
        ball = subject.ball
        say(
            f"{name}: {given.attack} follows, {ball.norm} {ball.epsilon:.4g}; the whole AutoAttack "
            f"is the full command, jaxrobust evaluate --weights {name} --dataset "
            f"{subject.dataset} --norm {ball.norm} --epsilon {ball.epsilon:.4g}"
        )


def _of(what: str) -> contextlib.AbstractContextManager:
    return patience.of(what, here=jax.process_index() == 0)


def _asking(
    given: GivenFlags, question: Question, subject: Subject, balls: list[Threat]
) -> list[tuple[Question, Subject]]:
    """Pair questions with balls: the same question for all of them, but of a worst case."""
    if not given.worst_case:
        return [(question, subject.within(ball)) for ball in balls] or [(question, subject)]
    size, channels = subject.image_size, subject.network.in_channels or 3
    for ball in balls:
        check_threat(ball, size, channels)
    three_norms = _three_norms()
    radii = three_norms.radii(size, balls)
    return [
        (own, subject.within(radii[norm]))
        for norm, own in three_norms.questions(question, skips=given.union_only)
    ]


def _of_several(written: Sequence[AccuracyRecord], out: Path) -> str:
    rows = [("attack", "px", "clean", "robust", "95 % interval")]
    for record in written:
        ends = record.interval or {"clean": None, "robust": None}
        low, high = ends["robust"] or ends["clean"] or (math.nan, math.nan)
        method = attack_line(record) if record.attacks else str(record.method)
        accuracies = (_percent(record.clean), _percent(record.robust))
        rows.append((method, str(record.image_size), *accuracies, f"{low:.1%} to {high:.1%}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(map(str.rjust, row[1:], widths[1:]))]) for row in rows
    ]
    first = written[0]
    weights = f" ({first.weights})" if first.weights else ""
    flags = dict.fromkeys(f"flag {k}: {text}" for r in written for k, text in r.flags.items())
    remarks = dict.fromkeys(line for record in written for line in notes_of(record))
    head = [f"\n{_network(first)}{weights}"]
    head.append(f"{first.dataset}, split {first.split}, {_images(first)}")
    numbers = ", ".join(str(record.evaluation) for record in written)
    last = f"records {numbers} in {out / 'results.jsonl'}"
    return "\n".join([*head, *lines, *remarks, *flags, last])


def _of_one(record: AccuracyRecord, out: Path) -> str:
    """Write a record of an evaluation for people; `out` is the folder that keeps it."""
    rows = {} if record.clean is None else {"clean": record.clean}
    rows |= {f"after {k}": v for k, v in (record.accuracy_after or {}).items() if v is not None}
    width = max([16, *map(len, rows)])
    weights = f" ({record.weights}), {record.dtype}" if record.weights else ""
    lines = [
        f"\n{_network(record)}{weights}",
        f"{record.dataset}, split {record.split}, {_images(record)}",
        f"attack: {attack_line(record)}",
        *(f"{name:{width}} {value:7.1%}" for name, value in rows.items()),
        *(corrupted.table(record.corruptions) if record.corruptions else ()),
        *(certified.table(record.certified) if record.certified else ()),
        *notes_of(record),
        *(f"flag {name}: {text}" for name, text in record.flags.items()),
        f"record {record.evaluation} in {out / 'results.jsonl'}",
    ]
    return "\n".join(lines)


def _images(record: AccuracyRecord) -> str:
    """Name the images; of those that were spread, or stopped at, the record has the long list."""
    if record.stopped:
        return f"{record.stopped['stopped_after']:,} images in a random order"
    if record.image_choice == spread.HASH:
        return f"{records.images_of(record):,} images, spread over its classes"
    return f"images {record.image_ids}"


def _network(record: AccuracyRecord) -> str:
    return str((record.model or {}).get("name"))


def _percent(accuracy: float | None) -> str:
    return "-" if accuracy is None else f"{accuracy:.1%}"
