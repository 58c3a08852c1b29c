"""`python tools/bench_gpu.py [CONFIG ...]`: our training steps and PyTorch's on one GPU.

Both sides compute in bfloat16. Their logits for the same weights are compared before any speed. The
batch of each side is the largest that fits: estimated from a small one, halved until it fits. Then
both run in turns, at their own largest batch and at the largest that fits both; `--batch` sets one
for both instead, which saves minutes of compiling. Our step with cuDNN's attention and with other
XLA flags, and AutoAttack, follow. Each figure comes from a separate process (`tools/gpu`) with the
GPU's memory to itself.

`--resume FILE` stores each figure as a line of FILE, and compiled programs in FILE.caches: the same
command resumes where it stopped. `--minutes` starts nothing that would end later.
`--report FILE` prints the tables of a file, and needs no GPU.

Needs JAX with CUDA and the extra `parity` with a CUDA build of PyTorch.
"""

import argparse
import functools
import importlib.util
import json
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from jaxrobust.runtime.commandline.arguments import Arguments, config_name
from tools import guarded
from tools.gpu import figures, measuring, tables
from tools.gpu.figures import NoTime
from tools.gpu.measuring import Network

# Large networks first: if time runs out, the least important figures are missing.
CONFIGS = ("vit_b_cvst", "convnext_b_cvst", "convnext_t_cvst", "vit_s_cvst", "xcit_s12")
ATTACKED = "convnext_t_cvst"
STAGES = ("steps", "variants", "autoattack")
LARGEST = 2048

Job = tuple[str, Callable[[], None]]


def parse() -> argparse.Namespace:
    parser = Arguments(__doc__)
    parser.add_argument(
        "configs",
        nargs="*",
        default=CONFIGS,
        metavar="CONFIG",
        help=f"Configs whose steps run; default: {', '.join(CONFIGS)}.",
    )
    parser.flag("largest", type=int, help=f"Largest batch size to try; default: {LARGEST}.")
    parser.flag("batch", type=int, help="Batch size of both sides; default: the largest that fit.")
    parser.flag("image_size", type=int, help="Side of the images in pixels; default: the config's.")
    parser.flag("attack_steps", type=int, help="Number of attack steps; default: the config's.")
    parser.flag("rounds", type=int, default=2, help="Number of turns of each side.")
    parser.flag("steps", type=int, default=10, help="Number of timed steps per turn.")
    parser.flag("images", type=int, default=1000, help="Number of images of AutoAttack.")
    parser.flag("stages", default=",".join(STAGES), help="What to measure; default: %(default)s.")
    parser.flag("resume", type=Path, help="File of figures to continue from; created if missing.")
    parser.flag("minutes", type=float, help="Minutes after which everything ends; needs --resume.")
    parser.flag("report", type=Path, help="Print the tables of this file, and measure nothing.")
    parser.flag("profile", type=Path, help="Folder for an XProf trace of each network.")
    parser.flag("json", action="store_true", help="Print one JSON object on the last line.")
    return parser.parse_args()


def check(args: argparse.Namespace) -> None:
    """Refuse early what would fail, or take days, later."""
    for key in ("largest", "batch", "rounds", "steps", "images"):
        value = getattr(args, key)
        if value is not None and value < 1:
            raise ValueError(f"--{key}={value} must be at least 1")
    if args.minutes is not None:
        if not args.minutes > 0:
            raise ValueError(f"--minutes={args.minutes:g} must be more than 0, such as 9")
        if args.resume is None:
            raise ValueError("--minutes needs --resume FILE, from which the next command continues")
    if unknown := set(args.stages.split(",")) - {*STAGES}:
        known = ", ".join(STAGES)
        raise ValueError(f"--stages={args.stages}: no {sorted(unknown)[0]!r}; choose from {known}")
    for config in args.configs:
        config_name(config)  # stops if there is no such config
    for name in ("torch", "timm"):
        if importlib.util.find_spec(name) is None:
            raise ImportError(f"needs {name}", name=name)
    if args.largest is None:
        import torch

        if not torch.cuda.is_available():
            raise ValueError(
                "PyTorch sees no GPU; install its CUDA build where there is one, or try the "
                "command on CPU with --largest 4 --image-size 32 --images 4"
            )
    args.largest = args.largest or LARGEST


def jobs(args: argparse.Namespace, networks: list[Network]) -> Iterator[Job]:
    """List the measurements, the most important first."""
    stages = args.stages.split(",")
    for network in networks:
        if "steps" in stages:
            given = (args.largest, args.rounds, args.batch)
            run = functools.partial(measuring.steps, network, *given)
            yield network.name, run
        if args.profile:
            run = functools.partial(measuring.profiled, network, args.profile)
            yield network.name, run
    for network in networks if "variants" in stages else ():
        for variant in measuring.VARIANTS:
            if variant.of in network.name:
                run = functools.partial(measuring.varied, network, variant)
                yield network.name, run
    if "autoattack" in stages:
        network = next((n for n in networks if n.name == ATTACKED), networks[0])
        for attack in measuring.ATTACKS:
            run = functools.partial(measuring.attacked, network, args.images, attack)
            yield network.name, run


def work(todo: Iterator[Job]) -> tuple[list[str], list[str]]:
    """Measure; return what is left for lack of time, and what failed."""
    left, failed = [], []
    for label, run in todo:
        try:
            run()
        except NoTime as reason:
            left.append(f"{label}: {reason}")
        except (RuntimeError, ValueError) as error:  # the others may still run
            failed.append(label)
            print(f"bench_gpu: {label}: {error}", file=sys.stderr, flush=True)
    return left, failed


def main() -> None:
    args = parse()
    if args.report:
        if not args.report.is_file():
            raise ValueError(f"--report={args.report} is not a file; pass one that --resume wrote")
        return print(tables.report(*figures.read(args.report)))
    check(args)
    given = {"image-size": args.image_size, "attack-steps": args.attack_steps}
    options = tuple(f"--{key}={value}" for key, value in given.items() if value is not None)
    with tempfile.TemporaryDirectory() as folder:
        path = args.resume or Path(folder) / "gpu.jsonl"
        kept = figures.Figures(path, figures.machine(), args.minutes)
        variables = measuring.environment(path.with_name(f"{path.name}.caches"))
        networks = [Network(c, options, variables, kept, args.steps) for c in args.configs]
        left, failed = work(jobs(args, networks))
        print(tables.report(*figures.read(path)))
    if left:
        print("\nThere was no time for:", *left, sep="\n  ")
        print(f"Continue with:\n  {shlex.join(['python', 'tools/bench_gpu.py', *sys.argv[1:]])}")
    if args.json:
        print(json.dumps([sums for network in networks if (sums := network.summary())]))
    if failed:
        print(f"bench_gpu: failed, see above: {', '.join(dict.fromkeys(failed))}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    guarded("bench_gpu", main)
