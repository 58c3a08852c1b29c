"""The evaluation command: check the flags, compute, record and report accuracies.

Each threat and image size gets a record, and one more covers all threats together: there an image
counts if it survives every threat. For a run trained with several norms, the default threats are
those of its training.
"""

import contextlib
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from jaxrobust.attacks.fixed_steps import is_cascade
from jaxrobust.data import Prepared
from jaxrobust.data.sources import registry
from jaxrobust.data.splits import spread
from jaxrobust.data.stream import pipeline
from jaxrobust.evaluation.bundles import bundle
from jaxrobust.evaluation.engine import accuracy
from jaxrobust.evaluation.questions import (
    certified,
    corrupted,
    mistakes,
    questions,
    recording,
    several,
    stated,
    stops,
)
from jaxrobust.evaluation.questions import flags as flag_rules
from jaxrobust.evaluation.questions import target as subjects
from jaxrobust.evaluation.questions.recording import Evaluation
from jaxrobust.evaluation.questions.several import ThreatMember
from jaxrobust.evaluation.questions.stated import GivenFlags
from jaxrobust.evaluation.questions.target import Subject
from jaxrobust.evaluation.records import records
from jaxrobust.evaluation.records.record import AccuracyRecord
from jaxrobust.evaluation.records.records import attack_line, notes_of
from jaxrobust.runtime import rooms
from jaxrobust.runtime.commandline import threats as threat_flags
from jaxrobust.runtime.devices import compilation
from jaxrobust.runtime.files import locks
from jaxrobust.runtime.processes import hosts
from jaxrobust.runtime.text import patience
from jaxrobust.runtime.text.progress import say
from jaxrobust.types import Threat, Weights, check_threat, fraction


def answer(
    flags: GivenFlags,
    sizes: Sequence[int | None] = (),
    threats: Sequence[str] = (),
    ladder: str | None = None,
    radius_at: int | None = None,
) -> tuple[str, bool]:
    """Return the command's report for people, and whether this process should print it."""
    records_and_place = evaluated(flags, sizes, threats, ladder, radius_at)
    return ("", False) if jax.process_index() else (told(*records_and_place), True)


def evaluated(
    flags: GivenFlags,
    sizes: Sequence[int | None] = (),
    threats: Sequence[str] = (),
    ladder: str | None = None,
    radius_at: int | None = None,
) -> tuple[list[AccuracyRecord], Path]:
    """Return the records that the command asks for, and their folder.

    `radius_at`: the image size at which the threats have their radius, which grows with the size.
    """
    words = [str(part) for part in (flags, sizes, threats, ladder, radius_at)]
    lock = f"command-{records.number_of({'command': words})}.lock"
    flags, balls = _checked(flags, sizes, threats, ladder, radius_at)
    run, out = (Path(place) if place else None for place in (flags.workdir, flags.out))
    compilation.use_persistent_cache((run or out or Path("runs/evaluation")).parent)
    written: list[AccuracyRecord] = []
    for size in sizes or (flags.image_size,):
        grown, of_size = balls, flags._replace(image_size=size)
        if radius_at and size:
            grown = [threat_flags.grown(ball, size / radius_at) for ball in balls]
        place, more = _of_size(of_size, grown, bool(ladder), run=run, out=out, lock=lock)
        written += more
    return written, place


def _checked(
    flags: GivenFlags,
    sizes: Sequence[int | None],
    threats: Sequence[str],
    ladder: str | None,
    radius_at: int | None,
) -> tuple[GivenFlags, list[Threat]]:
    """Raise if flags contradict each other; return the completed flags and the threats."""
    flags = flag_rules.placed(stated.of_shipped(flags))
    flag_rules.check(flags)
    several_of = stated.several_of(sizes, threats, ladder)
    flags = flag_rules.of_users(flags, several_of)
    mistakes.check_fast(flags, several_of)
    mistakes.check_stop(flags, several_of)
    if flags.finish:
        flags = flags._replace(version="standard")
    if flags.worst_case:
        _three_norms().check(flags, ladder)
    flags = mistakes.of_corruptions(flags)
    if flags.certify is not None:
        certified.settings(flags)
        mistakes.check_certify(flags)
    mistakes.check_many(flags, sizes, threats, ladder, radius_at)
    if flags.worst_case:
        balls = _three_norms().balls(threats)
    else:
        balls = _rungs(flags, ladder) if ladder else _balls(flags, threats)
    bundle.check(flags, max(len(sizes), 1) * max(len(balls), 1))
    fast = "--finish" if flags.finish else "--version=fast" * (flags.version == "fast")
    one = fast or stated.stop_of(flags)
    if one and len(balls) > 1 and not (threats or ladder or flags.worst_case):
        names = [f"{ball.norm}:{fraction(ball.epsilon)}" for ball in balls]
        raise ValueError(
            f"{one} only works for one evaluation, but {flags.workdir} was trained with "
            f"{len(balls)} norms; choose one of them: --threat={' or --threat='.join(names)}"
        )
    return flags, balls


def _three_norms() -> Any:
    """Import the attacks of --worst_case."""
    return rooms.resolve(rooms.entries("EVALUATIONS")["worst_case"])


def _balls(flags: GivenFlags, threats: Sequence[str]) -> list[Threat]:
    balls = [threat_flags.parse(text) for text in threats] or flag_rules.own_balls(flags)
    if len(set(balls)) < len(balls):
        raise ValueError(f"--threat={', '.join(threats)} repeats a threat; give each once")
    if balls and flags.attack == "clean":
        raise ValueError("--threat has no effect with --attack=clean; leave it out")
    if flags.attack == "clean" and (unused := stated.written(flags, "norm", "epsilon")):
        verb = "has" if len(unused) == 1 else "have"
        say(f"{' and '.join(unused)} {verb} no effect with --attack=clean")
    if flags.union_only and (len(balls) < 2):
        raise ValueError("--union_only needs more than one --threat")
    return balls


def _rungs(flags: GivenFlags, ladder: str) -> list[Threat]:
    if flags.union_only or flags.noreplay:
        flag = "union_only" if flags.union_only else "noreplay"
        raise ValueError(f"--ladder shares adversarial images between radii; leave --{flag} out")
    if not is_cascade(flags.attack) or flags.version == "rand":
        raise ValueError(
            "--ladder needs attacks that work image by image, such as --attack=autoattack; "
            f"leave out {'--version=rand' if flags.version == 'rand' else flags.attack}"
        )
    return threat_flags.ladder(ladder)


@contextlib.contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Lock the evaluation against other commands; the first host locks for all."""
    resource = f"the evaluation in {lock.parent}"
    with contextlib.ExitStack() as stack:
        exclusive = locks.held(lock, resource=resource, otherwise="give another --out")
        hosts.together(lambda: None if jax.process_index() else stack.enter_context(exclusive))
        yield


def _of_size(
    flags: GivenFlags,
    balls: list[Threat],
    climbs: bool,
    *,
    run: Path | None,
    out: Path | None,
    lock: str,
) -> tuple[Path, list[AccuracyRecord]]:
    """Make the folder and the records of all threats, and of their union, at one image size."""
    if flags.worst_case:
        flags = flags._replace(norm="linf", epsilon=_three_norms().LINF)  # until the size is known
    elif balls:
        flags = flags._replace(**balls[-1].settings())  # the largest rung
    is_first = jax.process_index() == 0
    with patience.of("reading the network and its images", here=is_first):
        origin, subject, source = flag_rules.settled(flags)
        folder = re.sub(r"[^\w.-]+", "-", f"evaluation-{subject.network.name}")
        place = out or (run / "evaluation" if run else Path("runs") / folder)
        if hosts.first((place / lock).exists()):  # fails fast; the lock is taken again below
            with _alone(place / lock):
                pass
        name, subject, weights = flag_rules.weights(flags, subject, source)
        source = source.for_channels(subject.network.in_channels)
    preparing = (origin, subject.image_size, source, flags.preprocessing)
    question = flags._replace(preprocessing=subjects.preprocessing(*preparing))
    if flags.certify is not None:
        question = question._replace(draws=None, alpha=None)  # they belong to the noise
    asking = _asking(flags, question, subject, balls)
    for asked, of_ball in asking:
        if of_ball.ball.epsilon or not climbs:
            questions.check(asked, of_ball, source)
    stops.check_images(question, len(source))
    recording.claim(place)
    with _alone(place / lock):
        if flags.shipped:
            _first_figure(flags, subject, source, weights)
        with patience.of("fingerprinting network and images", here=is_first):
            evaluation = Evaluation(subject, source, name, weights, question, place)
        return place, _recorded(evaluation, flags, asking, climbs)


def _recorded(
    evaluation: Evaluation,
    flags: GivenFlags,
    asking: Sequence[tuple[GivenFlags, Subject]],
    climbs: bool,
) -> list[AccuracyRecord]:
    """Make the records of all threats, and of their union."""
    if climbs:
        return several.ladder(evaluation, [of_ball for _, of_ball in asking])
    if flags.corruptions:
        return [corrupted.record(evaluation, flags)]
    if flags.certify is not None:
        return [certified.record(evaluation, flags)]
    if flags.bundle:
        return [bundle.recorded(evaluation, asking[0][1], Path(flags.bundle))]
    if len(asking) == 1:
        return [evaluation.record(asking[0][1])]
    members = [ThreatMember(evaluation.with_question(asked), of_ball) for asked, of_ball in asking]
    written = [] if flags.union_only else [member.record(of_ball) for member, of_ball in members]
    last = several.union(evaluation, members, written, worst_case=flags.worst_case)
    return [*written, last]


def _first_figure(
    flags: GivenFlags, subject: Subject, source: registry.Source, weights: Weights
) -> None:
    """Print the clean accuracy before anything else compiles, and the attack that follows."""
    number = min(flags.n or len(source), len(source))
    settings: Any = {"image_size": subject.image_size, "images": number}
    settings["preprocessing"] = pipeline.preprocessing_id(
        source, subject.image_size, flags.preprocessing
    )
    share = accuracy.clean_share(subject.create("float32"), weights, Prepared(source, **settings))
    name = flags.shipped
    say(f"{name}: clean accuracy {share:.1%} on {number} images of {subject.dataset}")
    if flags.attack not in ("clean", questions.AUTOATTACK):
        say(
            f"{name}: next is {flags.attack}, {subject.ball}; add --attack autoattack to run "
            "all of AutoAttack"
        )


def _asking(
    flags: GivenFlags, question: GivenFlags, subject: Subject, balls: list[Threat]
) -> list[tuple[GivenFlags, Subject]]:
    """Pair questions with threats: one question for all, except for the worst case."""
    if not flags.worst_case:
        return [(question, subject.within(ball)) for ball in balls] or [(question, subject)]
    size, channels = subject.image_size, subject.network.in_channels or 3
    for ball in balls:
        check_threat(ball, size, channels)
    radii = _three_norms().radii(size, balls)
    asked = _three_norms().questions(question, skips=flags.union_only)
    return [(of_norm, subject.within(radii[norm])) for norm, of_norm in asked]


def told(written: Sequence[AccuracyRecord], place: Path) -> str:
    """Format records for people; `place` is their folder."""
    first = written[0]
    flags = dict.fromkeys(f"flag {k}: {text}" for r in written for k, text in r.flags.items())
    remarks = dict.fromkeys(line for record in written for line in notes_of(record))
    dtype = f", {first.dtype}" if len(written) == 1 else ""
    weights = f" ({first.weights}){dtype}" if first.weights else ""
    numbers = ", ".join(str(record.evaluation) for record in written)
    lines = [
        f"\n{(first.model or {}).get('name')}{weights}",
        f"{first.dataset}, split {first.split}, {_images(first)}",
        *(_accuracies(first) if len(written) == 1 else _table(written)),
        *remarks,
        *flags,
        f"record{'s' * (len(written) > 1)} {numbers} in {place / 'results.jsonl'}",
    ]
    return "\n".join(lines)


def _table(written: Sequence[AccuracyRecord]) -> list[str]:
    rows = [("attack", "px", "clean", "robust", "95% interval")]
    for record in written:
        ends = record.interval or {"clean": None, "robust": None}
        low, high = ends["robust"] or ends["clean"] or (math.nan, math.nan)
        method = attack_line(record) if record.attacks else str(record.method)
        clean, robust = ("-" if v is None else f"{v:.1%}" for v in (record.clean, record.robust))
        rows.append((method, str(record.image_size), clean, robust, f"{low:.1%} to {high:.1%}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *(map(str.rjust, row[1:], widths[1:]))]) for row in rows
    ]


def _accuracies(record: AccuracyRecord) -> list[str]:
    rows = {} if record.clean is None else {"clean": record.clean}
    rows |= {f"after {k}": v for k, v in (record.accuracy_after or {}).items() if v is not None}
    width = max([16, *map(len, rows)])
    return [
        f"attack: {attack_line(record)}",
        *(f"{name:{width}} {value:7.1%}" for name, value in rows.items()),
        *(corrupted.table(record.corruptions) if record.corruptions else ()),
        *(certified.table(record.certified) if record.certified else ()),
    ]


def _images(record: AccuracyRecord) -> str:
    """Describe the images; if they were spread or stopped at, only the record lists them."""
    if record.stopped:
        return f"{record.stopped['stopped_after']:,} images in a random order"
    if record.image_choice == spread.HASH:
        return f"{records.images_of(record):,} images, spread over the classes"
    return f"images {record.image_ids}"
