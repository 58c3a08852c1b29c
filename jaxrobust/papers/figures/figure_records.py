"""Records of a figure: selection, checks that they belong together, and names."""

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NamedTuple, Self

from jaxrobust.evaluation.records import checked, records
from jaxrobust.evaluation.records.record import AccuracyRecord, check
from jaxrobust.evaluation.records.verdicts import HashedImages, Verdicts
from jaxrobust.results.comparison import evaluations
from jaxrobust.results.run_records import RunRecord

_RADII = (
    "radius",
    "ladder",
    "images attacked only by the first attack",
)  # may differ between rungs
_RESOLUTIONS = ("image size", "preprocessing", "norm", "radius")  # may differ between resolutions
_LONGEST = 40  # letters of a name that is taken from a record or a folder


class FigureRecord(NamedTuple):
    """A record of a figure, and the place that named it."""

    place: str
    ours: RunRecord
    verdicts: Verdicts | None  # None: the record has none, or their file is missing

    @classmethod
    def read(cls, place: str, run_record: RunRecord) -> Self:
        """Read the verdicts of a record; `ValueError`: they contradict it."""
        return cls(place, run_record, checked.if_there(run_record.record, run_record.file))

    @property
    def record(self) -> AccuracyRecord:
        """Return the record."""
        return self.ours.record

    @property
    def images(self) -> int:
        """Count the images; `ValueError`: the record does not say."""
        count = records.images_of(self.record)
        if not count:
            raise ValueError(
                f"{self.ours.file} has a record of images {self.record.image_ids}, whose number is "
                "unknown, so there are no intervals; evaluate again"
            )
        return count


def cascades(places: Sequence[str], threat: str | None) -> list[FigureRecord]:
    """Read the cascade of attacks at each place; all of them must belong together."""
    ball = None if threat is None else evaluations.ball_of(threat)
    records = [FigureRecord.read(place, _cascade(place, threat, ball)) for place in places]
    _check_each_once([(one.place, one.ours) for one in records])
    check_together(records)
    return records


def _cascade(place: str, threat: str | None, ball: set[tuple[str, str]] | None) -> RunRecord:
    folder, wanted, stored = _checked(place)
    having = {key: o for key, o in stored.items() if o.record.accuracy_after}
    having = {key: o for key, o in having.items() if ball in (None, {*checked.balls(o.record)})}
    if not wanted and any(not o.record.ladder for o in having.values()):
        having = {key: o for key, o in having.items() if not o.record.ladder}
    if not having:
        under = f" under {threat}" if threat else ""
        raise ValueError(
            f"{place} has no evaluation with several attacks{under}, so there is nothing to draw "
            "for --kind attacks; evaluate with --attack=autoattack, or name another place"
        )
    if len(having) > 1:
        listed = evaluations.few(evaluations.addresses(folder, having))
        raise ValueError(
            f"{place} holds {len(having)} such evaluations; name one of them: {listed}, or give "
            "--threat NORM:RADIUS"
        )
    return next(iter(having.values()))


def ladders(places: Sequence[str]) -> list[list[FigureRecord]]:
    """Read the ladder of each place, smallest radius first; all of them must belong together."""
    rungs_of_places = [_ladder(place) for place in places]
    _check_each_once([(one.place, one.ours) for rungs in rungs_of_places for one in rungs])
    attacked = [next(one for one in rungs if one.record.attacks) for rungs in rungs_of_places]
    check_together(attacked, _RADII)
    return rungs_of_places


def certified(place: str) -> list[FigureRecord]:
    """Read the certificates of randomized smoothing at a place, smallest noise first."""
    _, _, stored = _checked(place)
    records = [FigureRecord.read(place, run) for run in stored.values() if run.record.certified]
    if not records:
        raise ValueError(
            f"{place} has no certificates to draw; evaluate with --certify 0.25, or "
            "name another place"
        )
    return sorted(records, key=lambda one: (one.record.certified or {})["sigma"])


def ladder_in_l2(place: str, certified_record: FigureRecord) -> list[FigureRecord]:
    """Read the ladder in L2 of a place on the images of `beside`; empty: there is not one."""
    try:
        rungs = _ladder(place.partition("#")[0])
    except ValueError:  # none, or several: the figure only shows certificates
        return []
    l2 = rungs[-1].record.threats[0].norm == "l2"
    return rungs if l2 and _images_of(rungs[-1]) == _images_of(certified_record) else []


def of_resolutions(place: str, threat: str | None) -> list[FigureRecord]:
    """Read the evaluations of a network at several image sizes by one attack, smallest size first.

    A size may have several evaluations, with other norms or radii.
    """
    folder, wanted, stored = _checked(place, all_of_the_folder=True)
    ball = None if threat is None else evaluations.ball_of(threat)
    groups: dict[str, dict[str, RunRecord]] = {}
    for key, run in stored.items():
        record = run.record
        alone = len({*checked.balls(record)}) < 2 and not (record.ladder or record.is_union)
        if (
            record.image_size
            and alone
            and not record.certified
            and ball in (None, {*checked.balls(record)})
        ):
            groups.setdefault(_attacked_alike(run), {})[key] = run
    groups = {
        text: group
        for text, group in groups.items()
        if len({run.record.image_size for run in group.values()}) > 1
    }
    attacked = {k: g for k, g in groups.items() if next(iter(g.values())).record.attacks}
    if wanted:
        groups = {k: g for k, g in groups.items() if any(n.startswith(wanted) for n in g)}
    elif attacked:
        groups = attacked
    if not groups:
        raise ValueError(
            f"{place} has no evaluations of the same attack at several image sizes, so there is "
            "nothing to draw for --kind resolution; evaluate with --image_size=192 "
            "--image_size=224, or name another place"
        )
    if len(groups) > 1:
        firsts = dict(next(iter(group.items())) for group in groups.values())
        listed = evaluations.few(evaluations.addresses(folder, firsts))
        raise ValueError(
            f"{place} holds {len(groups)} attacks at several image sizes; name one evaluation of "
            f"one of them: {listed}"
        )
    (group,) = groups.values()
    latest = {(o.record.image_size, *checked.balls(o.record)): o for o in group.values()}
    return [
        FigureRecord.read(place, latest[key])
        for key in sorted(latest, key=lambda key: (key[0] or 0, *key[1:]))
    ]


def _attacked_alike(run_record: RunRecord) -> str:
    """Write as text what the evaluations of a curve share, whatever their size and ball."""
    record = run_record.record
    images = (record.dataset, record.split, record.image_ids)
    attack = (record.method, record.search_dtype, record.seed)
    return str((record.weights_sha256 or record.weights, *images, *attack))


def check_resolutions(shown: Sequence[Sequence[FigureRecord]]) -> None:
    """Refuse networks that were tested with other images or attacks than the first."""
    every = [one for of in shown for one in of]
    _check_each_once([(one.place, one.ours) for one in every])
    of_norm: dict[str, list[FigureRecord]] = {}
    of_size: dict[int | None, list[FigureRecord]] = {}
    for one in every:
        norm = one.record.threats[0].norm if one.record.attacks else ""
        of_norm.setdefault(norm, []).append(one)
        of_size.setdefault(one.record.image_size, []).append(one)
    for same in of_norm.values():  # settings of an attack differ between norms
        check_together(same, _RESOLUTIONS)
    for same in of_size.values():
        if len(preprocessings := {str(one.record.preprocessing) for one in same}) > 1:
            raise ValueError(
                f"at {same[0].record.image_size} px, these evaluations differ in preprocessing: "
                f"{', '.join(sorted(preprocessings))}; evaluate all networks with the same one, or "
                "draw separate figures"
            )
    for one in every:
        if _images_of(one)[:3] != _images_of(every[0])[:3]:
            raise ValueError(
                f"{one.place} and {every[0].place} were evaluated on different images; evaluate "
                "both on the same ones, or draw a figure of each"
            )


def _images_of(one: FigureRecord) -> tuple[str | None, ...]:
    record = one.record
    weights = record.weights_sha256 or record.weights
    return record.dataset, record.split, record.image_ids, record.preprocessing, weights


def _ladder(place: str) -> list[FigureRecord]:
    folder, wanted, stored = _checked(place, all_of_the_folder=True)
    rungs_of = {key: run for key, run in stored.items() if run.record.ladder}
    groups: dict[tuple[str, str], dict[str, RunRecord]] = {}
    for key, run in rungs_of.items():
        if run.record.attacks:
            groups.setdefault((_ladder_of(run), _attack_of(run)), {})[key] = run
    for key, run in rungs_of.items():
        if not run.record.attacks:  # radius 0 belongs to every norm
            same = [group for (ladder, _), group in groups.items() if ladder == _ladder_of(run)]
            for group in same or [groups.setdefault((_ladder_of(run), ""), {})]:
                group[key] = run
    if wanted:
        groups = {k: g for k, g in groups.items() if any(n.startswith(wanted) for n in g)}
    if not groups:
        raise ValueError(
            f"{place} has no ladder of radii, so there is nothing to draw for --kind radius; "
            "evaluate with --ladder NORM:FROM:TO:COUNT, or name another place"
        )
    if len(groups) > 1:
        firsts = dict(next(iter(group.items())) for group in groups.values())
        listed = evaluations.few(evaluations.addresses(folder, firsts))
        raise ValueError(f"{place} holds {len(groups)} ladders; name one radius of one: {listed}")
    (group,) = groups.values()
    rungs = {_radius(run.record): FigureRecord.read(place, run) for run in group.values()}
    there = {f"{radius:.6g}" for radius in rungs}
    radii = _radii(next(iter(group.values())).record)
    if missing := [radius for radius in radii if f"{radius:.6g}" not in there]:
        raise ValueError(
            f"the ladder of {place} lacks {', '.join(f'{r:.4g}' for r in missing)} of its radii; "
            "repeat the command that evaluated it to finish it"
        )
    if not any(rungs):
        raise ValueError(f"the ladder of {place} only has radius 0; evaluate larger radii")
    return [rungs[radius] for radius in sorted(rungs)]


def _radius(record: AccuracyRecord) -> float:
    return max((threat.epsilon for threat in record.threats), default=0.0)


def _radii(record: AccuracyRecord) -> list[float]:
    return record.ladder["radii"] if record.ladder else []


def _ladder_of(run_record: RunRecord) -> str:
    """Write as text what all rungs of a ladder share, including the clean one without a norm."""
    record = run_record.record
    images = (record.dataset, record.split, record.image_ids)
    return str(
        (str(run_record.file), record.weights_sha256 or record.weights, _radii(record), *images)
    )


def _attack_of(run_record: RunRecord) -> str:
    record = run_record.record
    return str((record.threats[0].norm, record.method, record.search_dtype, record.seed))


def _checked(
    place: str, *, all_of_the_folder: bool = False
) -> tuple[str, str, dict[str, RunRecord]]:
    folder, wanted, stored = evaluations.held_at(place)
    if not stored:
        raise ValueError(f"{folder} has no records; name a folder that holds results.jsonl")
    chosen = {key: run for key, run in stored.items() if key.startswith(wanted)}
    if not chosen:
        listed = evaluations.few(evaluations.addresses(folder, stored))
        raise ValueError(f"{folder} has no evaluation {wanted}; name one of them: {listed}")
    for run in chosen.values():
        check(run.record, str(run.file))
    return folder, wanted, stored if all_of_the_folder else chosen


def _check_each_once(addressed: Sequence[tuple[str, RunRecord]]) -> None:
    places: dict[tuple[str, str], str] = {}
    for place, run in addressed:
        key = str(run.file.resolve()), str(run.record.evaluation)
        if key in places:
            raise ValueError(f"{place} is the same evaluation as {places[key]}; name each once")
        places[key] = place


def check_together(shown: Sequence[FigureRecord], but: Collection[str] = ()) -> None:
    """Refuse records with other images, threats or attacks than the first; list all differences."""
    first, *others = shown
    for one in shown:
        if one.record.stopped:
            raise ValueError(
                f"{one.place} stopped after {one.record.stopped['stopped_after']:,} images, and a "
                "figure does not show its sequential bounds; repeat the command without --against "
                "and --until_width to finish it"
            )
    wrong = []
    for other in others:
        texts = [checked.question_differences(first.record, other.record, but)]
        if first.record.image_ids != other.record.image_ids:
            here, there = other.record.image_ids, first.record.image_ids
            texts.append(f"images are {there} there, {here} here")
        else:
            images = (_hashed(first), _hashed(other))
            texts.append(checked.image_differences(first.record, other.record, *images))
        if text := "; ".join(filter(None, texts)):
            wrong.append(f"{other.place} (here): {text}")
    if wrong:
        raise ValueError(
            f"these cannot share a figure with {first.place} (there): {'; '.join(wrong)}; "
            "evaluate all of them on the same images, with the same preprocessing and attack, or "
            "draw separate figures"
        )


def _hashed(one: FigureRecord) -> HashedImages:
    return HashedImages.none() if one.verdicts is None else one.verdicts.images


def names(shown: Sequence[FigureRecord], chosen: Sequence[str]) -> list[str]:
    """Choose names for the networks: as given, else by what distinguishes them."""
    if chosen:
        if len(chosen) != len(shown):
            raise ValueError(
                f"--names has {len(chosen)} names, but the figure shows {len(shown)} networks; "
                "give one for each, in the same order"
            )
        if len({*chosen}) < len(chosen):
            raise ValueError("--names repeats a name; give each network a different one")
        return list(chosen)
    ways: list[Callable[[FigureRecord], Iterator[str]]] = [_folder, _network, _weights]
    for way in ways:
        labels = [next(way(one), "") for one in shown]
        if all(labels) and len({*labels}) == len(labels) and max(map(len, labels)) <= _LONGEST:
            return labels
    return [f"network {at}" for at in range(1, len(shown) + 1)]


def _folder(one: FigureRecord) -> Iterator[str]:
    """Name the run: RUN of RUN/evaluation, NAME of runs/evaluation-NAME."""
    folder = one.ours.file.resolve().parent
    is_of_run = folder.name == "evaluation"
    yield folder.parent.name if is_of_run else folder.name.removeprefix("evaluation-")


def _network(one: FigureRecord) -> Iterator[str]:
    yield str((one.record.model or {}).get("name") or "")


def _weights(one: FigureRecord) -> Iterator[str]:
    yield str(one.record.weights or "")


def doubts(name: str, record: AccuracyRecord) -> Iterator[str]:
    """Yield remarks about a record that readers of the figure need."""
    for flag, text in record.flags.items():
        yield f"Doubt about {name}, {flag}: {text}."
    shared = record.ladder is not None and checked.own_radii([record])  # as in every ladder
    if (line := records.replayed_line(record)) and not shared:
        yield f"In {name}, {line}, which the attacks alone might not have fooled."
    yield from (f"{name}: {line}." for line in records.notes_of(record))
