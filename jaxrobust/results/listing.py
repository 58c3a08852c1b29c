"""List the trainings and evaluations below a folder with their results, newest first."""

import datetime
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from jaxrobust.evaluation.records import checked, records
from jaxrobust.evaluation.records.record import AccuracyRecord
from jaxrobust.report import gathered
from jaxrobust.report.parts import sentences
from jaxrobust.results.plotting import MARK, SUFFIXES
from jaxrobust.runtime.text.spelling import counted
from jaxrobust.types import fraction

_RESULTS, _METRICS, _CONFIG = "results.jsonl", "metrics.jsonl", "config.json"
_RUN = {_CONFIG, "data.json"}  # files of a training before its first metrics
_PICTURES = (*(f".{suffix}" for suffix in SUFFIXES), ".html")
_TAIL = 4096  # bytes at the end of metrics.jsonl that contain its last line
_CHECKPOINTS = ("best", "latest", "stopped")  # folders of a phase, which hold no records
_HEAD = (
    *("date, UTC", "kind", "folder", "network", "clean", "robust", "n", "threat", "attack"),
    *("weights", "goodput", "figures"),
)
_RIGHT = ("clean", "robust", "n", "goodput")
_DOUBT = "?: flags of the record put the number in doubt; jaxrobust report FOLDER explains why"


class ListedRow(NamedTuple):
    """A training or an evaluation; None means unknown or missing."""

    time: str  # UTC, to the second
    kind: str  # training or evaluation
    folder: str  # relative to the listed folder
    network: str | None
    clean: float | None
    robust: float | None
    images: int | None
    threats: list[str]
    attack: str | None
    weights: str | None  # or the progress of a training without results
    dataset: str | None
    split: str | None
    evaluation: str | None  # its number
    flags: dict[str, str]
    figures: list[str]  # names of files next to the records
    goodput: dict[str, Any] | None = None  # of a training: where its time went


class Listing(NamedTuple):
    """All results below a folder."""

    folder: Path
    rows: list[ListedRow]
    figures: list[str]  # by jaxrobust figure, in folders without records
    notes: list[str]  # on files that could not be read

    def plain(self) -> dict[str, Any]:
        """Return the listing for JSON."""
        rows = [row._asdict() for row in self.rows]
        about = {"schema": 1, "folder": str(self.folder)}
        return about | {"rows": rows, "figures": self.figures, "notes": self.notes}


def find(folder: Path) -> Listing:
    """List the results below a folder; `ValueError` if it is missing or has none.

    Metrics are not read in full, so hundreds of runs take about a second.
    """
    again = "name a folder of runs; jaxrobust train --config quickstart trains a first run"
    if not folder.exists():
        raise ValueError(f"{folder} does not exist; {again}")
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file; {again}")
    notes: list[str] = []
    rows: list[ListedRow] = []
    figures: list[str] = []
    for place, files in _walk(folder, set(), notes):
        if _is_run(files) or _RESULTS in files:
            rows += _rows(place, files, folder, notes)
            continue
        # Pictures next to a table written by jaxrobust figure.
        tables = {name[:-4] for name in files if name.endswith(".tex") and _is_ours(place / name)}
        pictures = [n for n in files if n.endswith(_PICTURES) and Path(n).stem in tables]
        figures += [str((place / name).relative_to(folder)) for name in pictures]
    if not rows and not figures:
        nothing = f"{folder} holds neither a run ({_METRICS}) nor records ({_RESULTS}); {again}"
        raise ValueError(" ".join([nothing, *(f"({note})" for note in notes[:1])]))
    rows.sort(key=lambda row: (row.time, row.folder), reverse=True)
    return Listing(folder, rows, sorted(figures), list(dict.fromkeys(notes)))


def _is_run(files: set[str]) -> bool:
    return _METRICS in files or files >= _RUN


def _walk(folder: Path, visited: set[str], notes: list[str]) -> Iterator[tuple[Path, set[str]]]:
    """Yield folders with runs, records or figures and their files, once each, following links."""
    real = os.path.realpath(folder)
    if real in visited:
        return
    visited.add(real)
    try:
        with os.scandir(folder) as entries:
            kinds = {entry.name: entry.is_dir() for entry in entries}
    except OSError as error:
        notes.append(f"{folder} cannot be read ({error.strerror or error}); it is left out.")
        return
    files = {name for name, is_folder in kinds.items() if not is_folder}
    if _is_run(files) or _RESULTS in files or any(name.endswith(".tex") for name in files):
        yield folder, files
    for name in sorted(kinds.keys() - files):
        if not name.startswith(".") and name not in _CHECKPOINTS:
            yield from _walk(folder / name, visited, notes)


def _is_ours(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(MARK)) == MARK.encode()
    except OSError:
        return False


def _rows(folder: Path, files: set[str], top: Path, notes: list[str]) -> list[ListedRow]:
    # An evaluation belongs to the run above it, whose config names the network.
    configs = [f for f in (folder, folder.parent) if (f / _CONFIG).is_file()]
    config = gathered.json_of(configs[0] / _CONFIG, notes) if configs else {}
    model = gathered.section(config, "model").get("name")
    common: dict[str, Any] = {
        "folder": "." if folder == top else str(folder.relative_to(top)),
        "figures": sorted(name for name in files if name.endswith(_PICTURES)),
    }
    trained: list[ListedRow] = []
    evaluated: list[ListedRow] = []
    for record in _records(folder / _RESULTS, notes) if _RESULTS in files else ():
        network = (record.model or {}).get("name") or model
        row = ListedRow(
            time=_utc(record.time) or _changed(folder / _RESULTS),
            kind="training" if record.evaluation is None else "evaluation",
            network=None if network is None else str(network),
            clean=record.clean,
            robust=record.robust,
            images=records.images_of(record),
            threats=list(dict.fromkeys(f"{t.norm} {fraction(t.epsilon)}" for t in record.threats)),
            attack=sentences.method(record),
            weights=record.weights,
            dataset=record.dataset,
            split=record.split,
            evaluation=record.evaluation,
            flags=record.flags,
            **common,
        )
        (trained if record.evaluation is None else evaluated).append(row)
    if trained:  # keep only the last phase of a training
        last = max(reversed(trained), key=lambda row: row.time)
        return [*evaluated, last._replace(goodput=_goodput(folder, notes))]
    if not _is_run(files):
        return evaluated
    data = gathered.section(config, "data").get("name")  # a training without a record
    begun = ListedRow(
        time=max(_changed(folder / name) for name in (_METRICS, _CONFIG) if name in files),
        kind="training",
        network=None if model is None else str(model),
        clean=None,
        robust=None,
        images=None,
        threats=[],
        attack=None,
        weights=f"no numbers yet; {_progress(folder / _METRICS)}",
        dataset=None if data is None else str(data),
        split=None,
        evaluation=None,
        flags={},
        goodput=_goodput(folder, notes),
        **common,
    )
    return [*evaluated, begun]


def _goodput(folder: Path, notes: list[str]) -> dict[str, Any] | None:
    found = gathered.goodput_of(folder, notes)
    return found and found.plain()


def _records(path: Path, notes: list[str]) -> Iterator[AccuracyRecord]:
    try:
        rows, damaged = gathered.rows_of(path)
    except OSError as error:
        notes.append(f"{path} cannot be read ({error.strerror or error}); it is left out.")
        return
    notes += damaged
    missing = 0
    for row in rows:
        try:
            record = gathered.record_of(row, path)
            checked.if_there(record, path)
        except ValueError as error:
            notes.append(f"{error}; it is left out.")
        else:
            missing += bool(checked.missing(record, path))
            yield record
    if missing:
        notes.append(
            f"The verdicts of {counted(missing, 'evaluation')} in {path} are missing, so nothing "
            "confirms these numbers."
        )


def _progress(metrics: Path) -> str:
    """Describe the progress of a training from the end of its metrics."""
    try:
        with metrics.open("rb") as file:
            file.seek(max(file.seek(0, os.SEEK_END) - _TAIL, 0))
            lines = file.read().splitlines()
    except OSError:
        return "it has not begun"
    for line in reversed(lines):
        try:
            row = json.loads(line)
            return f"{row['phase']}, step {row['step']}"
        except (ValueError, KeyError, TypeError):
            continue
    return "its metrics contain no step"


def _utc(text: str | None) -> str | None:
    try:
        time = datetime.datetime.fromisoformat(str(text))
    except ValueError:
        return None
    time = time if time.tzinfo else time.replace(tzinfo=datetime.UTC)
    return time.astimezone(datetime.UTC).strftime("%Y-%m-%d %H:%M:%S")


def _changed(path: Path) -> str:
    try:
        seconds = path.stat().st_mtime
    except OSError:
        seconds = 0.0
    time = datetime.datetime.fromtimestamp(seconds, datetime.UTC)
    return time.strftime("%Y-%m-%d %H:%M:%S")


def text(listing: Listing) -> str:
    """Format a listing as a table, with notes below."""
    cells = [list(_HEAD)]
    for row in listing.rows:
        clean, robust = ("-" if v is None else f"{100 * v:.1f}%" for v in (row.clean, row.robust))
        count = "-" if row.images is None else f"{row.images:,}"
        first = (row.time[:16], row.kind, row.folder, row.network or "-")
        numbers = (clean, robust + ("?" if row.flags else ""), count)
        attack = (", ".join(row.threats) or "-", row.attack or "-", row.weights or "-")
        share = f"{100 * row.goodput['share']:.1f}%" if row.goodput else "-"
        cells.append([*first, *numbers, *attack, share, ", ".join(row.figures)])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for row_cells in cells:
        padded = [
            f"{cell:>{width}}" if name in _RIGHT else f"{cell:<{width}}"
            for name, cell, width in zip(_HEAD, row_cells, widths, strict=True)
        ]
        lines.append("  ".join(padded).rstrip())
    if any(row.flags for row in listing.rows):
        lines.append(_DOUBT)
    lines += [f"figure: {name}" for name in listing.figures]
    return "\n".join([*lines, *(f"note: {note}" for note in listing.notes)])
