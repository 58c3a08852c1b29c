"""A plan as scripts: one after the other on a pod, or as Slurm arrays, one for each generation."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from jaxrobust.papers.planning.progress import OVER, PlannedStep

_HEAD = """#!/bin/bash
# Made by `{made_by}`.
# A run that was stopped goes on when this is started again; what is done takes a moment.
"""
_ARRAY = """#!/bin/bash
# Makes one line of the file that is given, a run with its evaluations, on one node.
#SBATCH --job-name=jaxrobust-plan
#SBATCH --ntasks=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@180
trap : TERM # a preemption asks this shell as well, which has to outlive the processes
srun bash -c "$(sed -n "${SLURM_ARRAY_TASK_ID}p" "$1")"
code=$?
if [[ $code == 75 || $code == 143 ]]; then # preempted: it continues
  scontrol requeue "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
fi
exit "$code"
"""


def write(steps: Sequence[PlannedStep], folder: Path, made_by: str) -> list[Path]:
    """Write the scripts of what is to be done; return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    left = [step for step in steps if step.state not in OVER]
    lines = [" && ".join(step.planned.commands()) for step in left]
    head = _HEAD.format(made_by=made_by)
    pod = folder / "runs.sh"
    pod.write_text(head + "".join(f"{line} || exit\n" for line in lines))
    (array := folder / "array.sbatch").write_text(_ARRAY)
    levels, submits, dependency = _levels(left), [], ""
    paths = [pod, array]
    for number, level in enumerate(levels, 1):
        path = folder / f"generation-{number}.txt"
        path.write_text("".join(" && ".join(step.planned.commands()) + "\n" for step in level))
        paths.append(path)
        submits.append(
            f"job=$(sbatch --parsable --array=1-{len(level)}{dependency} "
            f"{shlex.quote(str(array))} {shlex.quote(str(path))})\n"
        )
        dependency = " --dependency=afterok:$job"
    (submit := folder / "submit.sh").write_text(head + "set -e\n" + "".join(submits))
    for path in (pod, submit):
        path.chmod(0o755)
    return [*paths, submit]


def _levels(steps: Sequence[PlannedStep]) -> list[list[PlannedStep]]:
    """Part the runs by how many others come before: those of one list need none of each other."""
    depth: dict[str, int] = {}
    levels: list[list[PlannedStep]] = []
    for step in steps:
        at = max((depth[need] + 1 for need in step.planned.needs if need in depth), default=0)
        depth[step.planned.folder] = at
        levels += [[] for _ in range(at + 1 - len(levels))]
        levels[at].append(step)
    return levels
