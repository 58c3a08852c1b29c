"""`python tools/bench_step.py CONFIG`: the speed of one training step, and its bound.

Prints compile seconds, images/s, and the ratio to the FLOP bound. With F the cost of a forward
pass, the clean step costs 3F, the step with K APGD steps (2K + 4)F, and with K PGD steps (2K + 3)F.
A third of that, times the clean step's time, is a bound that only fewer operations could beat. With
`--against torch`, the same step in PyTorch on timm's network runs in turns with ours in the same
process; on a GPU with `torch.compile` and channels-last, and in bfloat16 under autocast. Both then
attack with PGD from the image if the config says PGD, else with APGD, and minimize the
cross-entropy; for TRADES, both attack with PGD from noise and minimize its loss. `--program` runs
one program alone, with the device's memory to itself; `tools/bench_gpu.py` combines such
runs. Running out of memory exits with code 4.

`--topology v5e:8x8` or `--topology h100:8` compiles the same step for absent TPUs or GPUs instead:
what it sends between chips and where, whether it fits, and the step time that the chips' peaks
allow. `--traffic` breaks bytes and cycles, or a GPU's kernels, down by part of the step, kind of
work and line of source. `--bundles` reads a TPU program's heaviest operations in the compiler's
final schedule: cycles and the busiest unit of each. `--block 0` compiles only the network's first
block, in a minute or two.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # configs/

from jaxrobust.runtime.commandline.arguments import Arguments, config_name, load_config
from jaxrobust.runtime.processes.launch import keep_large_buffers
from tools import guarded, timed

if TYPE_CHECKING:  # JAX is imported when used, after its environment is set
    import numpy as np
    from ml_collections import ConfigDict

PROGRAMS = ("step", "clean", "torch", "torch_clean")
PAIR = "step,torch"  # for networks whose clean step alone compiles for minutes


def parse() -> argparse.Namespace:
    parser = Arguments(__doc__)
    parser.add_argument("config", help="Config whose step to run: its file, or FILE:ARGUMENTS.")
    parser.flag(
        "batch", type=int, help="Batch size; default: 8, for --topology the config's, per chip."
    )
    parser.flag("image_size", type=int, help="Side of the images in pixels; default: the config's.")
    parser.flag("attack_steps", type=int, help="Number of attack steps; default: the config's.")
    parser.flag("dtype", help="Compute type; default: float32, for --topology the config's.")
    parser.flag("fsdp", type=int, help="Number of devices that share the state; 0: all.")
    parser.flag("microbatches", type=int, help="Number of parts to split a device's images into.")
    parser.flag("scan", action="store_true", help="Compile identical blocks of a stage only once.")
    parser.flag("topology", help="Compile for chips such as v5e:8x8 or h100:1, without running.")
    parser.flag("traffic", action="store_true", help="With --topology, print where the time goes.")
    parser.flag("bundles", action="store_true", help="Print the heaviest operations' busy units.")
    parser.flag("block", help="Compile this block alone for --topology: stem, or 0, 1, ...")
    parser.flag("against", choices=["torch"], help="Also run the same step in PyTorch.")
    parser.flag(
        "program",
        choices=(*PROGRAMS, PAIR),
        help="Program, or pair, that runs alone; default: all.",
    )
    parser.flag("attention", choices=["plain"], help="Attention without cuDNN's kernels.")
    parser.flag("trace", type=Path, help="Folder for an XProf trace of --program.")
    parser.flag("rounds", type=int, default=4, help="Number of turns of each program.")
    parser.flag("steps", type=int, default=3, help="Number of timed steps per turn.")
    parser.flag("json", action="store_true", help="Print one JSON object on the last line.")
    args = parser.parse_args()
    if args.topology:
        args.rounds = args.steps = 1
        for name in ("against", "program", "trace"):
            if getattr(args, name):
                parser.error(f"--topology only compiles and runs nothing; leave --{name} out")
    else:
        for name in ("traffic", "bundles", "block"):
            if getattr(args, name) is not parser.get_default(name):
                parser.error(
                    f"--{name} reads an executable; add a slice, such as --topology v5e:4x4"
                )
        if "torch" in (args.program or "") and not args.against:
            parser.error(f"--program {args.program} needs --against torch")
        if args.trace and args.program not in ("step", "clean"):
            parser.error("--trace needs a JAX program; write --program step or --program clean")
        args.batch, args.dtype = args.batch or 8, args.dtype or "float32"
    return args


def load(args: argparse.Namespace, devices: int = 1) -> "ConfigDict":
    """Return the command line's config, unlocked and changed; `args.batch` is per device."""
    config = load_config(args.config)
    given = (
        (config.train, "batch_size", args.batch and args.batch * devices),
        (config.train, "microbatches", args.microbatches),
        (config.model, "dtype", args.dtype),
        (config.model, "image_size", args.image_size),
        (config.attack, "steps", args.attack_steps),
        (config.mesh, "fsdp", args.fsdp),
    )
    for part, key, value in given:
        if value is not None:
            part[key] = value
    if args.scan:
        config.model.options = {**config.model.options, "scan": True}
    if args.against:  # as in the reference's step: nothing random, one batch norm
        is_trades = config.train.objective == "trades"
        config.train.objective = "trades" if is_trades else "adversarial"
        config.label_smoothing = None
        attack = "pgd" if is_trades or config.attack.name == "pgd" else "apgd"
        start = ("gauss", 0.001) if is_trades else ("image", None)
        ball = {"norm": "linf", "start": start[0], "start_std": start[1]}
        config.attack.update(ball, name=attack, statistics="running")
        attacked = "torch" in (args.program or "torch").split(",")
        if attacked and attack == "apgd" and config.attack.steps > 9:
            raise ValueError(
                f"--against torch attacks with up to 9 steps of APGD, not {config.attack.steps}; "
                "give --attack_steps 9"
            )
        config.data.augmentation = "basic"
        config.mixup.update(mixup=None, cutmix=None)
        config.erase.probability = None
        if not config.model.name.startswith("torch:"):  # modules have their function's options
            _drop_random(config)
    if min(args.rounds, args.steps) < 1:
        raise ValueError(f"--rounds={args.rounds} and --steps={args.steps} must be at least 1")
    return config


_UNTIMED = ("drop_path", "bn_group", "bn_momentum")  # options that change no time, or are dropped


def _drop_random(config: "ConfigDict") -> None:
    options = dict(config.model.options)
    config.model.options = {k: options.pop(k) for k in ("scan", "remat") if k in options}
    if unknown := {k: options[k] for k in options if k not in _UNTIMED}:
        raise ValueError(
            f"--against torch has no counterpart for model.options {unknown}; leave it out, or "
            "use a config without them"
        )


class Program(NamedTuple):
    """A training step with its data; `run` returns when the device has finished."""

    run: Callable[[], float]  # the loss
    compile_s: float  # PyTorch: seconds of the first step, which compiles
    flops: float  # of the model, per image
    executable: Any = None  # of JAX


def data(config: "ConfigDict", batch: int) -> "tuple[np.ndarray, np.ndarray]":
    """Draw images u8[B,H,W,C] and labels i32[B]."""
    import numpy as np

    rng, model = np.random.default_rng(0), config.model
    size = (batch, model.image_size, model.image_size, model.in_channels)
    images = rng.integers(0, 256, size, np.uint8)
    return images, rng.integers(0, model.num_classes, batch).astype(np.int32)


def ours(config: "ConfigDict", images: "np.ndarray", labels: "np.ndarray") -> Program:
    import jax

    from jaxrobust.runtime.devices import sharding, tpus
    from jaxrobust.training import build
    from jaxrobust.types import Batch

    phase = build.phase(config, "train", 1000 * config.train.batch_size)
    with jax.set_mesh(phase.mesh):
        holder = [phase.init(jax.random.key(0))]
        batch = Batch(*sharding.global_arrays(phase.mesh, (images, labels)))
        control = build.control(phase.mesh)
        step, seconds, _ = tpus.compile_timed(phase.step, holder[0], batch, control)

    def run() -> float:
        holder[0], metrics = step(holder[0], batch, control)
        return float(metrics["loss"])

    return Program(run, seconds, build.flops_per_image(config, "train"), step)


def theirs(
    config: "ConfigDict", images: "np.ndarray", labels: "np.ndarray", *, eager: bool = False
) -> Program:
    """Return the same step in PyTorch, on a GPU if there is one, then compiled unless `eager`."""
    import torch

    from jaxrobust import models
    from jaxrobust.training import build
    from jaxrobust.training.update import inner
    from tools.bench import torch_reference

    types = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if config.model.dtype not in types:
        raise ValueError(
            f"--against torch supports --dtype {' and '.join(types)}, not {config.model.dtype}"
        )
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    gpu = torch.cuda.is_available()
    if gpu:
        torch.set_float32_matmul_precision("high")  # TF32, as XLA multiplies float32 on GPUs
        torch.backends.cudnn.benchmark = not eager  # its trials take memory
    attack = config.attack
    step_size = inner.step_of(attack) or 2.5 * attack.epsilon / attack.steps
    trainer = torch_reference.Trainer(
        torch_module(config),
        lr=config.train.lr,
        decay_mask=models.decay_mask(config.model.name),
        weight_decay=config.train.weight_decay,
        ema_decay=config.train.ema_decay,
        epsilon=attack.epsilon,
        attack_steps=0 if config.train.objective == "clean" else attack.steps,
        step_size=step_size if attack.name == "pgd" else None,
        trades_beta=config.train.trades_beta if config.train.objective == "trades" else None,
        device="cuda" if gpu else "cpu",
        dtype=types[config.model.dtype],
        channels_last=gpu,
        compiled=gpu and not eager,
    )
    x = torch.tensor(images).permute(0, 3, 1, 2).float().div(255).contiguous()
    x, y = x.to(trainer.device, memory_format=trainer.layout), torch.tensor(labels).long()
    y = y.to(trainer.device)
    _, seconds, _ = timed(lambda: trainer.step(x, y))
    return Program(lambda: trainer.step(x, y), seconds, build.flops_per_image(config, "train"))


def torch_module(config: "ConfigDict") -> Any:
    """Make the network in PyTorch: the module of a `torch:` name, else the reference network."""
    from jaxrobust.pytorch.networks import torch_modules
    from jaxrobust.runtime import pytorch
    from tests.support import torch_modules as networks

    name, model = config.model.name, config.model
    if pytorch.is_name(name):
        sizes = ("num_classes", "image_size", "in_channels")
        return torch_modules.build(name, **{key: model[key] for key in sizes}, **model.options)
    return networks.network(name, num_classes=model.num_classes, img_size=model.image_size)


def device_of(program: str) -> tuple[str, int, int | None]:
    """Return (kind, number, peak bytes on the first) of a program's devices."""
    if program.startswith("torch"):
        import torch

        if torch.cuda.is_available():
            return torch.cuda.get_device_name(), 1, torch.cuda.max_memory_allocated()
        return "cpu", 1, None
    import jax

    first = jax.local_devices()[0]
    used = (first.memory_stats() or {}).get("peak_bytes_in_use")
    return first.device_kind, jax.device_count(), used


def measure(programs: dict, rounds: int, steps: int) -> dict[str, dict[str, float]]:
    """Measure median wall and CPU seconds of each program's step.

    Programs take turns, so that drift of the machine affects all. A turn is one warm-up step and
    `steps` that count: training runs steps one after another, but the first step after another
    program finds its memory out of the caches and, on some virtual machines, reclaimed.
    """
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in programs}
    for _ in range(rounds):
        for name, run in programs.items():
            run()
            for _ in range(steps):
                times[name].append(timed(run)[1:])
    return {
        name: {
            "wall_s": statistics.median(w for w, _ in pairs),
            "wall_min_s": min(w for w, _ in pairs),
            "cpu_s": statistics.median(c for _, c in pairs),
        }
        for name, pairs in times.items()
    }


def prepare(args: argparse.Namespace, names: Sequence[str]) -> None:
    """Set up JAX for the programs, before anything runs."""
    if args.against and len(names) > 1:  # two allocators on one device
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    import jax

    if all(name.startswith("torch") for name in names):
        jax.config.update("jax_platforms", "cpu")  # leaves the GPU to PyTorch
    if args.attention:
        from tools.gpu.programs import plain_attention

        plain_attention()


def main() -> None:
    args = parse()
    if args.topology:
        from tools.bench import slice_programs

        compile_ = slice_programs.step if args.block is None else slice_programs.block
        with tempfile.TemporaryDirectory() as folder:
            args.bundles = Path(folder) if args.bundles else None
            return compile_(args, load)
    config = load(args)
    names = args.program.split(",") if args.program else PROGRAMS[: 4 if args.against else 2]
    prepare(args, names)
    from jaxrobust.runtime.devices import hardware

    images, labels = data(config, args.batch)
    clean = config.copy_and_resolve_references()
    clean.train.objective = "clean"
    programs = {
        name: (theirs if name.startswith("torch") else ours)(
            clean if name.endswith("clean") else config, images, labels
        )
        for name in names
    }
    times = measure({name: p.run for name, p in programs.items()}, args.rounds, args.steps)

    kind, count, _ = device_of(names[0])
    result: dict[str, Any] = {
        "config": config_name(args.config),
        "model": config.model.name,
        "dtype": config.model.dtype,
        "batch": args.batch,
        "image_size": config.model.image_size,
        "attack_steps": config.attack.steps,
        "device": f"{count} x {kind}",
        "compile_s": {name: p.compile_s for name, p in programs.items()},
        "times": times,
        "images_per_s": {name: args.batch / t["wall_s"] for name, t in times.items()},
        "mfu": {},
        "peak_memory": {},  # since the start, so only for programs that run alone
    }
    attack = f"{config.attack.name.upper()}-{config.attack.steps}"
    about = f"batch {args.batch}, {attack}, {result['dtype']}, {result['device']}"
    print(f"{result['model']} {config.model.image_size} px, {about}")
    for name, t in times.items():
        speed = result["images_per_s"][name]
        kind, count, used = device_of(name)
        chip, more = hardware.chip(kind), ""
        if chip:
            result["mfu"][name] = speed * programs[name].flops / (count * chip.flops)
            more += f"   MFU {result['mfu'][name]:.1%} of bfloat16's peak"
        if used:
            result["peak_memory"][name] = used
            more += f"   {used / 1e9:.1f} GB"
        print(
            f"  {name:12} {speed:8.2f} images/s   wall {t['wall_s']:7.3f} s"
            f" (min {t['wall_min_s']:.3f})   cpu {t['cpu_s']:7.3f} s   "
            f"compiled in {programs[name].compile_s:.1f} s{more}"
        )
    if {"step", "clean"} <= times.keys():
        passes = 2 * config.attack.steps + (4 if config.attack.name == "apgd" else 3)
        bound = passes / 3 * times["clean"]["wall_s"]
        result["ratio_to_flop_bound"] = bound / times["step"]["wall_s"]
        print(f"  the step runs at {result['ratio_to_flop_bound']:.2f} of the FLOP bound")
    for ours_name, other in (("step", "torch"), ("clean", "torch_clean")):
        if {ours_name, other} <= times.keys():
            wall, cpu = (times[other][key] / times[ours_name][key] for key in ("wall_s", "cpu_s"))
            result[f"{ours_name}_against_torch"] = {"wall": wall, "cpu": cpu}
            print(f"  {ours_name}: {wall:.2f} x PyTorch's speed (CPU seconds: {cpu:.2f} x)")
    if args.trace:
        from tools.gpu import trace

        trace.write(programs[names[-1]], args.trace, args.steps)
    if args.json:
        print(json.dumps(result))


if __name__ == "__main__":
    keep_large_buffers()
    guarded("bench_step", main)
