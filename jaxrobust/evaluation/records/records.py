"""Result records: reading and writing them, their parts, and their lines for people."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxrobust.attacks import registry
from jaxrobust.evaluation.network import checks, randomised
from jaxrobust.evaluation.records import stopping, verdicts
from jaxrobust.evaluation.records.record import (
    AccuracyRecord,
    AttackCost,
    DrawsJudged,
    Interval,
    Intervals,
    OneDraw,
    check,
)
from jaxrobust.runtime.files import jsonl

_REPLAY = "none: what fooled elsewhere, projected"
_CLIPPED = (
    "{pixels} pixels of {images} images lay up to {largest:.2g} outside [0, 1], as after a "
    "resize, and were clipped"
)

# Findings of an evaluation besides its verdicts.
_FINDINGS = ("search_sample", "clipped", "fast")
# Fields of a stopped evaluation that belong to its rule, not to its findings.
_RULE = ("alpha", "order_seed", "until_width", "tie", "against_sha256", "against")


def with_step_rules(costs: Iterable[AttackCost]) -> list[AttackCost]:
    """Add their step rules to the costs of attacks."""

    def rule(name: str) -> str | None:
        return _REPLAY if name == verdicts.REPLAY else registry.rule(name)

    return [{**cost, "step_rule": rule(cost["attack"])} for cost in costs]


def read(workdir: Path) -> list[AccuracyRecord]:
    """Read the records of a workdir, oldest first; raise on a damaged or invalid line."""
    path = workdir / "results.jsonl"
    records = [AccuracyRecord.from_json(row) for row in jsonl.read(path)]
    for record in records:
        check(record, str(path))
    return records


def append(path: Path, record: AccuracyRecord) -> None:
    """Append a record to a file."""
    check(record, str(path))
    jsonl.append(path, record.to_json())


def save(
    path: Path, by_image: verdicts.Verdicts, record_of: Callable[[], AccuracyRecord]
) -> dict[str, Any]:
    """Append a new record to a file and write its verdicts next to it; return its JSON.

    A missing folder is created, because the evaluation may have taken hours.
    """
    if path.suffix != ".jsonl":
        raise ValueError(f"{path} must be a .jsonl file, such as results.jsonl")
    record = record_of()
    number = str(record.evaluation)
    record = dataclasses.replace(record, verdicts=verdicts.file_of(number))
    if jax.process_index() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        verdicts.write(path.with_name(verdicts.file_of(number)), number, by_image)
        append(path, record)
    return record.to_json()


def interval(accuracy: float | None, n: int) -> Interval | None:
    """Compute the exact 95% interval of an accuracy on n images; None without an accuracy."""
    return None if accuracy is None else list(checks.binomial_interval(round(accuracy * n), n))


def intervals(clean: float | None, robust: float | None, n: int) -> Intervals | None:
    """Compute the intervals of both accuracies on n images; None without images."""
    return {"clean": interval(clean, n), "robust": interval(robust, n)} if n else None


def one_draw(clean: float, robust: np.ndarray) -> OneDraw:
    """Build the accuracies by one draw; `robust`, bool[N], marks the images that stand."""
    n, share = len(robust), float(robust.mean()) if len(robust) else 0.0
    bits = randomised.packed(robust)
    return {"clean": clean, "robust": share, "interval": intervals(clean, share, n), "bits": bits}


def identity(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return the facts that identify an evaluation, without its findings and versions."""
    exact = {key: value for key, value in result["fingerprint"].items() if isinstance(value, str)}
    settings = {key: value for key, value in result.items() if key not in _FINDINGS}
    if stopped := settings.get("stopped"):
        settings["stopped"] = {key: stopped[key] for key in _RULE if key in stopped}
        settings["image_ids"] = stopped["images"]
    if draws := settings.get("draws"):
        settings["draws"] = {key: draws[key] for key in ("rule", "draws")}
    return settings | {"fingerprint": exact}


def number_of(identity: Mapping[str, Any]) -> str:
    """Compute the number of an evaluation from its identity."""
    return hashlib.sha256(json.dumps(dict(identity), sort_keys=True).encode()).hexdigest()[:12]


def ranges(ids: Sequence[int]) -> str:
    """Format places in a split, in their order, as in records: "0..99, 7, 200..299"."""
    runs: list[list[int]] = []
    for number in map(int, ids):
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return ", ".join("..".join(map(str, run)) for run in runs)


def images_of(record: AccuracyRecord) -> int | None:
    """Count the images of a record from its places, as formatted by `ranges`; None if unknown.

    Images that a test could not read have places but do not count.
    """
    runs = _runs(record.image_ids or "")
    if runs is None:
        return None
    return sum(last - first + 1 for first, last in runs) - len(record.damaged or ())


def places(ids: str) -> np.ndarray | None:
    """Parse places formatted by `ranges`, i[N]; None if unknown."""
    runs = _runs(ids)
    if runs is None:
        return None
    return np.concatenate([np.arange(first, last + 1) for first, last in runs])


def _runs(ids: str) -> list[tuple[int, int]] | None:
    runs = []
    for run in ids.split(", "):
        first, dots, last = run.partition("..")
        if not first.isdigit() or not (last.isdigit() if dots else not last):
            return None
        runs.append((int(first), int(last or first)))
    return runs


def attack_line(record: AccuracyRecord) -> str:
    """Describe the attack of a record, its threat, and how many images replay decided."""
    if not record.attacks:
        return "none"
    decided = replayed_line(record)
    replays = f" ({decided})" if decided else ""
    if record.is_union:
        of = "worst case" if record.worst_case else "union"
        return f"{of} of {', '.join(record.accuracy_after or ())}{replays}"
    attack = record.attacks[0]
    name = record.method or f"{attack['name'].upper()} {attack['steps']} steps"
    return f"{name}, {attack['norm']} {attack['epsilon']:.4g}{replays}"


def replayed_line(record: AccuracyRecord) -> str:
    """Say how many images replayed points decided; "" if none were tried."""
    if not record.replayed:
        return ""
    count = sum(source["fooled"] for source in record.replayed)
    return f"{count:,} {'image' if count == 1 else 'images'} decided by replayed points"


def notes_of(record: AccuracyRecord) -> list[str]:
    """Format the notes that only some evaluations have."""
    lines = [stopping.line(record.stopped)] if record.stopped else []
    lines += [_CLIPPED.format(**record.clipped)] if record.clipped else []
    if record.task:
        lines.append(f"task {record.task}: an image counts as right until an attack succeeds on it")
    return [*lines, draws_line(record.draws)] if record.draws else lines


def draws_line(draws: DrawsJudged) -> str:
    """Describe the rule for a randomised network's verdicts, and the result of one draw."""
    verdict = randomised.VerdictRule(draws["rule"], draws["draws"])
    line = f"verdicts by {verdict.words()}: {randomised.RULES[verdict.rule]}"
    one = draws.get("one_draw")
    if verdict.rule == randomised.ONE:
        return line
    if not one:  # of a union
        return f"{line}; the result for one draw is unknown, because parts of the union lack it"
    most = "at most " if one.get("at_most") else ""
    ends_of = one.get("interval")
    ends = ends_of and ends_of.get("robust")
    between = f", 95% interval {ends[0]:.1%} to {ends[1]:.1%}" if ends else ""
    return f"{line}; by one draw, as in auto-attack: clean {one['clean']:.1%}, robust " + (
        f"{most}{one['robust']:.1%}{between}"
    )
