"""Records of runs and evaluations, with the configs that match their hashes."""

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from jaxrobust.config import Values, completed, of_phase
from jaxrobust.evaluation.records.record import AccuracyRecord
from jaxrobust.runtime.commandline.arguments import run_name
from jaxrobust.runtime.files import folders, jsonl
from jaxrobust.weights.store import hashes
from jaxrobust.weights.trained import start_run


class RunRecord(NamedTuple):
    """A record, its file, and the config of its network, if that is next to it."""

    record: AccuracyRecord
    file: Path
    config: dict[str, Any] | None  # of a run, or of an imported folder
    started: dict[str, Any] | None = None  # likewise, for the start of that run


def collect(places: list[Path]) -> list[RunRecord]:
    """Return the records of places, each with the config that matches its hash."""
    configs: dict[str, dict[str, Any]] = {}
    collected: list[RunRecord] = []
    for place in places:
        for folder in (place, place.parent, place.parent.parent):
            configs |= dict(_read(folder)) if (folder / "config.json").is_file() else {}
        inside = [place / "results.jsonl", place / "evaluation" / "results.jsonl"]
        files = [p for p in (inside if place.is_dir() else [place]) if p.is_file()]
        if not files and not (place / "config.json").is_file():
            names = "a run, a folder with results.jsonl, that file"
            other = f"; name {names}, or an imported folder of weights"
            raise ValueError(f"{place} has no records{folders.similar(place) or other}")
        collected += [RunRecord(record, file, None) for file in files for record in _records(file)]
    for at, one in enumerate(collected):
        one = one._replace(config=configs.get(str(one.record.config_sha256)))
        collected[at] = one._replace(started=_started(one))
    return collected


def _started(one: RunRecord) -> dict[str, Any] | None:
    """Return the config of the run or imported folder that `init.weights` names."""
    # It is searched at that path and next to this run, where a start named by its config lies.
    start = (one.config or {}).get("init", {}).get("weights")
    if not start:
        return None
    config_of_start = start_run.named(start)
    name = run_name(config_of_start) if config_of_start else Path(start).name
    for place in (Path(start), *(parent / name for parent in one.file.parents)):
        if (place / "config.json").is_file():
            (config, *_) = [config for _, config in _read(place)]
            return config
    return None


def _records(file: Path) -> Iterator[AccuracyRecord]:
    for record in map(AccuracyRecord.from_json, jsonl.read(file)):
        if not {"clean", "attacks", "config_sha256", "dataset"}.isdisjoint(record.absent):
            raise ValueError(f"{file} holds lines that are not records of jaxrobust evaluate")
        yield record


def _read(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield a config under each hash that records may have: as stored, completed, per phase."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
        values = {key: value for key, value in config.items() if key != "version"}
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error}); restore the original") from error
    if "architecture" in values:  # of an imported folder
        yield hashes.config_sha256(values), values
        return
    full = whole_config(values)
    phases: list[Any] = [of_phase(full, name) for name in full.phases]
    for config in (values, full, *phases):
        yield hashes.config_sha256(config), full


def other_config(one: RunRecord) -> str:
    """Report if the config next to a record is not the one that made it, else return ""."""
    config_sha256 = one.record.config_sha256
    if one.config is not None or config_sha256 is None:
        return ""
    folders = (one.file.parent, one.file.parent.parent)
    file = next((f / "config.json" for f in folders if (f / "config.json").is_file()), None)
    if file is None:
        return ""
    return (
        f"{file} is not the config that the record was made with, whose hash begins with "
        f"{config_sha256[:12]}: it was edited since, the run continued with different values of "
        "keys that may change, or it belongs to another run"
    )


def whole_config(config: dict[str, Any]) -> Values:
    """Complete the config of a run with keys added since."""
    return _completed(json.dumps(config))


@functools.lru_cache(256)
def _completed(text: str) -> Values:
    return json.loads(json.dumps(completed(json.loads(text))), object_hook=Values)
