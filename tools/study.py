"""The runs of a study's config, each with AutoAttack, and what they say beside the paper.

python tools/study.py [--study cifar_study] --out runs/study [--seed 0] [--minutes 60]
                      [--data_dir FOLDER]

A study is a file of configs/ whose arguments are a run of its `RUNS` and a seed; `PAPER` says what
the paper finds of them, `IMAGES` how many images are attacked, `ATTACK` with which flags of
`jaxrobust.evaluate`, `METHOD` what the record calls that, and `ASKED` what the table does.

The same command goes on with what is not done; after --minutes no run or attack is begun any more.
Two such commands, one a seed, may run beside each other.
Without CIFAR-10: `jaxrobust prepare cifar10`. The last lines are the table of what is done by then.

Exit codes: 0 all is done, 1 something is left, 2 a mistake.
"""

import importlib
import itertools
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from jaxrobust.evaluation.records import records
from jaxrobust.evaluation.records.record import AccuracyRecord
from jaxrobust.runtime.commandline.arguments import Arguments, stop

SEEDS = (0, 1)
STUDIES = ("cifar_study", "residual_study", "aligned_study")


def main() -> None:
    parser = Arguments(__doc__)
    parser.flag("study", choices=STUDIES, default=STUDIES[0], help="Config whose runs are made.")
    parser.flag("out", type=Path, default=Path("runs/study"), help="Folder of the runs.")
    parser.flag("seed", type=int, choices=SEEDS, help="Only the runs of this seed; default: all.")
    parser.flag("minutes", type=float, default=math.inf, help="Time to begin work in.")
    parser.flag("data_dir", help="Folder of data sets; default: $TFDS_DATA_DIR.")
    args = parser.parse_args()
    if args.minutes <= 0:
        stop(f"--minutes {args.minutes:g} must be above 0", 2)
    end = time.monotonic() + 60 * args.minutes
    module = study(args.study)
    left = 0
    seeds = SEEDS if args.seed is None else (args.seed,)
    for seed, name in itertools.product(seeds, module.RUNS):
        left += not _made(args, name, seed, end)
    print(table(args.out, module))
    sys.exit(int(left > 0))


def study(name: str) -> Any:
    return importlib.import_module(f"configs.{name}")


def _made(args: Any, name: str, seed: int, end: float) -> bool:
    workdir = args.out / f"{name}-{seed}"
    data = [f"--config.data.dir={args.data_dir}"] if args.data_dir else []
    config = f"{ROOT / 'configs' / args.study}.py:{name},seed={seed}"
    train = ["jaxrobust.main", f"--config={config}", f"--workdir={workdir}", *data]
    module = study(args.study)
    attack = ["jaxrobust.evaluate", f"--workdir={workdir}", f"--n={module.IMAGES}", *module.ATTACK]
    for done, command in ((trained(workdir), train), (attacked(workdir, module), attack)):
        if done:
            continue
        if time.monotonic() > end:
            return False
        print(" ".join(command), file=sys.stderr, flush=True)
        code = subprocess.run([sys.executable, "-m", *command], cwd=ROOT).returncode
        if code:
            stop(
                f"{name}, seed {seed}: exit code {code}; see above, the same command goes on", code
            )
    return True


def trained(workdir: Path) -> bool:
    """Tell whether a run has tested its last phase."""
    return any(str(row.weights).startswith("train,") for row in records.read(workdir))


def attacked(workdir: Path, module: Any) -> AccuracyRecord | None:
    """Return the record of the study's attack on a run."""
    rows = records.read(workdir / "evaluation")
    return next((r for r in rows if r.method == module.METHOD), None)


def table(out: Path, module: Any) -> str:
    """Return clean and robust accuracy of each run, their mean, and the paper's finding."""
    lines = ["| run | clean, seeds 0 and 1 | robust, seeds 0 and 1 | mean | the paper |"]
    lines += ["|---|---|---|---|---|"]
    means: dict[str, Any] = {}  # None: not all seeds are done
    for name in module.RUNS:
        made = [attacked(out / f"{name}-{seed}", module) for seed in SEEDS]
        cells = [[_percent(getattr(r, key, None)) for r in made] for key in ("clean", "robust")]
        robust = [r.robust for r in made if r and r.robust is not None]
        means[name] = sum(robust) / len(robust) if len(robust) == len(SEEDS) else None
        mean = _percent(means[name])
        base = module.RUNS[0]
        if name != base and None not in (means[name], means[base]):
            mean += f" ({100 * (means[name] - means[base]):+.1f})"
        row = (name, ", ".join(cells[0]), ", ".join(cells[1]), mean, module.PAPER.get(name, ""))
        lines.append(f"| {' | '.join(row)} |")
    half = 196 * math.sqrt(0.25 * 0.75 / module.IMAGES)
    lines.append(
        f"\nIn % of {module.IMAGES:,} test images of CIFAR-10: {module.ASKED}; one network's 95 % "
        f"interval is about {half:.1f} either way at 25 %. "
        f"Records: {out}/*/evaluation/results.jsonl"
    )
    return "\n".join(lines)


def _percent(value: float | None) -> str:
    return "not yet measured" if value is None else f"{100 * value:.1f}"


if __name__ == "__main__":
    main()
