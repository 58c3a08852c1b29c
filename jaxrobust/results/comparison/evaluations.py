"""Evaluations with a verdict for each image: where they lie, and whether they may be compared."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxrobust.evaluation.records import (
    checked,
    comparable,
    records,
    stopping,
    survivors,
    verdicts,
)
from jaxrobust.evaluation.records.record import AccuracyRecord, check
from jaxrobust.evaluation.records.verdicts import Verdicts
from jaxrobust.results import run_records
from jaxrobust.results.run_records import RunRecord
from jaxrobust.runtime.commandline.arguments import number
from jaxrobust.runtime.text.spelling import norm as spelled
from jaxrobust.types import NORMS

_SHOWN = 6  # evaluations that a message lists


class ComparedEvaluation(NamedTuple):
    """A record with its verdicts."""

    place: str  # as it was named
    ours: RunRecord
    verdicts: Verdicts
    images: int  # that were evaluated; verdicts are of those that are compared

    @property
    def record(self) -> AccuracyRecord:
        """Return the record."""
        return self.ours.record

    @property
    def label(self) -> str:
        """Name the network of this evaluation for people: epochs, raw and ema are told apart."""
        name = (self.record.model or {}).get("name") or "a network"
        return f"{name} ({self.record.weights})" if self.record.weights else str(name)


def load(places: Sequence[str], threat: str | None = None) -> list[ComparedEvaluation]:
    """Read `PLACE[#NUMBER]`s on their common images; `ValueError`: they cannot be compared."""
    if len(places) < 2:
        raise ValueError("one evaluation has nothing to compare with; name two or more")
    ball = None if threat is None else ball_of(threat)
    beside = [[*places[:at], *places[at + 1 :]] for at in range(len(places))]
    evaluations = [_load(p, threat, ball, others) for p, others in zip(places, beside, strict=True)]
    named: dict[tuple[Path, str], str] = {}
    for one in evaluations:
        key = one.ours.file.resolve(), str(one.record.verdicts)
        if same := named.get(key):
            raise ValueError(
                f"{one.place} is the same evaluation as {same}; name two different ones"
            )
        named[key] = one.place
    first, *others = evaluations
    if wrong := [f"{o.place} (here): {text}" for o in others if (text := differences(first, o))]:
        held = {folder: rows for folder, _, rows in (held_at(o.place) for o in others)}
        fit = [n for folder, rows in held.items() for n in _fitting(folder, [first.ours], rows)]
        raise ValueError(
            f"these cannot be compared with {first.place} (there): {'; '.join(wrong)}; "
            + (f"{few(fit)} can be; else " if fit else "")
            + "evaluate all of them on the same images, with the same preprocessing, radius and "
            "attack"
        )
    cut = verdicts.aligned([_met_by_all(one) for one in evaluations])
    if not len(cut[0].labels):
        raise ValueError("no image is common to all of these evaluations; compare two at a time")
    return [one._replace(verdicts=v) for one, v in zip(evaluations, cut, strict=True)]


def _met_by_all(one: ComparedEvaluation) -> Verdicts:
    """Leave out what only a sample of images met: the others might have fallen to it too."""
    fast = one.record.fast
    return survivors.met_by_all(fast, one.verdicts) if fast else one.verdicts


def ball_of(threat: str) -> set[tuple[str, str]]:
    """Read --threat as `balls` writes those of a record: none for "clean"."""
    written, colon, radius = threat.partition(":")
    norm = spelled(written)
    if threat == "clean":
        return set()
    if not colon or norm not in NORMS:
        raise ValueError(
            f"--threat={threat} is no threat; write NORM:RADIUS, with one of "
            f"{', '.join(NORMS)}, such as linf:4/255, or clean"
        )
    return {(norm, f"{number('threat', radius):.6g}")}


def _load(
    place: str, threat: str | None, ball: set[tuple[str, str]] | None, beside: Sequence[str]
) -> ComparedEvaluation:
    return _evaluation(place, _chosen(place, threat, ball, beside))


def _evaluation(place: str, run_record: RunRecord) -> ComparedEvaluation:
    own = checked.verdicts(run_record.record, run_record.file)
    return ComparedEvaluation(place, run_record, own, len(own.labels))


def held_at(place: str) -> tuple[str, str, dict[str, RunRecord]]:
    """Read `PLACE[#NUMBER]`: its folder, that number or "", and all records by their numbers."""
    folder, _, wanted = (place, "", "") if Path(place).exists() else place.partition("#")
    held = {str(o.record.evaluation): o for o in run_records.collect([Path(folder)])}
    return folder, wanted, held


def _fitting(folder: str, beside: Sequence[RunRecord], held: dict[str, RunRecord]) -> list[str]:
    same = {(o.file.resolve(), str(o.record.verdicts)) for o in beside}
    fit = {
        key: o
        for key, o in held.items()
        if o.record.verdicts and (o.file.resolve(), str(o.record.verdicts)) not in same
        if any(_fits(other, o) for other in beside)
    }
    return addresses(folder, fit)


def _fits(*pair: RunRecord) -> bool:
    one, other = (dict(comparable.question(ours.record)) for ours in pair)
    if one != other:
        return False
    try:
        return not differences(*(_evaluation(str(ours.file), ours) for ours in pair))
    except ValueError:  # verdicts that are missing or damaged
        return False


def addresses(folder: str, held: dict[str, RunRecord]) -> list[str]:
    """List records as `PLACE#NUMBER`, each with its attack."""
    return [f"{folder}#{key} ({records.attack_line(o.record)})" for key, o in held.items()]


def few(names: Sequence[str]) -> str:
    """List the first names for a message, and count the others."""
    more = f", and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _chosen(
    place: str, threat: str | None, ball: set[tuple[str, str]] | None, beside: Sequence[str]
) -> RunRecord:
    folder, wanted, held = held_at(place)
    if not held:
        raise ValueError(f"{folder} has no records; name a folder that holds results.jsonl")
    named = {key: ours for key, ours in held.items() if key.startswith(wanted)}
    if not named:
        raise ValueError(f"{folder} has no evaluation {wanted}; {_listed(folder, held)}")
    if ball is not None:
        named = {key: o for key, o in named.items() if set(comparable.balls(o.record)) == ball}
    if not named:
        raise ValueError(f"{place} has no evaluation under {threat}; {_listed(folder, held)}")
    decided = {key: o for key, o in named.items() if o.record.verdicts}
    if len(decided) > 1:
        also = ", or give --threat NORM:RADIUS" if ball is None else ""
        others = []
        for _, number, rows in map(held_at, beside):
            others += [o for key, o in rows.items() if key.startswith(number) and o.record.verdicts]
        holds = f"{place} holds {len(decided)} evaluations"
        if fit := _fitting(folder, others, decided):
            raise ValueError(
                f"{holds}, of which these can be compared with {', '.join(beside)}: {few(fit)}; "
                f"name one of them{also}"
            )
        raise ValueError(f"{holds}; {_listed(folder, decided)}{also}")
    ours = next(iter((decided or named).values()))
    check(ours.record, str(ours.file))
    if not decided:
        raise ValueError(
            f"{place} has no verdicts image by image, as of a training or of an older version; "
            "evaluate again with --out DIR"
        )
    return ours


def _listed(folder: str, held: dict[str, RunRecord]) -> str:
    return f"name one of them: {few(addresses(folder, held))}"


def differences(first: ComparedEvaluation, other: ComparedEvaluation) -> str:
    """Say how the questions of two evaluations differ; "" if they do not."""
    texts = [comparable.question_differences(first.record, other.record)]
    texts.append(_other_images(first.verdicts, other.verdicts))
    texts.append(comparable.image_differences(*_images_of(first, other)))
    return "; ".join(part for part in texts if part)


def _images_of(first: ComparedEvaluation, other: ComparedEvaluation) -> tuple[Any, ...]:
    return first.record, other.record, first.verdicts.images, other.verdicts.images


def _other_images(first: Verdicts, other: Verdicts) -> str:
    there, here = verdicts.aligned([first, other])
    if not len(there.labels):
        ids = (records.ranges(one.image_ids.tolist()) for one in (first, other))
        return "no image is common, images {} there, {} here".format(*ids)
    wrong = np.flatnonzero(there.labels != here.labels)
    if not len(wrong):
        return ""
    image, one, another = (of[wrong[0]] for of in (there.image_ids, there.labels, here.labels))
    return (
        f"labels of {len(wrong)} of {len(here.labels)} images differ, that of image {image} is "
        f"{one} there, {another} here"
    )


def without_replayed(
    evaluations: list[ComparedEvaluation], names: Sequence[str] = ()
) -> tuple[list[ComparedEvaluation], str]:
    """Leave out the images that replayed points decided; a sentence says so, "" where none is.

    The sentence calls evaluations by `names`, or A, B and so on.
    """
    seen = [one.verdicts for one in evaluations]
    left = comparable.left_out([one.record for one in evaluations], seen)
    if not left.any():
        return evaluations, ""
    if left.all():
        raise ValueError(
            "replayed points decided all of these images, so that nothing is left to compare; "
            "evaluate again with --noreplay"
        )
    decided = [comparable.replayed(one) for one in seen]
    counts = _each([f"{int(of.sum()):,}" for of in decided], names)
    both = [(v.robust, v.robust | of) for v, of in zip(seen, decided, strict=True)]
    each = [f"{100 * low.mean():.2f} to {100 * high.mean():.2f} %" for low, high in both]
    ends = _each(each, names)
    sentence = (
        f"**{left.sum():,} of {len(left):,} images are left out, which replayed points decided "
        f"({counts}): the attacks alone might have left them standing.** On all images the "
        f"robust accuracy under the attacks alone lies within: {ends}; --noreplay computes "
        "it."
    )
    kept = [Verdicts(*(column[~left] for column in one)) for one in seen]
    return [one._replace(verdicts=v) for one, v in zip(evaluations, kept, strict=True)], sentence


def remarks(evaluations: Sequence[ComparedEvaluation], names: Sequence[str] = ()) -> list[str]:
    """List differences that stand beside a comparison without forbidding it.

    Evaluations are called by `names`, or A, B and so on.
    """
    names = names or [letter(at) for at in range(len(evaluations))]
    sentences = []
    named = [(name, one.record) for name, one in zip(names, evaluations, strict=True)]
    images = len(evaluations[0].verdicts.labels)
    if {one.images for one in evaluations} != {images}:
        each = _each([f"{one.images:,}" for one in evaluations], names)
        common = f"the {images:,} images that all have"
        sentences.append(f"Compared are {common}; evaluated were {each}.")
    for name, record in named:
        sentences += [f"{name} {text}" for text in _met_less(record)]
    tried = [name for name, record in named if record.replayed]
    if tried and not any(comparable.replayed(one.verdicts).any() for one in evaluations):
        sentences.append(f"None of these was decided by a replayed point, which {_and(tried)} met.")
    sentences += unconfirmed(evaluations, names)
    seeds = [one.record.seed for one in evaluations]
    if evaluations[0].record.attacks and len(set(seeds)) > 1:
        sentences.append(f"The attacks' draws have different seeds: {_each(seeds, names)}.")
    hashes = [one.record.weights_sha256 for one in evaluations]
    for at, value in enumerate(hashes):
        if value is not None and value in hashes[:at]:
            both = f"{names[hashes.index(value)]} and {names[at]}"
            sentences.append(f"{both} have the same weights.")
    for at, one in enumerate(evaluations):
        if words := run_records.other_config(one.ours):
            sentences.append(f"In doubt of {names[at]}: {words}.")
    for of, record in named:
        sentences += [f"In doubt of {of}, {name}: {text}." for name, text in record.flags.items()]
    return sentences


def unconfirmed(evaluations: Sequence[ComparedEvaluation], names: Sequence[str]) -> list[str]:
    """Say where nothing but their names shows that images are the same."""
    sentences = []
    older = [
        name
        for name, one in zip(names, evaluations, strict=True)
        if not comparable.pictures(one.record)
    ]
    if older:
        sentences.append(
            f"What {_and(older)} evaluated is known by the names of the images alone: an older "
            "version, which did not note their bytes, wrote that."
        )
    unsure = [
        name
        for name, one in zip(names, evaluations, strict=True)
        if not comparable.same_images_shown(*_images_of(evaluations[0], one)) and name not in older
    ]
    if unsure and names[0] not in older:
        sentences.append(
            f"That {_and(unsure)} evaluated the same images as {names[0]} is known by their names "
            "alone: no hashes of each image, which older versions did not note, show it."
        )
    return sentences


def _met_less(record: AccuracyRecord) -> Iterator[str]:
    """Say of what images and attacks a record is, where it is not of all."""
    if record.stopped:
        n, all_images = record.stopped["stopped_after"], record.stopped["of"]
        yield f"stopped after {n:,} of its {all_images:,} images: {stopping.why(record.stopped)}."
    if record.fast and (fallen := record.fast["fooled"]):
        yield (
            f"is of the fast version: {fallen:,} images that only the attacks of its sample fooled "
            "count as standing here, because the others did not meet these."
        )


def _and(names: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _each(values: Sequence[Any], names: Sequence[str] = ()) -> str:
    names = names or [letter(at) for at in range(len(values))]
    return ", ".join(f"{name} {value}" for name, value in zip(names, values, strict=True))


def letter(index: int) -> str:
    """Name the evaluation at a place: A to Z, then N27."""
    return chr(ord("A") + index) if index < 26 else f"N{index + 1}"
