"""Evaluations with verdicts per image: finding them, and checking that they are comparable."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxrobust.evaluation.records import checked, records, stopping, verdicts
from jaxrobust.evaluation.records.record import AccuracyRecord, FastSample, check
from jaxrobust.evaluation.records.verdicts import Verdicts
from jaxrobust.results import run_records
from jaxrobust.results.run_records import RunRecord
from jaxrobust.runtime.commandline import threats
from jaxrobust.runtime.files import buckets

_SHOWN = 6  # evaluations listed in a message


class ComparedEvaluation(NamedTuple):
    """A record with its verdicts."""

    place: str  # as it was named
    ours: RunRecord
    verdicts: Verdicts
    images: int  # number evaluated; verdicts cover only the compared images

    @property
    def record(self) -> AccuracyRecord:
        """The record."""
        return self.ours.record

    @property
    def label(self) -> str:
        """The name of the network and its weights, which include the epoch, raw or ema."""
        name = (self.record.model or {}).get("name") or "a network"
        return f"{name} ({self.record.weights})" if self.record.weights else str(name)

    @property
    def cells(self) -> list[str]:
        """The cells of a table row: network, accuracies in percent, and the record."""
        clean, robust = (
            f"{100 * v.mean():.2f}" for v in (self.verdicts.clean, self.verdicts.robust)
        )
        where = f"{self.record.evaluation} in {self.ours.file}"
        return [self.label, clean, robust if self.record.attacks else "", where]


def load(places: Sequence[str], threat: str | None = None) -> list[ComparedEvaluation]:
    """Read `PLACE[#NUMBER]`s on their common images; `ValueError` if they are not comparable."""
    if len(places) < 2:
        raise ValueError("one evaluation has nothing to compare with; name two or more")
    ball = None if threat is None else ball_of(threat)
    evaluations: list[ComparedEvaluation] = []
    first_places: dict[tuple[Path, str], str] = {}
    for at, place in enumerate(places):
        one = _evaluation(place, _chosen(place, threat, ball, [*places[:at], *places[at + 1 :]]))
        key = one.ours.file.resolve(), str(one.record.verdicts)
        if key in first_places:
            raise ValueError(
                f"{place} is the same evaluation as {first_places[key]}; name two different ones"
            )
        first_places[key] = place
        evaluations.append(one)
    first, *others = evaluations
    if wrong := [f"{o.place} (here): {text}" for o in others if (text := differences(first, o))]:
        folders = {folder: rows for folder, _, rows in (held_at(o.place) for o in others)}
        fit = [n for folder, rows in folders.items() for n in _fitting(folder, [first.ours], rows)]
        raise ValueError(
            f"these cannot be compared with {first.place} (there): {'; '.join(wrong)}; "
            + (f"{few(fit)} can be; otherwise " if fit else "")
            + "evaluate all of them on the same images, with the same preprocessing, radius and "
            "attack"
        )
    common = verdicts.aligned([
        # Attacks run only on a sample might have fooled other images too.
        met_by_all(one.record.fast, one.verdicts) if one.record.fast else one.verdicts
        for one in evaluations
    ])  # fmt: skip
    if not len(common[0].labels):
        raise ValueError("these evaluations have no image in common; compare two at a time")
    return [one._replace(verdicts=v) for one, v in zip(evaluations, common, strict=True)]


def met_by_all(fast: FastSample, verdicts: Verdicts) -> Verdicts:
    """Return the verdicts of the attacks run on all images, which the sample's fallen survived."""
    stood = np.isin(verdicts.image_ids, fast["fallen"])
    return verdicts._replace(
        fooled_by=np.where(stood, "", verdicts.fooled_by),
        norms=np.where(stood, 0.0, verdicts.norms),
        reached=np.where(stood, -1, verdicts.reached),
    )


def ball_of(threat: str) -> set[tuple[str, str]]:
    """Parse --threat into the format of `checked.balls`; empty for "clean"."""
    if threat == "clean":
        return set()
    ball = threats.parse(threat)
    return {(ball.norm, f"{ball.epsilon:.6g}")}


def _evaluation(place: str, run_record: RunRecord) -> ComparedEvaluation:
    images = checked.verdicts(run_record.record, run_record.file)
    return ComparedEvaluation(place, run_record, images, len(images.labels))


def held_at(place: str) -> tuple[str, str, dict[str, RunRecord]]:
    """Read `PLACE[#NUMBER]`; return the folder, the number or "", and all records by number."""
    folder, _, wanted = (place, "", "") if Path(place).exists() else place.partition("#")
    local = buckets.opened("evaluations", folder, light=True)
    return folder, wanted, {str(o.record.evaluation): o for o in run_records.collect([local])}


def _fitting(folder: str, others: Sequence[RunRecord], records: dict[str, RunRecord]) -> list[str]:
    """List the records of a folder that could be compared with one of the others."""
    same = {(o.file.resolve(), str(o.record.verdicts)) for o in others}

    def fits(one: RunRecord, other: RunRecord) -> bool:
        if dict(checked.question(one.record)) != dict(checked.question(other.record)):
            return False
        try:
            return not differences(_evaluation(str(other.file), other), _evaluation("", one))
        except ValueError:  # the verdicts are missing or damaged
            return False

    fit = {
        key: one
        for key, one in records.items()
        if one.record.verdicts and (one.file.resolve(), str(one.record.verdicts)) not in same
        if any(fits(one, other) for other in others)
    }
    return addresses(folder, fit)


def addresses(folder: str, run_records: dict[str, RunRecord]) -> list[str]:
    """List records as `PLACE#NUMBER`, each with its attack."""
    return [f"{folder}#{key} ({records.attack_line(o.record)})" for key, o in run_records.items()]


def few(names: Sequence[str]) -> str:
    """Format the first names for a message, and count the others."""
    more = f", and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _chosen(
    place: str, threat: str | None, ball: set[tuple[str, str]] | None, others: Sequence[str]
) -> RunRecord:
    folder, wanted, rows = held_at(place)
    if not rows:
        raise ValueError(f"{folder} has no records; name a folder that holds results.jsonl")

    def listed(rows: dict[str, RunRecord]) -> str:
        return f"name one of them: {few(addresses(folder, rows))}"

    matches = {key: one for key, one in rows.items() if key.startswith(wanted)}
    if not matches:
        raise ValueError(f"{folder} has no evaluation {wanted}; {listed(rows)}")
    if ball is not None:
        matches = {k: o for k, o in matches.items() if set(checked.balls(o.record)) == ball}
    if not matches:
        raise ValueError(f"{place} has no evaluation under {threat}; {listed(rows)}")
    decided = {key: one for key, one in matches.items() if one.record.verdicts}
    if len(decided) > 1:
        also = ", or give --threat NORM:RADIUS" if ball is None else ""
        of_others = []
        for _, number, other_rows in map(held_at, others):
            of_others += [
                o for key, o in other_rows.items() if key.startswith(number) and o.record.verdicts
            ]
        holds = f"{place} holds {len(decided)} evaluations"
        if fit := _fitting(folder, of_others, decided):
            raise ValueError(
                f"{holds}, of which these can be compared with {', '.join(others)}: {few(fit)}; "
                f"name one of them{also}"
            )
        raise ValueError(f"{holds}; {listed(decided)}{also}")
    chosen = next(iter((decided or matches).values()))
    check(chosen.record, str(chosen.file))
    if not decided:
        raise ValueError(
            f"{place} has no per-image verdicts, because it comes from a training run or an older "
            "version; evaluate again with --out DIR"
        )
    return chosen


def differences(first: ComparedEvaluation, other: ComparedEvaluation) -> str:
    """Describe how the questions of two evaluations differ; "" if they are equal."""
    texts = [checked.question_differences(first.record, other.record)]
    there, here = verdicts.aligned([first.verdicts, other.verdicts])
    if not len(there.labels):
        ids = (records.ranges(one.verdicts.image_ids.tolist()) for one in (first, other))
        texts.append("no images in common, {} there, {} here".format(*ids))
    if len(wrong := np.flatnonzero(there.labels != here.labels)):
        image, a, b = (of[wrong[0]] for of in (there.image_ids, there.labels, here.labels))
        texts.append(
            f"the labels of {len(wrong)} of {len(here.labels)} images differ, such as image "
            f"{image} with {a} there, {b} here"
        )
    images = (first.verdicts.images, other.verdicts.images)
    texts.append(checked.image_differences(first.record, other.record, *images))
    return "; ".join(filter(None, texts))


def without_replayed(
    evaluations: list[ComparedEvaluation], names: Sequence[str] = ()
) -> tuple[list[ComparedEvaluation], str]:
    """Leave out the images that replayed points decided; return a sentence on them, or "".

    The sentence uses `names` for the evaluations, or A, B and so on.
    """
    images = [one.verdicts for one in evaluations]
    left_out = checked.left_out([one.record for one in evaluations], images)
    if not left_out.any():
        return evaluations, ""
    if left_out.all():
        raise ValueError(
            "replayed points decided all of these images, so nothing is left to compare; "
            "evaluate again with --noreplay"
        )
    replayed = [checked.replayed(one) for one in images]
    counts = _each([f"{int(mask.sum()):,}" for mask in replayed], names)
    both = [(v.robust, v.robust | mask) for v, mask in zip(images, replayed, strict=True)]
    ranges = [f"{100 * low.mean():.2f} to {100 * high.mean():.2f}%" for low, high in both]
    sentence = (
        f"**{left_out.sum():,} of {len(left_out):,} images are left out because replayed points "
        f"decided them ({counts}): the attacks alone might not have fooled them.** On all images "
        f"the robust accuracy under the attacks alone lies within: {_each(ranges, names)}; "
        "--noreplay computes it."
    )
    others = [Verdicts(*(column[~left_out] for column in one)) for one in images]
    pairs = zip(evaluations, others, strict=True)
    return [one._replace(verdicts=verdicts) for one, verdicts in pairs], sentence


def remarks(evaluations: Sequence[ComparedEvaluation], names: Sequence[str] = ()) -> list[str]:
    """List differences that do not prevent a comparison.

    The sentences use `names` for the evaluations, or A, B and so on.
    """
    names = names or [letter(at) for at in range(len(evaluations))]
    sentences = []
    named_records = [(name, one.record) for name, one in zip(names, evaluations, strict=True)]
    images = len(evaluations[0].verdicts.labels)
    if {one.images for one in evaluations} != {images}:
        counts = _each([f"{one.images:,}" for one in evaluations], names)
        common = f"the {images:,} images common to all"
        sentences.append(f"The comparison uses {common}; the evaluations have {counts}.")
    for name, record in named_records:
        if stopped := record.stopped:
            n, of = stopped["stopped_after"], stopped["of"]
            why = stopping.why(stopped)
            sentences.append(f"{name} stopped after {n:,} of its {of:,} images: {why}.")
        if record.fast and (fallen := record.fast["fooled"]):
            sentences.append(
                f"{name} comes from the fast version: {fallen:,} images fooled only by the attacks "
                "on its sample count as robust here, because other images did not face these "
                "attacks."
            )
    tried = [name for name, record in named_records if record.replayed]
    if tried and not any(checked.replayed(one.verdicts).any() for one in evaluations):
        sentences.append(
            f"{_and(tried)} tried replayed points, but these decided none of the compared images."
        )
    sentences += unconfirmed(evaluations, names)
    seeds = [one.record.seed for one in evaluations]
    if evaluations[0].record.attacks and len(set(seeds)) > 1:
        sentences.append(f"The attacks used different random seeds: {_each(seeds, names)}.")
    hashes = [one.record.weights_sha256 for one in evaluations]
    for at, value in enumerate(hashes):
        if value is not None and value in hashes[:at]:
            both = f"{names[hashes.index(value)]} and {names[at]}"
            sentences.append(f"{both} have the same weights.")
    for name, one in zip(names, evaluations, strict=True):
        if words := run_records.other_config(one.ours):
            sentences.append(f"Doubt about {name}: {words}.")
    for name, record in named_records:
        flags = record.flags.items()
        sentences += [f"Doubt about {name}, {flag}: {text}." for flag, text in flags]
    return sentences


def unconfirmed(evaluations: Sequence[ComparedEvaluation], names: Sequence[str]) -> list[str]:
    """Report evaluations whose images match only by name."""
    sentences, older, unsure = [], [], []
    first = evaluations[0]
    for name, one in zip(names, evaluations, strict=True):
        images = (first.verdicts.images, one.verdicts.images)
        if not checked.pictures(one.record):
            older.append(name)
        elif not checked.same_images_shown(first.record, one.record, *images):
            unsure.append(name)
    if older:
        sentences.append(
            f"The images of {_and(older)} are known only by their names: the record comes from an "
            "older version, which did not store their hashes."
        )
    if unsure and names[0] not in older:
        sentences.append(
            f"Only the images' names show that {_and(unsure)} evaluated the same images as "
            f"{names[0]}: older versions did not store a hash of each image."
        )
    return sentences


def _and(names: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _each(values: Sequence[Any], names: Sequence[str] = ()) -> str:
    names = names or [letter(at) for at in range(len(values))]
    return ", ".join(f"{name} {value}" for name, value in zip(names, values, strict=True))


def letter(index: int) -> str:
    """Return the short name of an evaluation by its index: A to Z, then N27."""
    return chr(ord("A") + index) if index < 26 else f"N{index + 1}"
