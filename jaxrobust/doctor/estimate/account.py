"""Time, chip-hours and money for a config on given devices, phase by phase, as plain values."""

import math
from pathlib import Path
from typing import Any

import jax

from jaxrobust.attacks import mixes, registry
from jaxrobust.config import SPARED, Config, decoders
from jaxrobust.data.transforms.presets import PRESETS
from jaxrobust.doctor.estimate import attacked, elsewhere, here
from jaxrobust.doctor.estimate.devices import Target
from jaxrobust.doctor.estimate.work import PhaseCost, PhaseWork, work
from jaxrobust.doctor.programs import gpus
from jaxrobust.runtime.text import patience
from jaxrobust.runtime.text.spelling import counted
from jaxrobust.training import build
from jaxrobust.training.run import warnings
from jaxrobust.training.update import objectives
from jaxrobust.weights.trained import start_run

# Images/s of an idle core for photographs of 110 kB at 224 px, `python tools/bench_data.py FOLDER`;
# docs/results/cpu.md has those of a busy one. Other augmentations and sizes were not measured.
PER_CORE = {"basic": 546, "light": 452, "3-augment": 378, "heavy": 405}
_PHOTOGRAPHS = 224  # px
# Chips, as JAX counts them, and vCPUs per host of the machine types for slices on Google Cloud.
# The numbers for v5e and TPU7x were looked up, the others are from memory. Hosts of GPUs vary too
# much to be listed.
HOSTS = {
    "TPU v4": (4, 240),
    "TPU v5e": (4, 112),
    "TPU v5p": (4, 208),
    "TPU v6e": (4, 180),
    "TPU7x": (8, 224),  # four chips, which JAX counts twice
}


def account(
    config: Config,
    target: Target,
    *,
    utilisation: float,
    seconds: float = 3.0,
    chips: list[Any] | None = None,
    images: int | None = None,
    robust: float = 0.5,
    start: float = 0.0,
) -> dict[str, Any]:
    """Estimate the cost of a config.

    Args:
      utilisation: the assumed share of the peak; not used for present devices.
      seconds: how long to measure the step of each phase.
      chips: to compile for, see `elsewhere.computed`.
      images: for AutoAttack at the end; default: those of the test split; 0: no AutoAttack.
      robust: the share of these images assumed to be robust.
      start: seconds until a command begins to work, as measured for this one.
    """
    config, fitted = warnings.fitted_batches(config, target.chips)
    with patience.of("reading the config and its data"):
        parts = work(config)
    end = parts[-1]
    if images is None:
        images = end.evaluated("test")
    elif images > end.test.images:
        raise ValueError(
            f"--images={images} is more than the {end.test.images:,} images of the split "
            f"{end.config.data.test_split!r}; give fewer, or leave it out"
        )
    rows = [_phase(part, target, utilisation, seconds, chips) for part in parts]
    result: dict[str, Any] = {
        "model": config.model.name,
        "dataset": config.data.name,
        "on": target.name,
        "device": f"{target.chips} x {target.kind}",
        "chips": target.chips,
        **({"slices": target.slices} if target.slices > 1 else {}),
        "chip_memory": target.chip and target.chip.memory,
        "measured": target.here,
        "utilisation": None if target.here else utilisation,
        "start_s": start,
        "phases": rows,
        "training": costs(sum(row["seconds"] for row in rows) + start, target.whole),
    }
    if images:
        with patience.of("AutoAttack: estimating its cost"):
            if target.here:
                once = attacked.measured(end.config, seconds=seconds)
            else:
                once = attacked.computed(end.config, target, utilisation=utilisation)
        aa = {"images": images, **once._asdict(), "robust": robust}
        result["autoattack"] = aa | _of_autoattack(aa, target, start)
    result["known"] = [*fitted, *_known(parts, target, rows, decoders(config.data))]
    result["assumed"] = _assumed(parts, target, result, robust)
    return result


def hours(config: Config, target: Target, *, utilisation: float) -> tuple[float, float]:
    """Estimate the hours of training and of AutoAttack on chips that are not here.

    As `account` does, but without counting activations, which takes most of its time.
    """
    config, _ = warnings.fitted_batches(config, target.chips)
    parts = work(config)
    training = 0.0
    for part in parts:
        elsewhere.check(part, target)
        elsewhere.state(part, target)
        once = elsewhere.timed(part, target, utilisation=utilisation)
        training += sum(_spent(part, once).values())
    end = parts[-1]
    if not (images := end.evaluated("test")):
        return training / 3600, 0.0
    aa = attacked.computed(end.config, target, utilisation=utilisation)._asdict()
    aa |= {"images": images, "robust": 0.5}
    return training / 3600, _of_autoattack(aa, target, 0.0)["expected"]["hours"]


def _of_autoattack(aa: dict[str, Any], target: Target, start: float) -> dict[str, Any]:
    """Return AutoAttack's costs if all images are robust, and if the assumed share is."""
    found = {}
    for key, share in (("at_most", 1.0), ("expected", aa["robust"])):
        total = start + attacked.seconds_of(aa, images=aa["images"], robust=share)
        found[key] = costs(total, target.whole)
    return found


def costs(seconds: float, chips: int) -> dict[str, float]:
    """Convert seconds to hours and chip-hours."""
    return {"seconds": seconds, "hours": seconds / 3600, "chip_hours": chips * seconds / 3600}


def priced(result: Any, price: float) -> Any:
    """Add the price to every part of an account with chip-hours."""
    if isinstance(result, list):
        return [priced(part, price) for part in result]
    if not isinstance(result, dict):
        return result
    new = {key: priced(value, price) for key, value in result.items()}
    return new | ({"money": price * result["chip_hours"]} if "chip_hours" in result else {})


def _phase(
    part: PhaseWork, target: Target, utilisation: float, seconds: float, chips: list[Any] | None
) -> dict[str, Any]:
    config, p = part.config, part.config[part.name]
    attacks = objectives.named(p.objective).attacks
    norms = mixes.described(config.attack) if attacks else ""
    with patience.of(f"{part.name}: counting its operations"):
        flops = build.flops_per_image(config, part.name)
    if target.here:
        devices = jax.devices(target.name)
        if target.name == "cpu" and build.one_device(config, len(devices)):
            devices = devices[:1]
        with patience.lasting(f"{part.name}: compiling and measuring its programs"):
            once = here.measured(part, devices, seconds=seconds)
    else:
        with patience.of(f"{part.name}: estimating the cost of its step"):
            once = elsewhere.computed(part, target, utilisation=utilisation, chips=chips)
    spent = _spent(part, once)
    speed = part.batch_size / once.step
    peak = target.chip and target.chips * target.chip.flops
    return {
        "phase": part.name,
        "objective": p.objective,
        "attack_steps": registry.steps(config.attack.name, config.attack.steps) if attacks else 0,
        **({"attack_norms": norms} if norms else {}),
        "epochs": p.epochs,
        "image_size": config.model.image_size,
        "batch_size": part.batch_size,
        "images_per_epoch": part.rows,
        "steps": part.steps,
        "flops_per_image": flops,
        "step_s": once.step,
        "images_per_s": speed,
        "images_per_s_per_chip": speed / target.chips,
        "mfu": speed * flops / peak if peak else None,
        "memory_bytes": once.memory,
        "parts_s": spent,
        "data_cores": None if target.here else cores(part, speed),
        **once.figures,
        **costs(sum(spent.values()), target.whole),
    }


def _spent(part: PhaseWork, once: PhaseCost) -> dict[str, float]:
    """Return the seconds of a phase, by what it spends them on."""
    saves = part.selections + math.ceil(
        part.config[part.name].epochs / part.config.checkpoint.every_epochs
    )
    return {
        "steps": part.steps * once.step,
        "selection": part.selections * once.selection,
        "alarm": part.probes * once.probe,
        "test": once.test,
        "compile": once.compile,
        "checkpoints": saves * once.save,
    }


def cores(work: PhaseWork, images_per_s: float) -> float | None:
    """Count the cores needed to decode this many images/s; None if they were not measured."""
    data, source = work.config.data, work.train.source
    chains = {PRESETS[name].chain: name for name in PER_CORE}
    chain = PRESETS[data.augmentation].chain if data.augmentation in PRESETS else data.augmentation
    if source is None:
        encoded = data.name.removeprefix("tfds:").startswith("imagenet")
    else:
        encoded = source.image_shape is None
    if not encoded or work.config.model.image_size != _PHOTOGRAPHS or chain not in chains:
        return None
    return images_per_s / PER_CORE[chains[chain]]


def decoding_line(work: PhaseWork, target: Target, images_per_s: float) -> str | None:
    """Describe the cores needed for decoding, warning if hosts have too few; None if unknown."""
    wanted = cores(work, images_per_s)
    if wanted is None or target.here:  # present devices are measured with their data
        return None
    needs = (
        f"{work.name}: {images_per_s:,.0f} images/s keep {math.ceil(wanted):,} cores busy with "
        f"decoding and data.augmentation={work.config.data.augmentation}"
    )
    if target.kind not in HOSTS:
        return f"{needs}, {wanted / target.chips:.1f} per {target.kind}."
    host_chips, host_cores = HOSTS[target.kind]
    number = math.ceil(target.chips / host_chips)
    available = number * (host_cores * min(target.chips / host_chips, 1) - SPARED)
    if wanted <= available:
        return f"{needs}, out of {available:,.0f} on {counted(number, 'host')}."
    return (
        f"WARNING: {needs}, but there are only {available:,.0f} on {counted(number, 'host')}: the "
        f"chips wait for data at least {1 - available / wanted:.0%} of the time; choose a cheaper "
        "data.augmentation."
    )


def _known(
    parts: list[PhaseWork], target: Target, rows: list[dict[str, Any]], workers: int
) -> list[str]:
    if target.here:
        return [
            "Steps, evaluations, compilation, checkpoints, the start of the program and memory "
            "were measured briefly on this machine, and multiplied by the number of repetitions.",
            f"Images are decoded by {workers or 'no'} other processes (data.workers).",
        ]
    speeds = zip(parts, (row["images_per_s"] for row in rows), strict=True)
    lines = [line for part, speed in speeds if (line := decoding_line(part, target, speed))]
    lines.append(
        "Computed, not measured, because no step has run on such chips: the network's operations "
        "are counted and divided by the assumed share of the chips' peak."
    )
    if target.slices > 1:
        assert target.chip is not None, "only listed chips have names"
        speed = target.chip.network
        lines.append(
            f"Slices exchange gradients once per step, at {speed / 1e9:.3g} GB/s per chip, which "
            "is Google's figure; no step counts as faster."
            if speed
            else (
                f"The bandwidth between slices of {target.kind} is unknown, so the time to "
                "exchange gradients between them is not counted."
            )
        )
    if any("roofline" in row for row in rows):
        compiler = "libtpu" if "TPU" in target.kind else "JAX's CUDA plug-in"
        lines.append(
            f"Compiled with {compiler}: memory and roofline are those of the step's executable. No "
            "step counts as faster than its roofline."
        )
    return lines


def _assumed(
    parts: list[PhaseWork], target: Target, result: dict[str, Any], robust: float
) -> list[str]:
    lines, aa, rows = [], result.get("autoattack"), result["phases"]
    unknown = sorted({work.config.data.name for work in parts if work.train.source is None})
    published = [
        f"{name} is not on this machine; its published number of images is used."
        for name in unknown
    ]
    if target.whole < target.chips:
        lines.append(
            f"JAX counts {target.chips // target.whole} devices in each of the {target.whole} "
            'chips: "a chip" above is such a device, but chip-hours are those of whole chips.'
        )
    if target.here:
        lines += published
        if unknown:
            lines.append(
                "The step was measured on random images, so reading real ones is not included."
            )
    else:
        lines.append(
            f"The chips reach {result['utilisation']:.0%} of their bfloat16 peak (--utilisation). "
            "The times do not include startup, compilation, checkpoints or waiting for data."
        )
        if any(row["step_s"] == elsewhere.SHORTEST for row in rows):
            lines.append(
                f"A step takes at least {1e3 * elsewhere.SHORTEST:.0f} ms, because the chips wait "
                "for the program and the images; larger batches cost little more."
            )
        if aa and max(aa["pass_s"].values()) * aa["slots"] < elsewhere.SHORTEST:
            lines.append(
                "AutoAttack's passes are so short that the chips wait for their program: its time "
                "is a lower bound."
            )
        lines += published
        if any("roofline" not in row for row in rows):
            why = ""
            if "TPU" in target.kind and target.chips == 1:
                why = ", because libtpu compiles for at least four chips"
            elif "TPU" in target.kind and not target.compiles:  # else --fast
                why = "; pip install 'jaxrobust[tpu-aot]' installs the compiler"
            elif target.name.partition(":")[0] in gpus.CHIPS and not target.compiles:
                why = (
                    f"; {gpus.SCRIPT} creates an environment that compiles for 1 to {gpus.MOST} "
                    "GPUs"
                )
            lines.append(
                "Memory counts the parameters, their average, the optimizer's state and the "
                "activations that a backward pass needs; a compiled step may need half or twice as "
                f"much. The step was not compiled{why}."
            )
    if aa:
        lines.append(
            f"{robust:.0%} of the images are robust (--robust); each of the others costs "
            f"{attacked.FALLEN:.0%} of APGD-CE, as measured for twelve networks on CIFAR-10."
        )
    return lines


def start_costs(
    config: Config, workdir: Path, target: Target, *, utilisation: float, seconds: float = 3.0
) -> list[dict[str, Any]]:
    """Estimate the runs that a run in `workdir` starts from, nearest first, up to a finished one,
    which costs nothing.
    """
    rows: list[dict[str, Any]] = []
    for start in start_run.chain(config, workdir):
        state = start_run.state(start)
        row: dict[str, Any] = {"run": str(start.folder), "state": state, "training": None}
        if state != start_run.FINISHED:
            options: dict[str, Any] = {"utilisation": utilisation, "seconds": seconds, "images": 0}
            row["training"] = account(start.config, target, **options)["training"]
        rows.append(row)
        if state == start_run.FINISHED:
            break
    return rows


def start_sentence(row: dict[str, Any]) -> str:
    """Describe the cost of a run to start from."""
    if row["training"] is None:
        return f"It starts from {row['run']}, which is finished and costs nothing."
    begun = " but has begun" if row["state"] == start_run.BEGUN else ""
    hours, chips = row["training"]["hours"], row["training"]["chip_hours"]
    return (
        f"It starts from {row['run']}, which is not finished{begun}: that run costs another "
        f"{hours:,.3g} hours and {chips:,.3g} chip-hours, once for all runs that start from it."
    )
