"""Exact resume: kills a short training with -9 at random moments until it ends, and compares.

python tools/bench_resume.py [--kills N] [--seed S] [--json]

Trains on the digits (both phases, two CPU devices) once without interruption, then repeatedly with
kills: uniformly over the wall time of a run, and every fourth during a checkpoint's save. After
each kill, the same command must resume from the last complete checkpoint. Every run that ends must
equal the uninterrupted one: bits of both phases' checkpoints, lines of metrics, evaluations and
results, and no leftovers of checkpoints. Otherwise it prints the difference and exits with 1.
"""

import itertools
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

from jaxrobust.runtime.commandline.arguments import Arguments
from jaxrobust.runtime.files import jsonl

ROOT = Path(__file__).resolve().parents[1]
PHASES = ("pretrain", "train")
# The quickstart with a network that compiles in a moment, in steps of 64 of 256 images.
CONFIG = """
from configs.quickstart import get_config as quickstart


def get_config():
    config = quickstart()
    config.model.options = {"stem_strides": (1,), "depths": (1,), "dims": (8,)}
    config.data.train_split = "train[:256]"
    config.data.selection_split = "train[256:320]"
    config.data.test_split = "test[:64]"
    config.data.augmentation = "crop"
    config.pretrain.update(epochs=3, warmup_epochs=1, ema_decay=0.9, lr=0.01)
    config.train.update(epochs=6, warmup_epochs=1, ema_decay=0.9, lr=0.01)
    config.attack.steps = 2
    config.evaluation.update(every_epochs=2, batch_size=32, steps=2)
    config.test.update(batch_size=32, steps=3)
    config.checkpoint.every_epochs = 1
    config.log.every_steps = 3
    return config
"""
# Entries of lines about time and machine.
_OF_TIME = ("images_per_second", "images_per_second_per_chip", "data_wait", "chip_hours", "time")


class Different(AssertionError):
    """A killed run differs from the uninterrupted one."""


def kills(folder: Path, count: int, *, seed: int = 0) -> dict[str, Any]:
    """Train in `folder` with this many kills; return the time and state of each."""
    draw = random.Random(seed)
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    environment |= {"JAX_NUM_CPU_DEVICES": "2", "JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"}
    environment |= {"JAXROBUST_ALLOCATOR": "system"}  # otherwise the command restarts itself
    environment |= {"JAX_COMPILATION_CACHE_DIR": str(folder / "cache")}

    config = folder / "config.py"
    config.write_text(CONFIG)

    def start(workdir: Path) -> subprocess.Popen:
        command = [sys.executable, "-m", "jaxrobust.main", f"--config={config}"]
        command += [f"--workdir={workdir}"]
        with (folder / "said.txt").open("w") as log:
            return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)

    def ended(process: subprocess.Popen, timeout: float | None = None) -> bool:
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            return False
        if code:
            raise Different(f"exit code {code}: {(folder / 'said.txt').read_text()[-2000:]}")
        return True

    ended(start(folder / "peace"))  # fills the cache
    begun = time.perf_counter()
    ended(start(folder / "again"))
    seconds = time.perf_counter() - begun
    expected = outcome(folder / "peace")
    same(expected, outcome(folder / "again"), "a second uninterrupted run")
    rows: list[dict[str, Any]] = []
    runs = 0
    while len(rows) < count:
        workdir, before = folder / f"killed-{runs}", None
        while True:
            process, aimed, done = start(workdir), len(rows) % 4 == 3, len(rows) >= count
            moment = None if done or aimed else draw.uniform(0, seconds)
            if aimed and not done:
                over = meets_saves(process, workdir, draw.randint(1, 6))
            else:
                over = ended(process, moment)
            if not over:
                process.kill()
                process.wait()
            log = (folder / "said.txt").read_text()
            _continues(before, log)
            if over:
                break
            before = whole(workdir)
            half = [str(p.relative_to(workdir)) for p in _temporary(workdir)]
            last = log.splitlines()[-1] if log.strip() else ""
            row = {"aimed": aimed, "after_seconds": moment, "half_written": half, "whole": before}
            rows.append(row | {"last_line": last})
        ended(process)
        same(expected, outcome(workdir), f"run {runs}, after {len(rows)} kills")
        runs += 1
    return {"seconds_in_peace": seconds, "runs": runs, "kills": rows}


def whole(workdir: Path) -> dict[str, int | None]:
    """Return the last complete checkpoint of each phase."""
    return {
        phase: max((int(p.name) for p in _steps(workdir / phase / "latest")), default=None)
        for phase in PHASES
    }


def outcome(workdir: Path, phases: Sequence[str] = PHASES) -> dict[str, Any]:
    """Read a finished run: arrays, lines without times, files of checkpoints."""
    kept: dict[str, Any] = {}
    for phase in phases:
        for kind in ("latest", "best"):
            steps = _steps(workdir / phase / kind)
            if len(steps) != 1:
                raise Different(f"{workdir / phase / kind} holds {[p.name for p in steps]}")
            arrays = _arrays(steps[0] / "arrays")
            kept |= {f"{phase}/{kind}/{steps[0].name}{name}": a for name, a in arrays.items()}
        kept[f"{phase}/selection.jsonl"] = jsonl.read(workdir / phase / "selection.jsonl")
    lines = jsonl.read(workdir / "metrics.jsonl")
    kept["metrics.jsonl"] = [{k: line[k] for k in line if k not in _OF_TIME} for line in lines]
    keys = ("weights", "weights_sha256", "clean", "robust", "attacks", "image_ids")
    records = jsonl.read(workdir / "results.jsonl")
    kept["results.jsonl"] = [{key: record[key] for key in keys} for record in records]
    if left := _temporary(workdir) + list(workdir.rglob("*.part")):
        raise Different(f"left over: {left}")
    return kept


def _arrays(path: Path) -> dict[str, np.ndarray]:
    with ocp.PyTreeCheckpointer() as checkpointer:
        tree = checkpointer.metadata(path).item_metadata.tree
        numpy = jax.tree.map(lambda leaf: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        arrays = checkpointer.restore(path, args=ocp.args.PyTreeRestore(restore_args=numpy))
    leaves = jax.tree.leaves_with_path(arrays)
    return {jax.tree_util.keystr(path): np.asarray(array) for path, array in leaves}


def _steps(folder: Path) -> list[Path]:
    return [path for path in folder.glob("*") if path.name.isdigit()]


def _temporary(workdir: Path) -> list[Path]:
    return sorted(workdir.glob("*/*/*orbax-checkpoint-tmp*"))


def meets_saves(process: subprocess.Popen, workdir: Path, number: int) -> bool:
    """Wait until the `number`-th checkpoint is being written; True: the run ended before."""
    seen = set(_temporary(workdir))  # from the previous kill; removed when the run starts
    while process.poll() is None:
        now = set(_temporary(workdir))
        number -= len(now - seen)
        if number <= 0:
            return False
        seen = now
        time.sleep(0.002)
    return True


def _continues(before: dict[str, int | None] | None, log: str) -> None:
    """Raise `Different` if a phase does not resume at the step of its complete checkpoint."""
    for phase, step in re.findall(r"^(\w+): step (\d+) of \d+, \w+$", log, re.MULTILINE):
        expected = (before or {}).get(phase) or 0
        if int(step) != expected:
            raise Different(f"{phase} continues at step {step}, but last saved step {expected}")


def same(expected: dict[str, Any], ended: dict[str, Any], which: str) -> None:
    """Raise `Different` with the first difference of two outcomes, if any."""
    if names := sorted(expected.keys() ^ ended.keys()):
        raise Different(f"{which}: only in one of the two: {names[:5]}")
    for name, value in expected.items():
        other = ended[name]
        if isinstance(value, np.ndarray):
            if value.dtype != other.dtype or value.tobytes() != other.tobytes():
                raise Different(f"{which}: {name} has different bits")
            continue
        for line in itertools.zip_longest(value, other):
            if line[0] != line[1]:
                raise Different(f"{which}: {name} says {line[1]}, uninterrupted {line[0]}")


def main(arguments: list[str] | None = None) -> int:
    """Print the kills; return 1 if a run differs."""
    parser = Arguments(__doc__)
    parser.flag("kills", type=int, default=20, help="Number of kills; default: %(default)s.")
    parser.flag("seed", type=int, default=0, help="Seed of the kills; default: %(default)s.")
    parser.flag("json", action="store_true", help="Print the figures as JSON on stdout.")
    given = parser.parse_args(arguments)
    if given.kills < 1:
        parser.error(f"--kills {given.kills} must be at least 1")
    logging.set_verbosity(logging.FATAL)  # Orbax warns about missing metadata that it does not need
    with tempfile.TemporaryDirectory() as folder:
        try:
            trial = kills(Path(folder), given.kills, seed=given.seed)
        except Different as error:
            print(f"bench_resume: {error}", file=sys.stderr)
            return 1
    if given.json:
        print(json.dumps(trial, indent=2))
        return 0
    for row in trial["kills"]:
        moment = "in a save" if row["aimed"] else f"{row['after_seconds']:.1f} s"
        whole_steps = ", ".join(f"{phase} {step}" for phase, step in row["whole"].items())
        print(f"{moment:>10}  whole: {whole_steps:28}  {row['last_line'][:60]}")
    print(
        f"{len(trial['kills'])} kills, {trial['runs']} runs of {trial['seconds_in_peace']:.1f} s: "
        "same weights, same lines, nothing left over"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
