"""Repeats the training of a run in PyTorch, and draws both loss curves.

python tools/repeat_in_torch.py --workdir runs/study/base-0 [--phase train] [--data_dir FOLDER]
                                [--threads 1]
python tools/repeat_in_torch.py --workdir RUN --beside RUN [--picture curves.png]

PyTorch starts from the initial weights of the phase and uses the same batches in the same order:
images augmented by the run's data pipeline, then MixUp, CutMix, erasing and smoothing with draws
from the run's key. Network, APGD, AdamW, average of weights and arithmetic are PyTorch's own
(`tools/bench/torch_reference.py`). Each update's loss goes to RUN/torch/PHASE.jsonl, the averaged
weights to RUN/torch/PHASE.safetensors, for `jaxrobust evaluate --weights`.

With --beside, nothing is trained. The picture shows the curves of the run, of PyTorch if it exists,
and of the other run, and the differences of the losses.

Needs the extras `parity` and `plot`. Exit codes: 0 done, 2 a mistake.
"""

import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from jaxrobust import models
from jaxrobust.config import phases
from jaxrobust.models.interface.network_inputs import unit_range
from jaxrobust.runtime.commandline.arguments import Arguments, stop
from jaxrobust.runtime.files import jsonl
from jaxrobust.training import build
from jaxrobust.training.run import splits
from jaxrobust.training.update import inner
from jaxrobust.types import Batch, Weights
from jaxrobust.weights.naming import convert
from jaxrobust.weights.store import files, weights_folder
from jaxrobust.weights.trained import runs


def main() -> None:
    parser = Arguments(__doc__)
    parser.flag("workdir", type=Path, required=True, help="Run whose training to repeat.")
    parser.flag("phase", default="train", help="Phase to repeat.")
    parser.flag("data_dir", help="Folder of data sets; default: from the run.")
    parser.flag("threads", type=int, default=1, help="Threads of PyTorch.")
    parser.flag("beside", type=Path, help="Run of the same config whose curve is drawn too.")
    parser.flag("picture", type=Path, help="PNG of the curves; default: RUN/torch/PHASE.png.")
    args = parser.parse_args()
    if args.phase not in (names := phases(runs.run_config(args.workdir))):
        stop(f"{args.workdir} has no phase {args.phase}; give --phase one of {names}", 2)
    config = runs.run_config(args.workdir, args.phase)
    if args.data_dir:
        config.data.dir = args.data_dir
    if not args.beside:
        repeat(args.workdir, config, args.phase, threads=args.threads)
    draw(args.workdir, args.phase, args.beside, args.picture)


def repeat(workdir: Path, config: Any, name: str, *, threads: int) -> None:
    """Train in PyTorch like the phase `name` of a run; write the losses and the average."""
    import torch

    from jaxrobust.publish import torch_networks
    from tests.support import torch_modules
    from tools.bench import torch_reference

    check(config, name)
    torch.set_num_threads(threads)
    source = splits.opened(config, "train_split")
    phase = build.phase(config, name, splits.examples(config, name, source))
    start = first_weights(workdir, config, name, phase)
    model, p, attack = config.model, config[name], config.attack
    own = models.computed(model.name, {}).keys()  # options that make another network
    row = {key: value for key, value in dict(model.options).items() if key in own}
    net = torch_modules.network(
        model.name,
        img_size=model.image_size,
        num_classes=model.num_classes,
        in_chans=model.in_channels,
        **row,
    )
    arrays = convert.to_torch(model.name, *start, **model.options)
    net.load_state_dict({key: torch.from_numpy(np.array(a)) for key, a in arrays.items()})
    trainer = torch_reference.Trainer(
        net,
        lr=p.lr,
        weight_decay=p.weight_decay,
        decay_mask=p.decay_mask or models.decay_mask(model.name),
        ema_decay=p.ema_decay,
        epsilon=attack.epsilon,
        attack_steps=attack.steps if p.objective == "adversarial" else 0,
        step_size=step_size(attack) if attack.name == "pgd" else None,
    )
    out = workdir / "torch" / f"{name}.jsonl"
    out.parent.mkdir(exist_ok=True)
    jsonl.replace(out, "")
    batches = augmented(config, name, source)
    for step in range(phase.total_steps):
        rate = float(phase.schedule(step))
        for group in trainer.optimiser.param_groups:
            group["lr"] = rate
        images, labels = next(batches)
        x = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
        y = torch.from_numpy(labels)
        loss = trainer.step(x, y if y.is_floating_point() else y.long())
        jsonl.append(out, {"step": step + 1, "loss": loss})
        if (step + 1) % 50 == 0:
            print(f"{name} {step + 1}/{phase.total_steps} loss {loss:.4f}", flush=True)
    state = torch_networks.state_arrays(trainer.average)
    sizes = {key: model[key] for key in ("num_classes", "image_size", "in_channels")}
    average = convert.from_torch(model.name, state, **sizes, **model.options)
    kept = {key: np.asarray(a) for part in average for key, a in part.items()}
    about = weights_folder.metadata(model.name, dict(model.options))
    files.write(out.with_suffix(".safetensors"), kept, about)


# Values that PyTorch's side supports, the default first.
OF_PHASE = {
    "objective": ("adversarial", "clean"),
    "optimizer": ("adamw",),
    "b2": (0.95,),
    "clip_norm": (None,),
    "l1": (0.0,),
    "microbatches": (1,),
}
OF_ATTACK = {
    "name": ("apgd", "pgd"),
    "norm": ("linf",),
    "start": ("image",),
    "warmup_epochs": (0,),
    "statistics": ("running",),
}


def check(config: Any, name: str) -> None:
    """Refuse a phase that PyTorch's side does not support."""
    for part, known in ((name, OF_PHASE), ("attack", OF_ATTACK)):
        for key, values in known.items():
            if (value := config[part][key]) not in values:
                stop(f"PyTorch's side only supports {part}.{key}={values[0]!r}, not {value!r}", 2)


def step_size(attack: Any) -> float:
    return inner.step_of(attack) or 2.5 * attack.epsilon / attack.steps


def first_weights(workdir: Path, config: Any, name: str, phase: build.Phase) -> Weights:
    """Read the best weights of the previous phase, or draw initial ones, as the run did."""
    before = phases(config)[: phases(config).index(name)]
    if before:
        return runs.run_weights(workdir, before[-1])[1]
    if config.init.weights:
        stop(f"{workdir} starts from weights; give a run that starts from random ones", 2)
    state = phase.init(jax.random.key(config.seed))
    return Weights(state.params, state.stats)


def augmented(config: Any, name: str, source: Any) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield images f32[B,H,W,3] and labels [B] or [B,C] as attacked by the run's step."""
    change = build.batch_augmentation(config, name, devices=1)

    @jax.jit
    def of_step(step: jax.Array, batch: Batch) -> Batch:
        key = jax.random.fold_in(run_key, step)  # as in `step.train_step`
        return change(jax.random.split(key, 3)[2], Batch(unit_range(batch.images), batch.labels))

    run_key = jax.random.split(jax.random.key(config.seed))[1]  # as in `step.state_of`
    stream = splits.batches(config, name, source, 0)
    for step, loaded in enumerate(stream):
        batch = Batch(jnp.asarray(loaded.images), jnp.asarray(loaded.labels))
        images, labels = jax.device_get(of_step(jnp.int32(step), batch))
        yield np.array(images, np.float32), np.array(labels)


def losses(workdir: Path, name: str) -> np.ndarray:
    """Return (step, mean loss since the last line) for a phase of a run."""
    rows = jsonl.read(workdir / "metrics.jsonl")
    found = [(r["step"], r["loss"]) for r in rows if r["phase"] == name and "loss" in r]
    return np.array(found, np.float64).reshape(-1, 2)


def torch_losses(path: Path, steps: np.ndarray) -> np.ndarray:
    """Return the same for PyTorch, which stores every loss, at the same steps."""
    each = np.array([json.loads(line)["loss"] for line in path.read_text().splitlines()])
    edges = [0, *steps.astype(int)]
    means = [each[a:b].mean() for a, b in itertools.pairwise(edges) if b <= len(each)]
    return np.stack([steps[: len(means)], means], axis=1)


def draw(workdir: Path, name: str, beside: Path | None, picture: Path | None) -> None:
    """Draw the curves and their differences from the run's curve; print the differences."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    own = losses(workdir, name)
    others: dict[str, np.ndarray] = {}
    made = workdir / "torch" / f"{name}.jsonl"
    if made.exists():
        others["PyTorch, float32"] = torch_losses(made, own[:, 0])
    if beside:
        dtype = runs.run_config(beside, name).model.dtype
        others[f"here, {beside.name}, {dtype}"] = losses(beside, name)
    figure, (upper, lower) = plt.subplots(2, 1, sharex=True, figsize=(7, 6))
    dtype = runs.run_config(workdir, name).model.dtype
    upper.plot(*own.T, label=f"here, {workdir.name}, {dtype}", color="black", linewidth=2)
    for (label, curve), colour in zip(others.items(), ("tab:orange", "tab:blue"), strict=False):
        n = min(len(own), len(curve))
        apart = np.abs(curve[:n, 1] - own[:n, 1]) / own[:n, 1]
        upper.plot(*curve.T, label=label, color=colour, linewidth=1)
        lower.semilogy(curve[:n, 0], np.maximum(apart, 1e-8), label=label, color=colour)
        print(f"{label}: relative difference of the losses, from {workdir}:")
        for limit in (1e-5, 1e-4, 1e-3, 1e-2):
            above = np.flatnonzero(apart > limit)
            at = f"step {int(own[above[0], 0])}" if len(above) else "never"
            print(f"  first above {limit:g}: {at}")
        print(f"  mean {apart.mean():.2e}, last {apart[-1]:.2e}")
    upper.set_ylabel("loss")
    lower.set_ylabel("relative difference of the loss")
    lower.set_xlabel(f"update of the phase {name}")
    upper.legend()
    lower.legend()
    figure.tight_layout()
    path = picture or workdir / "torch" / f"{name}.png"
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=100)
    print(path)


if __name__ == "__main__":
    main()
