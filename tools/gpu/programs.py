"""`python tools/gpu/programs.py WHAT CONFIG`: a figure of `bench_gpu.py` other than a step's.

Each runs in a process that has the GPU to itself, and prints a JSON object on the last line:

- `logits`: how far both sides' bfloat16 logits are from our float32 logits, and from each other.
- `memory`: bytes of our step, extrapolated from two steps that are compiled but not run.
- `torch_memory`: the same for PyTorch's step, from two uncompiled runs.
- `autoattack`, `pyautoattack`: seconds of AutoAttack on random images and weights, at radius 0,
  where every attack runs to its end.
"""

import argparse
import functools
import gc
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # configs/

from jaxrobust.runtime.commandline.arguments import Arguments
from jaxrobust.runtime.processes.launch import keep_large_buffers
from tools import bench_step, guarded, timed

if TYPE_CHECKING:  # imported when used, after their environment is set
    import numpy as np
    from ml_collections import ConfigDict

SHORT = {"steps": 50, "queries": 250}  # enough to time a pass
FIRST = 8  # images to compile AutoAttack's programs and make their first steps


def parse() -> argparse.Namespace:
    parser = Arguments(__doc__)
    parser.add_argument("what", choices=PROGRAMS, help="Figure to measure.")
    parser.add_argument("config", help="Config of the network.")
    parser.flag("batch", type=int, default=8, help="Number of images; default: %(default)s.")
    parser.flag("image_size", type=int, help="Side of the images in pixels; default: the config's.")
    parser.flag("attack_steps", type=int, help="Number of attack steps; default: the config's.")
    parser.flag("attention", choices=["plain"], help="Attention without cuDNN's kernels.")
    parser.flag("length", choices=["short", "standard"], default="short", help="Of AutoAttack.")
    parser.flag("search_dtype", default="float32", help="Type that our AutoAttack searches in.")
    args = parser.parse_args()
    args.against = "torch" if "torch" in args.what or args.what in ("logits", "memory") else None
    args.microbatches = args.fsdp = args.program = None
    args.dtype, args.scan, args.rounds, args.steps = "bfloat16", False, 1, 1
    return args


def plain_attention() -> None:
    """Disable cuDNN's attention kernels for networks in this process."""
    from jaxrobust.models.kernels.cuda import fused_attention

    fused_attention.applies = lambda qkv, heads: False


# --- Logits ---


def logits(config: "ConfigDict", args: argparse.Namespace) -> dict[str, Any]:
    """Compare logits of the same weights and images, in units of their standard deviation."""
    import jax
    import numpy as np
    import torch

    from jaxrobust import convert, models
    from jaxrobust.publish import torch_networks
    from tools.bench import torch_reference

    name, about = config.model.name, {"num_classes": config.model.num_classes}
    side, gpu = config.model.image_size, torch.cuda.is_available()
    images = np.random.default_rng(0).random((args.batch, side, side, 3), np.float32)
    net = torch_reference.randomised(torch_networks.network(name, img_size=side, **about), seed=0)
    arrays = {key: value.numpy() for key, value in net.state_dict().items()}
    params, stats = convert.from_torch(name, arrays, image_size=side, **about)

    def ours(dtype: str) -> "np.ndarray":
        options = dict(config.model.options)
        own = models.create(name, image_size=side, dtype=dtype, **about, **options)
        precision = jax.default_matmul_precision("highest" if dtype == "float32" else "default")
        with precision:
            values = jax.jit(lambda p, s, x: own.apply(p, s, x)[0])(params, stats, images)
        return np.asarray(values, np.float32)

    device, layout = "cuda" if gpu else "cpu", torch.channels_last if gpu else torch.preserve_format
    placed: Any = net.to  # PyTorch's types do not know its `memory_format`
    net = placed(device, memory_format=layout).eval()
    x = torch.tensor(images).permute(0, 3, 1, 2).to(device, memory_format=layout)
    with torch.no_grad(), torch.autocast(device, torch.bfloat16):
        theirs = net(x).float().cpu().numpy()
    truth = ours("float32")
    if args.attention:
        plain_attention()
    rounded = ours("bfloat16")

    def apart(a: "np.ndarray", b: "np.ndarray") -> float:
        return float(np.sqrt(np.mean((a - b) ** 2)) / np.std(truth))

    return {
        "jaxrobust": apart(rounded, truth),
        "PyTorch": apart(theirs, truth),
        "between": apart(rounded, theirs),
    }


# --- Memory ---


def memory(config: "ConfigDict", args: argparse.Namespace) -> dict[str, Any]:
    """Extrapolate our step's memory, as reported by XLA, from two batches."""
    import jax

    from jaxrobust.doctor.programs import topology

    needed = []
    for batch in (args.batch, 2 * args.batch):
        config.train.batch_size = batch
        program = bench_step.ours(config, *bench_step.data(config, batch))
        needed.append(sum(topology.sizes(program.executable).values()))
    has = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    return line(args.batch, needed, has or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def torch_memory(config: "ConfigDict", args: argparse.Namespace) -> dict[str, Any] | None:
    """Extrapolate the memory of PyTorch's step from two batches; None if it is not counted."""
    import torch

    if not torch.cuda.is_available():
        return None
    needed = []
    for batch in (args.batch, 2 * args.batch):
        gc.collect()  # the previous batch
        torch.cuda.reset_peak_memory_stats()
        bench_step.theirs(config, *bench_step.data(config, batch), eager=True)
        needed.append(torch.cuda.max_memory_allocated())
    free, _ = torch.cuda.mem_get_info()
    return line(args.batch, needed, free + torch.cuda.memory_reserved())


def line(batch: int, needed: list[int], has: int) -> dict[str, float]:
    """Return the line through the bytes for a batch and for twice the batch."""
    per_image = (needed[1] - needed[0]) / batch
    return {"fixed": needed[0] - batch * per_image, "per_image": per_image, "has": has}


# --- AutoAttack ---


def autoattack(config: "ConfigDict", args: argparse.Namespace) -> dict[str, Any]:
    """Time ours after a run of a few images, which compiles and is reported separately.

    On a GPU, the first step of each program also takes seconds, once per process.
    """
    import jax
    import numpy as np

    from jaxrobust import evaluation, models

    def network(dtype: str) -> Callable[..., Any]:
        model, options = config.model, dict(config.model.options)
        how = {"num_classes": model.num_classes, "image_size": model.image_size, "dtype": dtype}
        net = models.create(model.name, **how, **options)
        params, stats = jax.jit(net.init)(jax.random.key(0))
        return jax.tree_util.Partial(lambda p, s, x: net.apply(p, s, x)[0], params, stats)

    images = bench_step.data(config, args.batch)[0].astype(np.float32) / 255
    judge = network("float32")
    short = {"steps": SHORT["steps"]}
    overrides: dict[str, Any] = dict.fromkeys(("apgd-t", "fab-t"), short | {"targets": 1})
    overrides |= {"apgd-ce": short, "square": {"steps": SHORT["queries"]}}
    search = None if args.search_dtype == "float32" else network(args.search_dtype)
    # At radius 0, no attack changes the network's own predictions.
    labels = np.concatenate([np.argmax(jax.jit(judge)(part), 1) for part in _parts(images)])
    how: dict[str, Any] = {"norm": "linf", "epsilon": 0.0, "verbose": False, "search_fn": search}
    how["overrides"] = overrides if args.length == "short" else None
    first, first_s, _ = timed(
        lambda: evaluation.autoattack(judge, images[:FIRST], labels[:FIRST], **how)
    )
    result, wall, _ = timed(lambda: evaluation.autoattack(judge, images, labels, **how))
    # Programs for fewer slots, at the end of the attacks, compile in the second run.
    late, early = (sum(cost.compile_seconds for cost in r.costs) for r in (result, first))
    passes = {key: sum(getattr(c, key) for c in result.costs) for key in ("forward", "backward")}
    robust = int(result.robust.sum())
    attacks_s = sum(cost.seconds for cost in result.costs)  # the rest checks the network
    seconds = {"wall_s": wall - late, "attacks_s": attacks_s, "compile_s": late + early}
    return seconds | {"first_s": first_s - early, "robust": robust} | passes


def pyautoattack(config: "ConfigDict", args: argparse.Namespace) -> dict[str, Any]:
    """Time pyautoattack on PyTorch's network, uncompiled, in channels-last and TF32."""
    import pyautoattack as reference
    import torch

    from jaxrobust.publish import torch_networks

    gpu = torch.cuda.is_available()
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = gpu
    device, layout = "cuda" if gpu else "cpu", torch.channels_last if gpu else torch.preserve_format
    model = config.model
    about = {"num_classes": model.num_classes, "img_size": model.image_size}
    placed: Any = torch_networks.network(model.name, **about).eval().requires_grad_(False).to
    net, passes = placed(device, memory_format=layout), {"forward": 0, "backward": 0}

    class Counted(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            passes["forward"] += len(x)
            passes["backward"] += len(x) * x.requires_grad
            return net(x)

    images = bench_step.data(config, args.batch)[0]
    x = torch.tensor(images).permute(0, 3, 1, 2).float().div(255).contiguous()
    y = torch.cat([net(part.to(device)).argmax(1).cpu() for part in _parts(x)])
    attack = reference.AutoAttack(Counted(), norm="Linf", eps=0.0, seed=0, device=device)
    if args.length == "short":
        for part in (attack.apgd, attack.apgd_targeted, attack.fab):
            part.n_iter = part.n_iter_orig = SHORT["steps"]
        attack.apgd_targeted.n_target_classes = attack.fab.n_target_classes = 1
        attack.square.n_queries = SHORT["queries"]
    run = functools.partial(attack.run_standard_evaluation, x, y, batch_size=250)
    (_, predicted), wall, _ = timed(run)
    return {"wall_s": wall, "compile_s": None, "robust": int((predicted.cpu() == y).sum())} | passes


def _parts(images: Any) -> list[Any]:
    return [images[start : start + 100] for start in range(0, len(images), 100)]


PROGRAMS = {f.__name__: f for f in (logits, memory, torch_memory, autoattack, pyautoattack)}


def main() -> None:
    args = parse()
    config = bench_step.load(args)
    if args.what in ("logits", "torch_memory", "pyautoattack"):  # two allocators on one device
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if "torch" in args.what or args.what.startswith("py"):
        import jax

        jax.config.update("jax_platforms", "cpu")  # leaves the GPU to PyTorch
    print(json.dumps(PROGRAMS[args.what](config, args)))


if __name__ == "__main__":
    keep_large_buffers()
    guarded("programs", main)
