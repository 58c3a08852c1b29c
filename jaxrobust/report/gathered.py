"""Runs and evaluations on disk as plain data; files that cannot be read become notes."""

import contextlib
import itertools
import json
import math
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxrobust.evaluation.records import checked, records, stopping, verdicts
from jaxrobust.evaluation.records.record import AccuracyRecord, check
from jaxrobust.evaluation.records.verdicts import Verdicts
from jaxrobust.report import curves
from jaxrobust.report.curves import CurveEvent, Metrics
from jaxrobust.runtime.files import folders, jsonl
from jaxrobust.training.run import goodput
from jaxrobust.training.run.goodput import Goodput
from jaxrobust.weights.store import hashes
from jaxrobust.weights.trained import runs as of_training

_DEPTH = 3  # levels of folders searched below a named one
_RESULTS = "results.jsonl"
_COSTS = ("fooled", "forward", "backward", "idle", "seconds", "compile_seconds")
_NOTED = {  # files next to the metrics: where a run went back, and where it resumed
    "rollback": "{why}; back to step {back_to}",
    "resumption": "another process continued here, {time}, on {devices}",
}


class ReportedRun(NamedTuple):
    """A training on disk."""

    name: str  # short, unique on a page
    folder: Path
    config: dict[str, Any]
    metrics: Metrics
    planned: dict[str, int]  # phase -> steps, if known
    classes: list[str]  # names in the order of labels, or none
    at_work: str | None  # description of the process that trains it
    goodput: Goodput | None = None  # where its time went, if recorded

    @property
    def phases(self) -> list[str]:
        """The phases with metrics in order; those missing in the config come last."""
        listed, curves = self.config.get("phases"), self.metrics.curves
        names = [p for p in listed if isinstance(p, str)] if isinstance(listed, list) else []
        return list(dict.fromkeys(phase for phase in (*names, *curves) if phase in curves))

    @property
    def config_sha256(self) -> str:
        """The hash of the config in records."""
        return hashes.config_sha256({k: v for k, v in self.config.items() if k != "version"})


class ReportedEvaluation(NamedTuple):
    """A record, with its verdicts per image if available."""

    name: str  # short name of the network
    file: Path  # holds the record
    record: AccuracyRecord
    verdicts: Verdicts | None
    classes: list[str]
    run: Path | None  # the run that was evaluated
    config: dict[str, Any]  # of that run, empty if unknown

    @property
    def model(self) -> str | None:
        """The architecture according to the record or the run's config; None if unknown."""
        name = (self.record.model or {}).get("name") or section(self.config, "model").get("name")
        return str(name) if name else None

    @property
    def phase(self) -> str:
        """The phase of the weights; empty if unknown."""
        return str(self.record.weights or "").partition(",")[0]

    @property
    def images(self) -> int:
        """The number of images evaluated; 0 if unknown."""
        if self.verdicts is not None:
            return len(self.verdicts.labels)
        if self.record.stopped:
            return int(self.record.stopped["stopped_after"])
        return records.images_of(self.record) or 0

    def class_name(self, label: int) -> str:
        """Return the name of a class."""
        return self.classes[label] if 0 <= label < len(self.classes) else f"class {label}"


class Gathered(NamedTuple):
    """The content of a page."""

    runs: list[ReportedRun]
    evaluations: list[ReportedEvaluation]
    notes: list[str]


def gather(
    places: Sequence[Path], *, metrics_of: Callable[[Path], Metrics] = curves.read
) -> Gathered:
    """Read the runs and evaluations at `places`: runs, files of records, or folders of either."""
    notes: list[str] = []
    runs: dict[Path, None] = {}
    files: dict[Path, None] = {}
    for place in places:
        if not place.exists():
            near = folders.similar(place) or "; name a run, its evaluation, or a parent folder"
            raise ValueError(f"{place} does not exist{near}")
        for path in _record_files(place):
            (files if path.is_file() else runs).setdefault(path)
    names = _names([*runs, *(file.parent for file in files)])
    read = [_run(folder, names[folder], metrics_of, notes) for folder in runs]
    evaluations = [one for file in files for one in _evaluations(file, names[file.parent], notes)]
    if not read and not evaluations:
        nothing = (
            f"{', '.join(map(str, places))} holds neither a run (metrics.jsonl) nor records "
            "(results.jsonl); name the folder of a run or of an evaluation"
        )
        other = "There is nothing else to show; name a run or its results.jsonl"
        raise ValueError(f"{notes[0]} {other}" if notes else nothing)
    for at, one in enumerate(evaluations):  # outside of runs, match them by the config's hash
        same = [run for run in read if one.record.config_sha256 == run.config_sha256]
        if one.run is None and len(same) == 1:
            run = same[0]
            evaluations[at] = one._replace(
                name=run.name, run=run.folder, classes=run.classes, config=run.config
            )
    return Gathered(read, evaluations, list(dict.fromkeys(notes)))


def _record_files(place: Path) -> Iterator[Path]:
    if place.is_file():
        yield place
        return
    below = str(place).rstrip(os.sep).count(os.sep)
    for folder, inner, files in os.walk(place):
        here = Path(folder)
        is_run = "metrics.jsonl" in files or {"config.json", "data.json"} <= set(files)
        if is_run:
            yield here
        if _RESULTS in files:
            yield here / _RESULTS
        deep = folder.rstrip(os.sep).count(os.sep) - below >= _DEPTH
        # The checkpoints of a run are not searched.
        inside = [f for f in inner if not is_run or f.startswith("evaluation")]
        inner[:] = [] if deep else sorted(f for f in inside if not f.startswith("."))


def _names(folders: Sequence[Path]) -> dict[Path, str]:
    named_by = {}  # folder -> the folder that gives its name, such as an evaluation's run
    for folder in folders:
        inside = folder.name.startswith("evaluation")
        of_run = inside and (folder.parent / "config.json").is_file()
        named_by[folder] = folder.resolve().parent if of_run else folder.resolve()
    ends = dict.fromkeys(named_by.values(), 1)

    def end_of(path: Path) -> str:
        return "/".join(path.parts[-ends[path] :]).lstrip("/")

    for _ in range(6):
        counts = Counter(map(end_of, ends))
        for path in ends:
            ends[path] += counts[end_of(path)] > 1
    return {folder: end_of(path) for folder, path in named_by.items()}


def json_of(path: Path, notes: list[str]) -> dict[str, Any]:
    """Read a file with one JSON object; if it cannot be read, add a note and return {}."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        notes.append(f"{path} cannot be read ({error}); its content is left out.")
        return {}
    return content if isinstance(content, dict) else {}


def _run(
    folder: Path, name: str, metrics_of: Callable[[Path], Metrics], notes: list[str]
) -> ReportedRun:
    metrics = metrics_of(folder / "metrics.jsonl")
    notes += metrics.notes
    config = json_of(folder / "config.json", notes)
    planned = _planned(config, json_of(folder / "data.json", notes))
    events = list(metrics.events)
    for phase, (kind, text) in itertools.product(metrics.curves, _NOTED.items()):
        rows, damaged = rows_of(folder / phase / f"{kind}s.jsonl")
        notes += damaged
        for row in rows:
            if isinstance(row.get("step"), int):
                words = text.format_map(defaultdict(lambda: None, row))
                events.append(CurveEvent(phase, row["step"], kind, words))
    metrics = metrics._replace(events=sorted(events, key=lambda e: (e.phase, e.step)))
    if not metrics.curves:
        notes.append(f"The run {folder} has no metrics yet.")
    try:
        holder = json.loads((folder / "lock").read_text())
        at_work = f"process {holder['pid']} on {holder['host']} since {holder['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        at_work = None
    times = goodput_of(folder, notes)
    return ReportedRun(name, folder, config, metrics, planned, _classes(folder), at_work, times)


def goodput_of(folder: Path, notes: list[str]) -> Goodput | None:
    """Add up where the time of a run went; None if that is not recorded."""
    rows, damaged = rows_of(folder / goodput.FILE)
    notes += damaged
    try:
        return goodput.total(rows)
    except (KeyError, TypeError, ValueError) as error:
        notes.append(f"{folder / goodput.FILE} cannot be read ({error!r}); it is left out.")
        return None


def _classes(folder: Path) -> list[str]:
    try:
        return (folder / of_training.CLASSES).read_text().split("\n")[:-1]
    except (OSError, UnicodeDecodeError):
        return []


def _planned(config: dict[str, Any], data: dict[str, Any]) -> dict[str, int]:
    planned = {}
    images = data.get("data.train_split.records")
    for phase, values in config.items():
        if not (isinstance(values, dict) and {"batch_size", "epochs"} <= values.keys()):
            continue
        counts = (images, values["batch_size"], values["epochs"])
        other = section(values, "changes").get("data") or section(config, "data").get("extra")
        if all(isinstance(n, int) and n > 0 for n in counts) and not other:
            planned[phase] = counts[0] // counts[1] * counts[2]
    return planned


def section(config: dict[str, Any], key: str) -> dict[str, Any]:
    """Return a section of a config, or {} if the value is not a section."""
    values = config.get(key)
    return values if isinstance(values, dict) else {}


def rows_of(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Read a file of JSON lines; also return notes on damaged lines, which are left out."""
    with contextlib.suppress(ValueError, OSError):
        return (jsonl.read(path) if path.is_file() else []), []
    rows, damaged = [], []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            row = json.loads(line)
            rows.append(row) if isinstance(row, dict) else damaged.append(number)
        except ValueError:
            damaged.append(number)
    return rows, [f"Damaged lines of {path} are left out: {', '.join(map(str, damaged[:5]))}."]


def _evaluations(file: Path, name: str, notes: list[str]) -> Iterator[ReportedEvaluation]:
    rows, damaged = rows_of(file)
    notes += damaged
    folders = file.parent, file.parent.parent
    run = next((p for p in folders if (p / "config.json").is_file()), None)
    classes = _classes(run) if run else []
    config = json_of(run / "config.json", notes) if run else {}
    for row in rows:
        try:
            record, images = record_of(row, file), None
            if record.verdicts:
                try:
                    images = verdicts.read(file.parent / record.verdicts)
                except (ValueError, OSError) as error:
                    notes.append(f"{error}. Parts that need the verdicts are left out.")
                else:
                    checked.compare(record, file, images)
        except ValueError as error:
            notes.append(f"{error}; it is left out.")
        else:
            yield ReportedEvaluation(name, file, record, images, classes, run, config)


def record_of(row: dict[str, Any], file: Path) -> AccuracyRecord:
    """Make the record from a line; `ValueError` if it is not one, or a part has the wrong type."""
    if not {"clean", "attacks", "dataset"} <= row.keys():
        raise ValueError(f"{file} holds a line that is not a record of jaxrobust evaluate")
    record = AccuracyRecord.from_json(row)
    check(record, str(file))
    _check_parts(record, file)
    checked.check(record, file)
    return record


def _check_parts(record: AccuracyRecord, file: Path) -> None:
    """Raise if parts have a wrong type, which `check` does not inspect."""
    attacks: list[Any] = [*record.attacks]
    costs: list[Any] = [*(record.costs or ())]
    shares = [record.clean, record.robust, *dict(record.accuracy_after or {}).values()]
    ends: list[Any] = [*dict(record.interval or {}).values()]
    stopped: dict[str, Any] = {**(record.stopped or {})}
    numbers = ["stopped_after", "of", "alpha", "order_seed"] if record.stopped else []
    bounds = [stopped.get("clean"), stopped.get("robust")] if record.stopped else []
    if "difference" in stopped:
        numbers += ["gained", "lost", "e_value"]
        bounds.append(stopped["difference"])
    if not (
        all(isinstance(one, dict) for one in (*attacks, *costs))
        and all(v is None or (_is_number(v) and 0 <= v <= 1) for v in shares)
        and all(e is None or (isinstance(e, list) and len(e) == 2) for e in ends)
        and all(_is_number(end) for e in ends for end in e or ())
        and all(cost.get(k) is None or _is_number(cost[k]) for cost in costs for k in _COSTS)
        and all(isinstance(a.get(key), str) for a in attacks for key in ("name", "norm"))
        and all(_is_number(a.get("epsilon")) for a in attacks)
        and len(record.threats) == len(attacks)  # building threats checks each one
        and all(_is_number(stopped.get(key)) for key in numbers)
        and all(isinstance(e, list) and len(e) == 2 and all(map(_is_number, e)) for e in bounds)
        and (record.stopped is None or stopped.get("rule") in stopping.RULES)
        and (record.fast is None or is_sound(record.fast))
    ):
        raise ValueError(f"{file} has a record with fields of the wrong type; restore the original")


def is_sound(fast: Mapping[str, Any]) -> bool:
    """Tell whether a part of a record has the keys, types and ranges of `FastSample`."""
    counts: list[Any] = [fast.get(key) for key in ("survivors", "sampled", "fooled", "at_most")]
    shares: list[Any] = [fast.get(key) for key in ("level", "robust_at_least")]
    if not (
        all(type(count) is int and count >= 0 for count in counts)
        and all(type(share) in (int, float) and 0 <= share <= 1 for share in shares)
    ):
        return False
    survivors, sampled, fooled, at_most = counts
    fallen = fast.get("fallen")
    if not (isinstance(fallen, list) and all(type(number) is int for number in fallen)):
        return False
    fits = fooled == len(fallen) and fooled <= sampled <= survivors
    return bool(fits and at_most <= survivors - sampled)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
