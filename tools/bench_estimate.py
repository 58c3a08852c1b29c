"""The error of `jaxrobust estimate --on cpu` for training and AutoAttack.

python tools/bench_estimate.py [CONFIG ...] [--config.key=value ...] [--images 64] [--workdir DIR]

For each config, each command in a separate process and with nothing cached: the estimate, the
training, standard AutoAttack on the first images of the test split, and the estimate again. The two
estimates show how steady the machine was: a difference between them is noise, not error. AutoAttack
is estimated with the share of robust images that it found. Overrides apply to every config.

`--cpu` compares CPU seconds instead of wall time: on a shared machine, a command's share of the
cores changes while it runs, but its amount of work hardly does.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from jaxrobust.doctor.estimate import changes
from jaxrobust.doctor.estimate.attacked import seconds_of
from jaxrobust.evaluation.records import records
from jaxrobust.runtime.commandline.arguments import Arguments, answer

ENOUGH = 0.15  # the target for the error
# Runs a module with a clock that counts the CPU seconds of its process.
_CPU = """
import runpy, sys, time
time.perf_counter = time.process_time
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


def parse() -> argparse.Namespace:
    words, changed = changes.divided(sys.argv[1:])
    parser = Arguments(__doc__)
    parser.add_argument("configs", nargs="*", default=["quickstart"], help="Configs to train.")
    parser.flag("images", type=int, default=64, help="Number of images for AutoAttack; 0: skip it.")
    parser.flag("workdir", type=Path, help="Folder for the runs; default: a temporary one.")
    parser.flag("cpu", action="store_true", help="Compare CPU seconds.")
    parser.flag("json", action="store_true", help="Print one JSON object on the last line.")
    args = parser.parse_args(words)
    args.changes = changed
    return args


def command(module: str, *words: str, cache: Path, cpu: bool) -> tuple[str, float]:
    """Run a command; return its output and its seconds, by wall clock or CPU."""
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    clock = ("-c", _CPU) if cpu and module == "jaxrobust.doctor.estimate" else ("-m",)
    done = subprocess.run(
        [sys.executable, *clock, module, *words],
        env=os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        raise OSError(f"{module} {' '.join(words)} exited with {done.returncode}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    worked = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return done.stdout, worked if cpu else time.perf_counter() - start


def compared(
    config: str, changed: list[str], folder: Path, *, images: int, cpu: bool
) -> dict[str, Any]:
    def estimated() -> dict[str, Any]:
        words = (config, "--on", "cpu", "--images", str(images), "--json", *changed)
        out, _ = command("jaxrobust.doctor.estimate", *words, cache=folder / "unused", cpu=cpu)
        return json.loads(out.splitlines()[-1])

    estimates = [estimated()]
    run = str(folder / "run")
    trained = ("jaxrobust.main", "--config", config, "--workdir", run, *changed)
    _, seconds = command(*trained, cache=folder / "training", cpu=cpu)
    real = {"training": seconds}
    robust = 0.0
    if images:
        out = folder / "evaluation"
        words = ("--workdir", run, "--attack", "autoattack", "--n", str(images), "--out", str(out))
        _, real["autoattack"] = command(
            "jaxrobust.evaluate", *words, cache=folder / "attacking", cpu=cpu
        )
        robust = records.read(out)[-1].robust or 0.0
    estimates.append(estimated())
    comparison = {}
    for what, took in real.items():
        if what == "training":
            guesses = [e["training"]["seconds"] for e in estimates]
        else:
            attacks = (seconds_of(e["autoattack"], images=images, robust=robust) for e in estimates)
            guesses = [s + e["start_s"] for s, e in zip(attacks, estimates, strict=True)]
        mean = sum(guesses) / len(guesses)
        error, noise = mean / took - 1, abs(guesses[0] - guesses[1]) / mean
        comparison[what] = {"estimates_s": guesses, "real_s": took, "error": error, "noise": noise}
    return comparison | {"robust": robust}


def run(args: argparse.Namespace) -> dict[str, Any]:
    comparisons = {}
    unit = "CPU s" if args.cpu else "s"
    for config in args.configs:
        with tempfile.TemporaryDirectory() as temporary:
            folder = args.workdir / Path(config).stem if args.workdir else Path(temporary)
            comparisons[config] = rows = compared(
                config, args.changes, folder, images=args.images, cpu=args.cpu
            )
        for what, row in rows.items():
            if what == "robust":
                continue
            first, second = row["estimates_s"]
            far = "within" if abs(row["error"]) <= ENOUGH else "NOT within"
            print(
                f"{config}, {what}: estimated {first:.1f} {unit} before and {second:.1f} after, "
                f"took {row['real_s']:.1f}: {row['error']:+.0%}, {far} {ENOUGH:.0%} "
                f"(the estimates differ by {row['noise']:.0%})",
                flush=True,
            )
    return comparisons


if __name__ == "__main__":
    answer(run, parse(), "runs are left in --workdir")
