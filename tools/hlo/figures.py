"""Figures of the benchmarks for a program that is compiled for absent chips."""

import os
import tempfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

from jaxrobust.doctor.programs import hlo, topology
from tools.hlo import bundles, overlap, parts, ptx

if TYPE_CHECKING:  # it imports JAX, which reads the environment from `topology.devices`
    from jaxrobust.runtime.devices import hardware


def compiled(
    function: Any,
    *arguments: Any,
    remedy: str = "a smaller batch",
    schedules: Path | None = None,
) -> dict[str, Any]:
    """Compile a jitted function of `jax.ShapeDtypeStruct`s for its chips; figures per chip.

    `schedules` is the folder of `bundles.flags`, of which the figures then have the heaviest works.
    """
    with tempfile.TemporaryDirectory() as folder:
        with mock.patch.dict(os.environ, MOSAIC_GPU_DUMP_TO=folder):
            program = topology.compiled(function, *arguments, remedy=remedy)
        in_ptx = [kernel._asdict() for kernel in ptx.kernels(Path(folder))]
    figures = program.figures | read(program.module, program.gpu) | {"ptx": in_ptx}
    if schedules:
        figures |= bundles.read(program.module, schedules)
    return figures


def read(module: hlo.Module, gpu: "hardware.Chip | None" = None) -> dict[str, Any]:
    """Read costs by part of a step, and collectives by kind, per chip and program run."""
    collectives = hlo.collectives(module)
    kinds: dict[tuple[str, bool], list[hlo.Collective]] = {}
    for collective in collectives:
        kinds.setdefault((collective.kind, collective.inside), []).append(collective)
    # The body of a loop of unknown length counts once in bytes, and as repeated.
    gathers: Counter[str] = Counter()
    for collective in collectives:
        for name in collective.parameters:
            gathers[name] += 2 if collective.times is None else collective.times
    return {
        "instructions": sum(1 for _ in hlo.instructions(module.computations)),
        **parts.figures(module, gpu),
        "in_flight": [each._asdict() for each in overlap.in_flight(module, gpu)],
        "collectives": [
            {
                "kind": kind,
                "in_attack_loop": inside,
                "count": len(group),
                "arrays": sum(c.arrays for c in group),
                "bytes": sum(c.bytes * (c.times or 1) for c in group),
            }
            for (kind, inside), group in sorted(kinds.items())
        ],
        "collectives_in_attack_loop": sum(c.inside for c in collectives),
        "parameters_gathered": len(gathers),
        "parameters_gathered_more_than_once": sorted(p for p, n in gathers.items() if n > 1),
    }


def show(
    figures: dict[str, Any],
    chip: "hardware.Chip | None",
    *,
    flops: float,
    images: float,
    by_part: bool = False,
) -> dict[str, Any]:
    """Print figures of `compiled`; return the total memory and the roofline.

    `flops` are the model's, for one chip and one run over this many `images`; `by_part` adds the
    tables of `parts`.
    """
    memory = topology.memory_of(figures)
    gib = ", ".join(f"{figures[f'{part}_bytes'] / 2**30:.2f} {part}" for part in topology.PARTS)
    launched = figures.get("kernels_launched")
    print(
        f"  traced in {figures['trace_s']:.1f} s, compiled in {figures['compile_s']:.1f} s; "
        f"{figures['instructions']:,} instructions"
        + (f", {launched:,} kernels launched" if launched else "")
    )
    of = f" of {chip.memory / 2**30:.0f}" if chip else ""
    print(f"  memory per chip: {memory / 2**30:.2f}{of} GiB ({gib})")
    for c in figures["collectives"]:
        what = f"{c['count']} {c['kind']} of {c['arrays']} arrays, {c['bytes'] / 1e6:,.1f} MB"
        print(f"  {what}{', IN THE ATTACK LOOP' * c['in_attack_loop']}")
    print(f"  collectives in the attack loop: {figures['collectives_in_attack_loop']}")
    if again := figures["parameters_gathered_more_than_once"]:
        print(f"  GATHERED MORE THAN ONCE: {', '.join(again[:5])}{', ...' * (len(again) > 5)}")
    executable = figures["flops_executable"]
    print(
        f"  {flops / 1e12:.3f} TFLOP per chip and step of the model, {executable / flops:.2f} of "
        "that in the executable"
    )
    for line in parts.lines(figures) if by_part else ():
        print(f"  {line}")
    usage = {"memory_bytes": memory, "chip_memory_bytes": chip and chip.memory}
    if chip and "schedules" in figures:
        usage |= bundles.total(figures, chip, flops)
        for line in bundles.lines(figures["schedules"], usage):
            print(f"  {line}")
    if chip is None:
        return usage
    bounds = topology.roofline(figures, chip, flops=flops, images=images)
    bounds |= hidden(figures, chip)
    seconds = {key.removesuffix("_s"): bounds[key] for key in topology.SECONDS if key in bounds}
    for kernel in figures["kernels"]:
        cycles = f" of {kernel['cycles']:,} cycles" * bool(kernel["cycles"])
        print(
            f"  kernel {kernel['name']}: {kernel['calls']} calls{cycles}, "
            f"{kernel['bytes'] / 1e6:,.1f} MB, {kernel['flops'] / 1e9:,.1f} GFLOP, as its file says"
        )
    for kernel in figures.get("ptx", ()):
        print(
            f"  {kernel['name']} in its PTX: {kernel['copied'] / 1e6:,.1f} MB copied, of these "
            f"{kernel['distinct'] / 1e6:,.1f} MB from memory, {kernel['flops'] / 1e9:,.1f} GFLOP, "
            f"{kernel['registers']} registers, {kernel['spilled']} bytes spilled"
        )
    if "hidden_share" in bounds:
        sent, beside = figures["sent_bytes"], sum(each["sent"] for each in figures["in_flight"])
        print(
            f"  {sent / 1e6:,.1f} MB sent by a chip, {beside / 1e6:,.1f} MB of that during other "
            f"work, {bounds['hidden_share']:.0%} hidden behind it"
        )
    print(
        f"  roofline, not measured: {1e3 * bounds['roofline_step_s']:.1f} ms per step, "
        f"{bounds['roofline_images_per_s_per_chip']:.0f} images/s per chip, bound by "
        f"{bounds['bound_by']} "
        f"({', '.join(f'{key} {1e3 * value:.1f} ms' for key, value in seconds.items())})"
    )
    return usage | bounds


def hidden(figures: dict[str, Any], chip: "hardware.Chip") -> dict[str, float]:
    """Compute how much of a chip's traffic is hidden behind other work; {} without traffic."""
    clock = 1.0 if "kernels_s" in figures else chip.clock  # a GPU's work is in seconds
    if not figures["sent_bytes"] or not clock:
        return {}
    in_flight = [overlap.InFlight(**each) for each in figures["in_flight"]]
    bytes_ = overlap.hidden(in_flight, clock=clock, interconnect=chip.interconnect)
    return {"hidden_bytes": bytes_, "hidden_share": bytes_ / figures["sent_bytes"]}
