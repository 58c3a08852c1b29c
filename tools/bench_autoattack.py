"""`python tools/bench_autoattack.py`: our AutoAttack and pyautoattack, side by side.

`--network golden`: standard AutoAttack on the small convolutional network of the golden values,
128 CIFAR-10 images; seconds, and whether the verdicts agree. `--network convnext_n`: seconds per
forward and backward pass on a wider network at radius 0, where no image is fooled. `--torch`: our
side runs PyTorch's module in JAX, like `evaluate --torch`. `--network my_nets.py:build`: your own.
Each program runs in a separate process, in turns: on one core with one thread (CPU seconds), then
on all cores (wall seconds). Compilation is reported separately.

`--topology v5e:4x4 --model convnext_t_cvst` compiles the engine's programs for absent TPUs instead:
what one step of all slots computes and moves, and that it sends nothing.
"""

import argparse
import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # imported when used, after workers have set the environment
    import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from jaxrobust.runtime.commandline.arguments import Arguments
from tools import guarded, timed
from tools.bench.attacked_networks import our_network, their_network

GOLDEN = ROOT / "tests/golden/attacks"
EPSILON = {"linf": 8 / 255, "l2": 0.5, "l1": 12.0}
THEIRS = {"linf": "Linf", "l2": "L2", "l1": "L1"}
NETWORK_STEPS = 20  # consecutive passes of the network alone
WIDE = {"steps": 50, "queries": 250}  # enough to time a pass of a wider network


def parse() -> argparse.Namespace:
    parser = Arguments(__doc__)
    parser.flag(
        "network",
        default="golden",
        help="Network to attack: golden (small and trained), convnext_n, or "
        "FILE.py:FUNCTION for a PyTorch network on CIFAR-10 images; default: %(default)s.",
    )
    parser.flag("torch", action="store_true", help="Run the PyTorch module in JAX on our side.")
    parser.flag("norms", help="Norms; default: linf,l2,l1, for --topology linf.")
    parser.flag("epsilon", help="Radii of these norms; default: 8/255,0.5,12 for linf,l2,l1.")
    parser.flag("images", type=int, default=128, help="Number of images; default: %(default)s.")
    parser.flag(
        "batch", type=int, help="Number of our slots; with --topology, per chip (default: 64)."
    )
    parser.flag(
        "cores",
        choices=["one", "all", "both"],
        default="both",
        help="Run the programs on one core, on all, or first on one and then on all; default: "
        "%(default)s.",
    )
    parser.flag(
        "seeds",
        type=int,
        default=1,
        help="Number of seeds for pyautoattack. The first one counts; for each further seed, the "
        "output says how many verdicts differ from those of the first; default: %(default)s.",
    )
    parser.flag("rounds", type=int, default=1, help="Number of turns, of which the fastest counts.")
    parser.flag("json", action="store_true", help="Print one JSON object on the last line.")
    parser.flag("topology", help="Compile for a slice such as v5e:4x4, without running.")
    parser.flag("traffic", action="store_true", help="With --topology, print where the time goes.")
    parser.flag("model", default="convnext_t_cvst", help="Network for --topology.")
    parser.flag(
        "image_size", type=int, default=224, help="Side of the images for --topology, in pixels."
    )
    parser.flag("dtype", default="float32", help="Compute type for --topology.")
    parser.flag("worker", choices=["ours", "theirs"], help=argparse.SUPPRESS)
    parser.flag("seed", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.traffic and not args.topology:
        parser.error("--traffic reads an executable; add a slice, such as --topology v5e:4x4")
    args.torch = args.torch or ":" in args.network
    args.norms = (args.norms or ("linf" if args.topology else "linf,l2,l1")).split(",")
    if unknown := set(args.norms) - set(EPSILON):
        parser.error(f"--norms {sorted(unknown)}: choose from {', '.join(EPSILON)}")
    if min(args.images, args.rounds, args.seeds, args.batch or 1) < 1 or args.images > 128:
        parser.error("--images must be 1 to 128, --rounds, --seeds and --batch at least 1")
    radii = args.epsilon.split(",") if args.epsilon else [EPSILON[norm] for norm in args.norms]
    if len(radii) != len(args.norms):
        parser.error(f"--epsilon={args.epsilon}: give {len(args.norms)}, one per norm")
    args.radii = dict(zip(args.norms, (float(Fraction(r)) for r in radii), strict=True))
    return args


def data(count: int) -> "tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]":
    """Return (images f32[n,32,32,3], labels i32[n], golden flags)."""
    import numpy as np

    golden = dict(np.load(GOLDEN / "aa_flags.npz"))
    return golden["images"][:count].astype(np.float32) / 255, golden["labels"][:count], golden


# --- In JAX ---


def our_worker(args: argparse.Namespace) -> None:
    """Run each norm twice; the second run compiles nothing."""
    import jax

    jax.config.update("jax_num_cpu_devices", len(os.sched_getaffinity(0)))
    import numpy as np

    from jaxrobust.evaluation import autoattack

    images, labels, _ = data(args.images)
    network = our_network(args.network, converted=args.torch)
    overrides = None
    if args.network == "convnext_n":
        labels = np.argmax(jax.jit(network)(images), axis=1)
        short = {"steps": WIDE["steps"]}
        overrides = dict.fromkeys(("apgd-t", "fab-t"), short | {"targets": 1})
        overrides |= {"apgd-ce": short, "square": {"steps": WIDE["queries"]}}
    for norm in args.norms:
        epsilon = 0.0 if args.network == "convnext_n" else args.radii[norm]
        how: dict[str, Any] = {"norm": norm, "epsilon": epsilon, "overrides": overrides}
        how |= {"batch_size": args.batch, "verbose": False}
        attack = functools.partial(autoattack, network, images, labels, **how)
        result, wall, cpu = timed(attack)
        compile_s = sum(c.compile_seconds for c in result.costs)
        if ":" in args.network:  # larger: once, minus the time of compiling
            wall, cpu = wall - compile_s, cpu - compile_s
        else:
            result, wall, cpu = timed(attack)
        passes = {k: sum(getattr(c, k) for c in result.costs) for k in ("forward", "backward")}
        report = {"norm": norm, "wall": wall, "cpu": cpu, "compile": compile_s} | passes
        report["idle"] = sum(c.idle for c in result.costs)
        report["network"] = network_seconds(network, images, labels, result, args.batch)
        report["robust"] = result.robust.tolist()
        print(json.dumps(report), flush=True)


def network_seconds(
    network: Any, images: "np.ndarray", labels: "np.ndarray", result: Any, batch: int | None
) -> float:
    """Measure the time of a run's passes alone, including idle slots, on one device."""
    import jax
    import jax.numpy as jnp

    from jaxrobust.models.kernels import winograd
    from jaxrobust.models.kernels.cpu.rewriting import before_a_loop, fast_formulas

    devices = len(jax.local_devices())
    width = max((batch or 8 * devices) // devices, 1)
    x, y = jnp.asarray(images[:width]), jnp.asarray(labels[:width])

    def forward(logits_of, x):
        return jnp.sum(logits_of(x), axis=1)

    def both(logits_of, x):
        def loss(x):
            logits = logits_of(x)
            picked = jnp.take_along_axis(logits, y[: len(x), None], axis=1)[:, 0]
            return jnp.sum(jax.nn.logsumexp(logits, axis=1) - picked)

        return jax.grad(loss)(x)

    def seconds_of(function: Callable[..., Any]) -> float:
        def loop(network, x):
            make, body_of = before_a_loop(fast_formulas(network, tiles=winograd.convolve), x)
            logits_of = functools.partial(body_of, make())

            def body(i, x):
                value = function(logits_of, x)
                return x + 1e-9 * value.reshape(value.shape + (1,) * (x.ndim - value.ndim))

            return jax.lax.fori_loop(0, NETWORK_STEPS, body, x)

        program = jax.jit(loop)
        jax.block_until_ready(program(network, x))
        runs = (timed(lambda: jax.block_until_ready(program(network, x))) for _ in range(5))
        return min(wall for _, wall, _ in runs) / NETWORK_STEPS / len(x)

    forward_s, both_s = seconds_of(forward), seconds_of(both)
    # Passes of idle slots have the same kinds as the other passes of the attack.
    return sum(
        (1 + c.idle / max(c.forward, 1))
        * ((c.forward - c.backward) * forward_s + c.backward * both_s)
        for c in result.costs
    )


# --- In PyTorch ---


def their_worker(args: argparse.Namespace) -> None:
    """Run each norm with as many threads as there are cores."""
    import pyautoattack
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    net, passes = their_network(args.network), {"forward": 0, "backward": 0}

    class Counted(torch.nn.Module):
        def forward(self, x):
            passes["forward"] += len(x)
            passes["backward"] += len(x) * x.requires_grad
            return net(x)

    images, labels, _ = data(args.images)
    x = torch.tensor(images).permute(0, 3, 1, 2).contiguous()
    y = torch.tensor(labels).long()
    if args.network == "convnext_n":
        y = net(x).argmax(1)
    for norm in args.norms:
        epsilon = 0.0 if args.network == "convnext_n" else args.radii[norm]
        attack = pyautoattack.AutoAttack(
            Counted(), norm=THEIRS[norm], eps=epsilon, version="standard", seed=args.seed
        )
        if args.network == "convnext_n":
            attack.apgd.n_iter = attack.apgd_targeted.n_iter = attack.fab.n_iter = WIDE["steps"]
            attack.apgd.n_iter_orig = attack.apgd_targeted.n_iter_orig = WIDE["steps"]
            attack.apgd_targeted.n_target_classes = attack.fab.n_target_classes = 1
            attack.square.n_queries = WIDE["queries"]
        passes.update(forward=0, backward=0)
        run = functools.partial(attack.run_standard_evaluation, x, y, batch_size=250)
        (_, predicted), wall, cpu = timed(run)
        report = {"norm": norm, "wall": wall, "cpu": cpu} | passes
        print(json.dumps(report | {"robust": (predicted == y).tolist()}), flush=True)


# --- Side by side ---


def launch(
    worker: str, args: argparse.Namespace, cores: list[int], seed: int = 0
) -> dict[str, dict]:
    command = [sys.executable, __file__, f"--worker={worker}", f"--network={args.network}"]
    command += [f"--norms={','.join(args.norms)}", f"--images={args.images}"]
    command += [f"--epsilon={','.join(map(str, args.radii.values()))}", f"--seed={seed}"]
    command += ["--torch"] * args.torch
    command += [f"--batch={args.batch}"] * (args.batch is not None)
    pin = functools.partial(os.sched_setaffinity, 0, cores)
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, preexec_fn=pin)
    if done.returncode:
        sys.exit(done.returncode)
    reports = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {report["norm"]: report for report in reports}


def main() -> None:
    args = parse()
    if args.topology:
        from tools.bench import slice_programs

        return slice_programs.autoattack(args)
    if args.worker:
        return our_worker(args) if args.worker == "ours" else their_worker(args)
    all_cores = sorted(os.sched_getaffinity(0))
    result: dict[str, dict] = {norm: {} for norm in args.norms}
    robust: dict[str, list[bool]] = {}
    modes = {"one": ("one core", all_cores[:1], "cpu"), "all": ("all cores", all_cores, "wall")}
    for mode, cores, key in modes.values() if args.cores == "both" else [modes[args.cores]]:
        runs: dict[str, list] = {"theirs": [], "ours": []}
        for _ in range(args.rounds):
            for worker in runs:
                runs[worker].append(launch(worker, args, cores))
        for norm in args.norms:
            best = {w: min((r[norm] for r in runs[w]), key=lambda r: r[key]) for w in runs}
            result[norm][mode] = compare(args, norm, key, best)
            show(norm, mode, len(cores), key, result[norm][mode])
            robust[norm] = best["theirs"]["robust"]
    for seed in range(1, args.seeds):
        for norm, report in launch("theirs", args, all_cores, seed).items():
            differing = sum(a != b for a, b in zip(robust[norm], report["robust"], strict=True))
            result[norm].setdefault("seeds_differ", []).append(differing)
            print(f"{norm:4} pyautoattack, seed {seed}: {differing} verdicts differ from seed 0")
    if args.json:
        print(json.dumps({"network": args.network, "images": args.images, "norms": result}))


def compare(args: argparse.Namespace, norm: str, key: str, best: dict[str, dict]) -> dict:
    ours, theirs = best["ours"], best["theirs"]
    per_pass = {w: r[key] / (r["forward"] + r["backward"]) for w, r in best.items()}
    differing = sum(a != b for a, b in zip(ours["robust"], theirs["robust"], strict=True))
    return {
        "seconds": {"ours": ours[key], "theirs": theirs[key]},
        "ratio": theirs[key] / ours[key],
        "ratio_per_pass": per_pass["theirs"] / per_pass["ours"],
        "compile_s": ours["compile"],
        "over_network": ours["cpu"] / ours["network"],
        "passes": {w: [r["forward"], r["backward"]] for w, r in best.items()},
        "idle": ours["idle"],
        "robust": {w: sum(r["robust"]) for w, r in best.items()},
        "differing_verdicts": differing if args.network != "convnext_n" else None,
    }


def show(norm: str, mode: str, cores: int, key: str, r: dict) -> None:
    kind = {"cpu": "CPU s", "wall": "wall s"}[key]
    print(
        f"{norm:4} {mode} ({cores}): ours {r['seconds']['ours']:.1f}, pyautoattack "
        f"{r['seconds']['theirs']:.1f} {kind}: {r['ratio']:.2f} x its speed, "
        f"{r['ratio_per_pass']:.2f} x per pass"
    )
    differing = r["differing_verdicts"]
    notes = [f"compiled in {r['compile_s']:.1f} s", f"{r['idle']:,} passes of idle slots"]
    if cores == 1:
        notes.append(f"{r['over_network']:.2f} x the seconds of the network alone")
    if differing is not None:
        notes.append(f"{r['robust']['theirs']} robust, {differing} verdicts differ")
    print(" " * 5 + "; ".join(notes), flush=True)


if __name__ == "__main__":
    from jaxrobust.runtime.processes.launch import keep_large_buffers

    keep_large_buffers()
    guarded("bench_autoattack", main)
