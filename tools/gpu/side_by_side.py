"""`python tools/gpu/side_by_side.py CONFIG ...`: steps of both sides, in a few minutes.

All programs compile at once in separate processes, but ours one after another, because XLA tries
kernels out on the GPU. Then they take turns, each with the GPU to itself. Programs that are not
compiled by `--deadline` are left out. Two networks took 290 s on an H200 with 16 cores; one side of
one of them takes 254 s in `bench_gpu.py`. The price: both sides try kernels out while the GPU is
busy, and may choose worse ones than otherwise.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # configs/

from jaxrobust.runtime.commandline.arguments import Arguments, config_name
from tools import bench_step, guarded, timed
from tools.gpu.figures import SIDES

STEP = dict(zip(SIDES, ("step", "torch"), strict=True))  # programs of bench_step.py
MEMORY = "0.2"  # of the GPU's memory, for each of our processes


class Order(NamedTuple):
    """The order of compiling for the GPU: one of ours at a time, the first network first."""

    lock: Any
    first: Any  # set once the first network compiles
    is_first: bool


def parse() -> argparse.Namespace:
    parser = Arguments(__doc__)
    parser.add_argument("configs", nargs="+", metavar="CONFIG", help="Configs whose steps run.")
    parser.flag("batch", type=int, default=128, help="Batch size; default: %(default)s.")
    parser.flag("image_size", type=int, help="Side of the images in pixels; default: the config's.")
    parser.flag("deadline", type=float, default=270, help="Seconds until all must be compiled.")
    parser.flag("rounds", type=int, default=2, help="Number of turns of each program.")
    parser.flag("steps", type=int, default=10, help="Number of timed steps per turn.")
    parser.flag("out", type=Path, help="File to append each turn to, as a line of JSON.")
    args = parser.parse_args()
    for config in args.configs:
        config_name(config)  # stops if there is no such config
    args.against, args.dtype, args.program = "torch", "bfloat16", "step"
    args.microbatches = args.fsdp = args.attack_steps = None
    args.scan = False
    return args


def in_order(compile_: Callable[..., Any], order: Order) -> Callable[..., Any]:
    """Wrap JAX's compilation so that one process compiles at a time."""

    def run(*given: Any, **how: Any) -> Any:
        if not order.is_first:
            order.first.wait()
        with order.lock:
            order.first.set()
            return compile_(*given, **how)

    return run


def work(config: str, side: str, args: argparse.Namespace, order: Order, pipe: Connection) -> None:
    """Compile one program, report it, and run it on request."""
    os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] = MEMORY
    args.config = config
    bench_step.prepare(argparse.Namespace(against=None, attention=None), [STEP[side]])
    import jax

    loaded = bench_step.load(args)
    given = (loaded, *bench_step.data(loaded, args.batch))
    if side == SIDES[0]:
        jax.stages.Lowered.compile = in_order(jax.stages.Lowered.compile, order)  # type: ignore[method-assign]
        program = bench_step.ours(*given)
    else:
        program = bench_step.theirs(*given)
    program.run()
    pipe.send("compiled")
    while pipe.recv():
        program.run()
        seconds = [timed(program.run)[1] for _ in range(args.steps)]
        kind, _, used = bench_step.device_of(STEP[side])
        pipe.send(
            {
                **{"network": config_name(config), "side": side, "batch": args.batch},
                **{"device": kind, "peak_memory": used, "seconds": statistics.median(seconds)},
                "images_per_s": args.batch / statistics.median(seconds),
            }
        )


def started(
    args: argparse.Namespace, spawned: Any, lock: Any, first: Any
) -> dict[tuple[str, str], tuple[Any, Connection]]:
    """Start a process for each network and side."""
    processes = {}
    for config in args.configs:
        for side in SIDES:
            here, there = spawned.Pipe()
            order = Order(lock, first, config == args.configs[0])
            given = (config, side, args, order, there)
            process = spawned.Process(target=work, args=given, daemon=True)
            process.start()
            there.close()  # so that the pipe closes when the process ends
            processes[config, side] = process, here
    return processes


def compiled(processes: dict[tuple[str, str], tuple[Any, Connection]], deadline: float) -> None:
    """Wait until all are compiled or the deadline passes; end and drop the others."""
    ends = time.monotonic() + deadline
    for key, (process, pipe) in [*processes.items()]:
        try:
            if pipe.poll(max(ends - time.monotonic(), 0)) and pipe.recv():
                continue
            reason = f"was not compiled within {deadline:g} s"
        except EOFError:
            reason = "ended with an error, see above"
        print(f"side_by_side: {' of '.join(key[::-1])} {reason}", file=sys.stderr, flush=True)
        process.kill()
        del processes[key]


def main() -> None:
    args = parse()
    spawned = multiprocessing.get_context("spawn")
    lock, first = spawned.Lock(), spawned.Event()  # they live as long as these names
    processes = started(args, spawned, lock, first)
    compiled(processes, args.deadline)
    turns: dict[tuple[str, str], list[dict[str, Any]]] = {key: [] for key in processes}
    for _ in range(args.rounds):
        for key, (_, pipe) in processes.items():
            pipe.send(True)
            turns[key].append(pipe.recv())
            if args.out:
                with args.out.open("a") as lines:
                    lines.write(json.dumps(turns[key][-1]) + "\n")
    print("| step of | side | batch | images/s in each turn | memory, GB | device |")
    print("|---|---|---|---|---|---|")
    for rows in turns.values():
        speeds = ", ".join(f"{row['images_per_s']:.1f}" for row in rows)
        used = f"{rows[0]['peak_memory'] / 1e9:.1f}" if rows[0]["peak_memory"] else ""
        about = [rows[0][name] for name in ("network", "side", "batch")]
        print(f"| {' | '.join(map(str, [*about, speeds, used, rows[0]['device']]))} |")
    for process, _ in processes.values():
        process.kill()


if __name__ == "__main__":
    guarded("side_by_side", main)
