"""Makes the runs of a study, attacks each with AutoAttack, and compares with the paper.

python tools/study.py [--study cifar_study] --out runs/study [--seed 0] [--minutes 60]
                      [--data_dir FOLDER]

A study is a file of configs/ whose arguments are a run from `RUNS` and a seed from `SEEDS`. `PAPER`
has the paper's findings, `IMAGES` the number of attacked images, `ATTACK` the flags for
`jaxrobust.evaluate`, `THREATS` the norms, `METHOD` the method's name in records, and `ASKED` its
name in the table. `AGAINST` names the runs that a run is compared with, the first of them in the
table of accuracies; the default is the first run. `STARTS` names the run whose weights another run
starts from. `UNION` adds a column for images that withstand all of `THREATS`.

Run the same command again to continue; after --minutes, no run or attack starts any more. Two such
commands with different seeds may run at the same time. Needs CIFAR-10: `jaxrobust prepare cifar10`.
The last lines are two tables of the finished runs: accuracies, and differences of pairs image by
image (OUT/pairs.jsonl has the counts).

Exit codes: 0 all is done, 1 something is left, 2 a mistake.
"""

import importlib
import itertools
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from jaxrobust.evaluation.records import comparisons, records, verdicts
from jaxrobust.evaluation.records.record import AccuracyRecord
from jaxrobust.runtime.commandline.arguments import Arguments, stop
from jaxrobust.runtime.files import jsonl

STUDIES = (
    "cifar_study",
    "augmentation_study",
    "stem_study",
    "residual_study",
    "aligned_study",
    "norms_study",
    "objectives_study",
    "extra_data_study",
)
_SEEDS = range(5)
UNION = "union"  # the column, and the method's name in its record


def main() -> None:
    parser = Arguments(__doc__)
    parser.flag("study", choices=STUDIES, default=STUDIES[0], help="Config whose runs to make.")
    parser.flag("out", type=Path, default=Path("runs/study"), help="Folder of the runs.")
    parser.flag("seed", type=int, choices=_SEEDS, help="Only the runs of this seed; default: all.")
    parser.flag("minutes", type=float, default=math.inf, help="Minutes after which nothing starts.")
    parser.flag("data_dir", help="Folder of data sets; default: $TFDS_DATA_DIR.")
    args = parser.parse_args()
    if args.minutes <= 0:
        stop(f"--minutes {args.minutes:g} must be above 0", 2)
    end = time.monotonic() + 60 * args.minutes
    module = study(args.study)
    if args.seed not in (None, *module.SEEDS):
        stop(f"--seed {args.seed}: {args.study} has the seeds {[*module.SEEDS]}", 2)
    left = 0
    seeds = module.SEEDS if args.seed is None else (args.seed,)
    for seed, name in itertools.product(seeds, module.RUNS):
        left += not _made(args, name, seed, end)
    write_pairs(args.out, module)
    print(table(args.out, module), paired_table(args.out, module), sep="\n\n")
    sys.exit(int(left > 0))


def study(name: str) -> Any:
    return importlib.import_module(f"configs.{name}")


def _made(args: Any, name: str, seed: int, end: float) -> bool:
    workdir = args.out / f"{name}-{seed}"
    data = [f"--config.data.dir={args.data_dir}"] if args.data_dir else []
    config = f"{ROOT / 'configs' / args.study}.py:{name},seed={seed}"
    train = ["jaxrobust.main", f"--config={config}", f"--workdir={workdir}", *data]
    module = study(args.study)
    if start := getattr(module, "STARTS", {}).get(name):
        train.append(f"--config.init.weights={args.out / f'{start}-{seed}'}")
    attack = ["jaxrobust.evaluate", f"--workdir={workdir}", f"--n={module.IMAGES}"]
    attack += [*(f"--threat={threat}" for threat in _threats(module)), *module.ATTACK]
    done = trained(workdir), None not in attacked(workdir, module)
    for finished, command in zip(done, (train, attack), strict=True):
        if finished:
            continue
        if time.monotonic() > end:
            return False
        print(" ".join(command), file=sys.stderr, flush=True)
        code = subprocess.run([sys.executable, "-m", *command], cwd=ROOT).returncode
        if code:
            stop(
                f"{name}, seed {seed}: exit code {code}; see above, the same command continues",
                code,
            )
    return True


def trained(workdir: Path) -> bool:
    """Tell whether a run has tested its last phase."""
    return any(str(row.weights).startswith("train,") for row in records.read(workdir))


def _threats(module: Any) -> tuple[str, ...]:
    return getattr(module, "THREATS", ())


def _columns(module: Any) -> tuple[str, ...]:
    """Name the columns of a run's records: threats, their union, or the one attack."""
    union = (UNION,) if getattr(module, "UNION", False) else ()
    return (*_threats(module), *union) or ("robust",)


def attacked(workdir: Path, module: Any) -> list[AccuracyRecord | None]:
    """Return the records of the study's attacks on a run, one for each column; None: not yet."""
    found = records.read(workdir / "evaluation")
    rows = [r for r in found if r.method == module.METHOD]
    if not _threats(module):
        return [rows[0] if rows else None]
    by_column = {r.attacks[0]["norm"]: r for r in rows if r.attacks}
    by_column.update((UNION, r) for r in found if r.method == UNION)
    return [by_column.get(column.split(":")[0]) for column in _columns(module)]


def table(out: Path, module: Any) -> str:
    """Return clean and robust accuracy of each run, their means, and the paper's finding."""
    names = _columns(module)
    count = len(module.SEEDS)
    own = {1: ", seed 0", 2: ", seeds 0 and 1"}.get(count, f", {count} seeds")
    heads = ["run", f"clean{own}", *(f"{name}{own}" for name in names), "the paper"]
    if count == 2:
        heads.insert(-1, "mean" if len(names) == 1 else f"mean of the {names[-1]}")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    means: dict[str, list[float | None]] = {}  # None: not all seeds are done
    for run in module.RUNS:
        made = [attacked(out / f"{run}-{seed}", module) for seed in module.SEEDS]
        clean = [getattr(each[0], "clean", None) for each in made]
        robust = [[getattr(r, "robust", None) for r in of] for of in zip(*made, strict=True)]
        means[run] = [_mean(values) for values in robust]
        row = [run, *map(_cell, (clean, *robust)), module.PAPER.get(run, "")]
        if count == 2:
            other = next((means[name][-1] for name in against(module, run)), None)
            row.insert(-1, _beside(means[run][-1], other))
        lines.append(f"| {' | '.join(row)} |")
    half = 196 * math.sqrt(0.25 * 0.75 / module.IMAGES)
    lines.append(
        f"\nAccuracy in % on {module.IMAGES:,} test images of CIFAR-10: {module.ASKED}; one "
        f"network's 95% interval is about {half:.1f} either way at 25%. "
        f"Records: {out}/*/evaluation/results.jsonl"
    )
    return "\n".join(lines)


def against(module: Any, run: str) -> tuple[str, ...]:
    """Name the runs that a run is compared with."""
    names = getattr(module, "AGAINST", {}).get(run, module.RUNS[:1])
    return tuple(name for name in names if name != run)


def _mean(values: Sequence[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if len(there) == len(values) else None


def _cell(values: list[float | None]) -> str:
    """Format one or two values as they are, more as mean and range."""
    there = [value for value in values if value is not None]
    if len(values) <= 2:
        return ", ".join(map(_percent, values))
    if len(there) < len(values):
        return _percent(None)
    return f"{_percent(_mean(there))} ({_percent(min(there))} to {_percent(max(there))})"


def _beside(mean: float | None, other: float | None) -> str:
    if mean is None or other is None:
        return _percent(mean)
    return f"{_percent(mean)} ({100 * (mean - other):+.1f})"


def _percent(value: float | None) -> str:
    return "not yet measured" if value is None else f"{100 * value:.1f}"


def write_pairs(out: Path, module: Any) -> None:
    """Write the image-by-image counts of pairs of runs: a line for each seed and norm."""
    lines = []
    compared_runs = [(run, other) for run in module.RUNS for other in against(module, run)]
    for (run, other), seed in itertools.product(compared_runs, module.SEEDS):
        folders = [out / f"{name}-{seed}" for name in (other, run)]
        both = [attacked(folder, module) for folder in folders]
        for threat, *two in zip(_columns(module), *both, strict=True):
            if None in two:
                continue
            first, second = verdicts.aligned(
                [
                    verdicts.read(folder / "evaluation" / str(record.verdicts))
                    for folder, record in zip(folders, two, strict=True)
                ]
            )
            compared = comparisons.compare(first.robust, second.robust)
            counts = {key: getattr(compared, key) for key in ("n", "gained", "lost")}
            about = {"run": run, "against": other, "seed": seed, "threat": threat}
            lines.append(json.dumps(about | counts) + "\n")
    jsonl.replace(out / "pairs.jsonl", "".join(lines))


def paired_table(out: Path, module: Any) -> str:
    """Tabulate the differences of pairs of runs: image by image, and from seed to seed."""
    rows = jsonl.read(out / "pairs.jsonl")
    lines = ["| run | against | norm | difference of each seed | their mean | McNemar's p |"]
    lines += ["|---|---|---|---|---|---|"]
    keys = dict.fromkeys((r["run"], r["against"], r["threat"]) for r in rows)
    for key in keys:
        own = [r for r in rows if (r["run"], r["against"], r["threat"]) == key]
        apart = [100 * (r["gained"] - r["lost"]) / r["n"] for r in own]
        p = comparisons.mcnemar(*(np.array([r[key] for r in own]) for key in ("gained", "lost")))
        cells = [*key, ", ".join(f"{value:+.1f}" for value in apart), interval(apart)]
        cells.append(", ".join("< 0.001" if value < 0.001 else f"{value:.2g}" for value in p))
        lines.append(f"| {' | '.join(cells)} |")
    lines.append(
        "\nDifferences are in points of accuracy under attack. The interval is a Student's t "
        "interval over the seeds; p is from McNemar's test on the two networks of one seed."
    )
    return "\n".join(lines)


def interval(values: list[float]) -> str:
    """Return the mean of a few values and its 95% interval, by Student's t."""
    from scipy.stats import t  # JAX depends on SciPy, whose import takes a second

    mean = sum(values) / len(values)
    if len(values) < 3:
        return f"{mean:+.1f}"
    deviation = statistics.stdev(values)
    half = float(t.ppf(0.975, len(values) - 1)) * deviation / math.sqrt(len(values))
    return f"{mean:+.1f} ({mean - half:+.1f} to {mean + half:+.1f})"


if __name__ == "__main__":
    main()
