"""Stages: read and checked before a training, and run one by one after it.

Results of each stage are noted, and existing results are not made again.
"""

import contextlib
import datetime
import functools
import io
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from jaxrobust.config import Config
from jaxrobust.evaluation.questions import command
from jaxrobust.evaluation.questions.flags import GivenFlags
from jaxrobust.evaluation.questions.questions import AUTOATTACK
from jaxrobust.evaluation.records import records
from jaxrobust.publish import export_torch
from jaxrobust.publish.export_torch import ExportSettings
from jaxrobust.results.selection import choice
from jaxrobust.results.stages import checks
from jaxrobust.results.stages.stage import EXPORT, SELECT, Stage, parse
from jaxrobust.runtime.files import jsonl, locks, provenance
from jaxrobust.runtime.processes import hosts
from jaxrobust.runtime.text import terminal
from jaxrobust.runtime.text.progress import say
from jaxrobust.training.run import run as training_run
from jaxrobust.weights.store.hashes import file_sha256
from jaxrobust.weights.trained import kept, runs

NOTES = "stages.jsonl"  # in a run: a line for each finished stage


def stages(then: str | None, config: Any, workdir: Path, *, estimate: bool) -> list[Stage]:
    """Read and check the stages of `--then`; none if it is None.

    With `estimate`, the total cost is printed unless the training has begun.
    Raises:
      ValueError: an unknown stage, or one that cannot work after this training.
    """
    if then is None:
        return []
    parsed = parse(then)
    for line in checks.prepared(config, parsed):
        say(line)
    hosts.together(lambda: checks.check(config, parsed, workdir))
    if estimate and not hosts.first((workdir / "config.json").is_file()):
        hosts.together(lambda: training_run.check(config, workdir))
        for line in checks.lines(config, parsed, workdir):
            say(line)
    return parsed


def run(
    stages: Sequence[Stage],
    config: Config,
    workdir: Path,
    *,
    begin: Callable[[Stage], None] = lambda stage: None,
) -> None:
    """Run the stages on the weights of a trained run; all hosts call it.

    Calling it again resumes where it stopped: a finished stage whose results still exist is
    skipped.
    Raises:
      ValueError: another process runs the stages, or other files are in the way.
    """
    if not stages:
        return
    selects = any(stage.kind == SELECT for stage in stages)
    entry = any(stage.id for stage in stages)
    with _alone(workdir):
        for stage in stages:
            begin(stage)
            asked: dict[str, Any] = {"stage": stage.text, "selected": selects}
            asked["images"] = checks.images(config)
            if stage.kind != SELECT:
                asked["weights_sha256"] = _by_first(lambda: _weights(workdir, selects))
            if _by_first(functools.partial(_is_done, workdir, asked)):
                say(f"{stage.text}: already done, see {workdir / NOTES}")
                continue
            say(f"{stage.text}: begins")
            start = time.perf_counter()
            facts: dict[str, Any]
            if stage.kind == SELECT:
                chosen = choice.select(choice.SelectionSettings(workdir))["chosen"]
                keys, file = ("step", "weights", "weights_sha256"), workdir / kept.SELECTION
                facts = {"chosen": {key: chosen[key] for key in keys}}
                facts["files"] = {kept.SELECTION: file_sha256(file)}
            elif stage.kind == EXPORT:
                facts = _export(stage, workdir, selected=selects)
            else:
                facts = _attack(stage, config, workdir, selected=selects, entry=entry)
            _note(workdir, asked | facts | {"seconds": round(time.perf_counter() - start, 1)})


@contextlib.contextmanager
def _alone(workdir: Path) -> Iterator[None]:
    with contextlib.ExitStack() as locked:
        resource, otherwise = f"the stages after the training in {workdir}", "copy the run"
        lock = locks.held(workdir / "stages.lock", resource=resource, otherwise=otherwise)
        hosts.together(lambda: None if jax.process_index() else locked.enter_context(lock))
        yield


def _by_first(function: Callable[[], Any]) -> Any:
    """Return the first host's result on all hosts; if it raises, all raise."""
    result = hosts.together(lambda: None if jax.process_index() else function())
    return hosts.everyone(result)[0]


def _weights(workdir: Path, selected: bool) -> str:
    if selected:
        return kept.selected(workdir).weights_sha256
    last = runs.phase_of(workdir)
    tested = [r for r in records.read(workdir) if str(r.weights).startswith(f"{last},")]
    return str(tested[-1].weights_sha256)


def _is_done(workdir: Path, asked: dict[str, Any]) -> bool:
    """Tell whether the last note of a stage matches `asked` and its results exist."""
    lines = [row for row in jsonl.read(workdir / NOTES) if row.get("stage") == asked["stage"]]
    if not lines or any(lines[-1].get(key) != value for key, value in asked.items()):
        return False
    there = {record.evaluation for record in records.read(workdir / "evaluation")}
    files = lines[-1].get("files") or {}
    return set(lines[-1].get("evaluations") or ()) <= there and _are(workdir, files)


def _are(folder: Path, files: dict[str, str]) -> bool:
    return all(
        (folder / name).is_file() and file_sha256(folder / name) == sha256
        for name, sha256 in files.items()
    )


def _note(workdir: Path, row: dict[str, Any]) -> None:
    if jax.process_index() == 0:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        jsonl.append(workdir / NOTES, row | {"time": now, "commit": provenance.commit()})
    hosts.together(lambda: None)  # wait, so that slower hosts read the line


def _attack(
    stage: Stage, config: Config, workdir: Path, *, selected: bool, entry: bool
) -> dict[str, Any]:
    flags = GivenFlags(
        workdir=str(workdir),
        attack=stage.attack,
        n=checks.images(config),
        selected=selected,
        # RobustBench does not accept accuracies with images replayed from other evaluations.
        noreplay=entry and stage.attack == AUTOATTACK,
    )
    written, place = command.evaluated(flags, threats=stage.threats)
    if jax.process_index() == 0:
        terminal.show(command.told(written, place))
    return {"evaluations": [record.evaluation for record in written]}


def _export(stage: Stage, workdir: Path, *, selected: bool) -> dict[str, Any]:
    """Export into a new folder, then move it into place atomically."""
    out = checks.place(workdir, stage)
    new = workdir / "export" / "unfinished" / stage.layout
    first = jax.process_index() == 0
    if first:
        shutil.rmtree(new.parent, ignore_errors=True)  # left by a killed process
    record = workdir / "evaluation" / "results.jsonl" if stage.id else None
    entry: dict[str, Any] = {"selected": selected, "record": record, "id": stage.id}
    settings = ExportSettings(stage.layout, new, workdir=workdir, **entry)

    def exported() -> dict[str, str]:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            written = export_torch.export(settings)
        if not first:
            return {}
        files = written["files"]
        _place(new, out, files)
        print(printed.getvalue().replace(str(new), str(out)), end="")
        return {f"export/{stage.layout}/{name}": sha256 for name, sha256 in files.items()}

    return {"files": hosts.together(exported)}


def _place(new: Path, out: Path, files: dict[str, str]) -> None:
    lasting = {
        name: sha256 for name, sha256 in files.items() if not name.endswith(".certificate.json")
    }
    if out.exists() and not _are(out, lasting):  # certificates contain a date
        raise ValueError(
            f"{out} contains something other than the export of these weights; move it away and "
            "repeat the command"
        )
    shutil.rmtree(out, ignore_errors=True)
    new.rename(out)
    new.parent.rmdir()
