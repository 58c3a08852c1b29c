"""`python tools/bench_gpu.py [CONFIG ...]`: our training steps beside PyTorch's on one GPU.

Both sides compute in bfloat16. The batch of each is the largest that fits: from `--largest` down,
halved while memory does not suffice. Then both run in turns, at their own largest batch and at the
largest that fits both, each run `tools/bench_step.py` in a separate process, which has the GPU's
memory for itself.

Needs JAX with CUDA and the extra `parity` with a CUDA build of PyTorch.
"""

import argparse
import functools
import importlib.util
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from jaxrobust.runtime.commandline.arguments import Arguments, config_name
from jaxrobust.runtime.devices import hlo
from tools import bench_step, guarded

CONFIGS = ("convnext_t_cvst", "convnext_b_cvst", "vit_s_cvst", "vit_b_cvst", "xcit_s12")
SIDES = {"jaxrobust": "step", "PyTorch": "torch"}  # name -> program of bench_step
LARGEST = 2048
TRACED_STEPS = 3


def parse() -> argparse.Namespace:
    parser = Arguments(__doc__)
    parser.add_argument(
        "configs",
        nargs="*",
        default=CONFIGS,
        metavar="CONFIG",
        help=f"Configs whose steps run; default: {', '.join(CONFIGS)}.",
    )
    parser.flag("largest", type=int, help=f"Batch size to begin with; default: {LARGEST}.")
    parser.flag("image_size", type=int, help="Side of the images in pixels; default: the config's.")
    parser.flag("attack_steps", type=int, help="Number of attack steps; default: the config's.")
    parser.flag("rounds", type=int, default=2, help="Number of turns of each side.")
    parser.flag("steps", type=int, default=10, help="Number of steps that count in a turn.")
    parser.flag("profile", type=Path, help="Folder for an XProf trace of each network.")
    parser.flag("json", action="store_true", help="Print one JSON object on the last line.")
    return parser.parse_args()


def check(args: argparse.Namespace) -> None:
    """Refuse what would fail, or take days, only later."""
    for key in ("largest", "rounds", "steps"):
        value = getattr(args, key)
        if value is not None and value < 1:
            raise ValueError(f"--{key}={value} must be at least 1")
    for config in args.configs:
        config_name(config)  # stops where there is no such one
    for name in ("torch", "timm"):
        if importlib.util.find_spec(name) is None:
            raise ImportError(f"needs {name}", name=name)
    if args.largest is None:
        import torch

        if not torch.cuda.is_available():
            raise ValueError(
                "PyTorch sees no GPU; install its CUDA build where there is one, or try the "
                "command on CPU with --largest 4 --image-size 32"
            )
    args.largest = args.largest or LARGEST


def environment(caches: Path) -> dict[str, str]:
    """Of the processes that measure: one GPU, nearly all of its memory, caches for this run alone.

    What the first process of a batch compiles the later ones read, so its compile seconds are those
    of empty caches.
    """
    defaults = {"CUDA_VISIBLE_DEVICES": "0", "XLA_PYTHON_CLIENT_MEM_FRACTION": ".95"}
    fixed = {
        "JAX_COMPILATION_CACHE_DIR": str(caches / "jax"),
        "TORCHINDUCTOR_CACHE_DIR": str(caches / "torch"),
    }
    return defaults | os.environ | fixed


class Network(NamedTuple):
    """What is measured, and how long."""

    config: str
    options: tuple[str, ...]  # of bench_step
    environment: dict[str, str]


def attempt(network: Network, side: str, batch: int, *more: str) -> dict[str, Any] | None:
    """Measure one side in a process; None: it does not fit into memory."""
    command = [sys.executable, str(ROOT / "tools/bench_step.py"), network.config, "--json"]
    command += ["--against=torch", "--program", SIDES[side], "--dtype=bfloat16", "--rounds=1"]
    command += [f"--batch={batch}", *network.options, *more]
    done = subprocess.run(command, env=network.environment, capture_output=True, text=True)
    # The driver's own failures to allocate may end the process before Python hears of them.
    killed = done.returncode < 0 and bench_step.out_of_memory(RuntimeError(done.stderr))
    if done.returncode == bench_step.OUT_OF_MEMORY or killed:
        say(network, side, batch, "out of memory")
        return None
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        if done.returncode == 2:
            raise ValueError(last.removeprefix("bench_step: "))
        where = f"{config_name(network.config)}, {side}, batch {batch}"
        raise RuntimeError(f"{where}: exit code {done.returncode}\n{done.stderr[-4000:]}")
    figures = json.loads(done.stdout.splitlines()[-1])
    of_program = ("images_per_s", "compile_s", "mfu", "peak_memory")
    result = {key: figures[key].get(SIDES[side]) for key in of_program}
    result |= {"batch": batch, "device": figures["device"]}
    say(network, side, batch, f"{result['images_per_s']:.1f} images/s")
    return result


def say(network: Network, side: str, batch: int, what: str) -> None:
    print(
        f"{config_name(network.config)}, {side}, batch {batch}: {what}", file=sys.stderr, flush=True
    )


Attempt = Callable[[str, int], dict[str, Any] | None]  # (side, batch)


def largest_fitting(run: Attempt, side: str, start: int) -> dict[str, Any]:
    """Return the figures of the first batch of start, start / 2, ... that fits."""
    for halvings in range(start.bit_length()):
        if result := run(side, start >> halvings):
            return result
    raise ValueError(f"{side}: not even one image fits; take a smaller network or --image-size")


def compare(run: Attempt, *, start: int, rounds: int) -> dict[str, Any]:
    """Run each side at the largest batch that fits it, and at the largest that fits both."""
    first = {side: largest_fitting(run, side, start) for side in SIDES}
    kinds = {side: report["device"] for side, report in first.items()}
    if len(set(kinds.values())) > 1:
        both = ", ".join(f"{side} on {kind}" for side, kind in kinds.items())
        raise ValueError(f"{both}: no comparison; install the CUDA builds of JAX and PyTorch")
    own = {side: report["batch"] for side, report in first.items()}
    common = min(own.values())
    turns = [(side, batch) for batch in sorted({common, *own.values()}) for side in SIDES]
    turns = [(side, batch) for side, batch in turns if batch in (common, own[side])]
    runs_of: dict[tuple[str, int], list[dict[str, Any]]] = {turn: [] for turn in turns}
    for _ in range(rounds):
        for side, batch in turns:
            again = run(side, batch)
            if again is None:
                raise RuntimeError(f"{side}: batch {batch} fitted before; is the GPU shared?")
            runs_of[side, batch].append(again)
    rows = []
    for (side, batch), runs in runs_of.items():
        compiled = [r["compile_s"] for r in runs]
        if batch == own[side]:
            compiled.append(first[side]["compile_s"])
        rows.append(
            {
                "side": side,
                "batch": batch,
                "images_per_s": statistics.median(r["images_per_s"] for r in runs),
                "rounds": [r["images_per_s"] for r in runs],
                "mfu": statistics.median(r["mfu"] for r in runs) if runs[0]["mfu"] else None,
                "peak_memory": max((r["peak_memory"] or 0) for r in runs) or None,
                "compile_s": max(compiled),  # the others found it in the cache
            }
        )
    speed = {(r["side"], r["batch"]): r["images_per_s"] for r in rows}
    ours, theirs = SIDES
    return {
        "device": kinds[ours],
        "rows": rows,
        "ratio_largest": speed[ours, own[ours]] / speed[theirs, own[theirs]],
        "ratio_same_batch": speed[ours, common] / speed[theirs, common],
    }


# --- Where the time goes ---

CALLS = ("while", "conditional", "call", "async-start", "async-done")  # their bodies have events
Events = Iterable[tuple[str, str, float]]  # (plane, operation, seconds)


def events(folder: Path) -> list[tuple[str, str, float]]:
    """List the operations of a folder's latest trace, on a GPU each kernel."""
    import jax

    operations = []
    latest = max(folder.rglob("*.xplane.pb"), key=lambda file: file.stat().st_mtime)
    for plane in jax.profiler.ProfileData.from_file(str(latest)).planes:
        device = (plane.name or "").startswith("/device:")
        for line in plane.lines:
            if device and not (line.name or "").startswith("Stream"):
                continue  # sums of what the streams hold
            for event in line.events:
                name = dict(event.stats).get("hlo_op") or (event.name if device else None)
                if name:
                    operations.append((plane.name or "", str(name), event.duration_ns / 1e9))
    return operations


def shares(timed: Events, module: hlo.Module) -> tuple[dict[str, float], list[tuple[str, float]]]:
    """(share of each kind of operation, [(operation, share)]), of the GPU if there is one."""
    timed = list(timed)
    timed = [row for row in timed if row[0].startswith("/device:")] or timed
    by_name = {i.name: i for i in hlo.instructions(module.computations)}
    kinds: defaultdict[str, float] = defaultdict(float)
    operations: defaultdict[str, float] = defaultdict(float)
    for _, name, seconds in timed:
        instruction = by_name.get(name)
        if instruction and instruction.opcode in CALLS:
            continue
        what = kind(instruction, module) if instruction else "other"
        kinds[what] += seconds
        source = re.search(r'op_name="([^"]*)"', instruction.attributes) if instruction else None
        operations[f"{name} ({what}) {source[1] if source else ''}".strip()] += seconds
    total = sum(kinds.values())
    by_kind, by_operation = (
        sorted(((key, s / total) for key, s in part.items()), key=lambda row: -row[1])
        for part in (kinds, operations)
    )
    return dict(by_kind), by_operation


def kind(instruction: hlo.Instruction, module: hlo.Module) -> str:
    """Name the main kind of an operation, or of the fusion that it stands for."""
    inside = [instruction]
    for computation in hlo.called(instruction):
        inside += module.computations.get(computation, {}).values()
    text = [f"{i.opcode} {i.attributes}" for i in inside]
    convolutions = [t for t in text if t.startswith("convolution ") or "__cudnn$conv" in t]
    if any("_group_count=" in t for t in convolutions):  # printed where it is not 1
        return "depthwise convolution"
    if convolutions:
        return "convolution"
    if any(t.startswith("dot ") or "__cublas" in t for t in text):
        return "matrix product"
    return "other"


def profile(network: Network, batch: int, folder: Path) -> dict[str, Any]:
    """Trace our step, and return and print where its time goes."""
    folder = folder / config_name(network.config)
    flags = network.environment.get("XLA_FLAGS", "")
    # A replayed graph's kernels would not say which operation they belong to.
    flags = f"{flags} --xla_gpu_enable_command_buffer=".strip()
    options = tuple(word for word in network.options if not word.startswith("--steps="))
    eager = Network(network.config, options, network.environment | {"XLA_FLAGS": flags})
    more = (f"--trace={folder.absolute()}", f"--steps={TRACED_STEPS}")
    if attempt(eager, next(iter(SIDES)), batch, *more) is None:
        raise RuntimeError(f"batch {batch} does not fit with --profile; is the GPU shared?")
    module = hlo.parse((folder / "module.hlo").read_text())
    kinds, operations = shares(events(folder), module)
    print(f"  {folder}: time of the step's operations (pip install xprof; xprof --logdir {folder})")
    print("    " + ", ".join(f"{what} {share:.1%}" for what, share in kinds.items()))
    for what, share in operations[:10]:
        print(f"    {share:6.1%}  {what[:90]}")
    return {"kinds": kinds, "costliest": dict(operations[:10])}


def show(result: dict[str, Any]) -> None:
    print(f"{' '.join([result['config'], *result['options']])}, bfloat16, {result['device']}")
    for row in result["rows"]:
        mfu = f"{row['mfu']:6.1%}" if row["mfu"] else "     -"
        used = f"{row['peak_memory'] / 1e9:6.1f} GB" if row["peak_memory"] else "        -"
        print(
            f"  {row['side']:10} batch {row['batch']:5}  {row['images_per_s']:9.1f} images/s"
            f"  MFU {mfu}  {used}  compiled in {row['compile_s']:6.1f} s"
        )
    print(
        f"  ratio at the largest batches {result['ratio_largest']:.2f}, "
        f"at the same batch {result['ratio_same_batch']:.2f}"
    )


def main() -> None:
    args = parse()
    check(args)
    given = {"image-size": args.image_size, "attack-steps": args.attack_steps}
    options = [f"--{key}={value}" for key, value in given.items() if value is not None]
    results = []
    with tempfile.TemporaryDirectory() as caches:
        variables = environment(Path(caches))
        for config in args.configs:
            network = Network(config, (f"--steps={args.steps}", *options), variables)
            run = functools.partial(attempt, network)
            comparison = compare(run, start=args.largest, rounds=args.rounds)
            result = {"config": config_name(config), "options": options, **comparison}
            show(result)
            if args.profile:
                ours = [r["batch"] for r in comparison["rows"] if r["side"] == next(iter(SIDES))]
                result["profile"] = profile(network, max(ours), args.profile)
            results.append(result)
    if args.json:
        print(json.dumps(results))


if __name__ == "__main__":
    try:
        guarded("bench_gpu", main)
    except RuntimeError as error:
        print(f"bench_gpu: {error}", file=sys.stderr)
        sys.exit(1)
