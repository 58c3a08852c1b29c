"""Programs compiled for TPUs that are not here, and what the executables say about themselves.

The compiler is the one inside the wheel `libtpu`; nothing runs.
"""

import contextlib
import importlib.util
import os
import re
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

from jaxrobust.doctor.programs import hlo, hlo_costs, hlo_overlap, hlo_parts

if TYPE_CHECKING:  # it imports JAX, which reads the environment that `devices` sets
    from jaxrobust.runtime.devices import hardware

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",  # where JAX computes: libtpu then is a compiler and nothing else
    "TPU_SKIP_MDS_QUERY": "1",  # there is no metadata server
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # other processes, or a stale lock file, do no harm
    "TPU_WORKER_HOSTNAMES": "localhost",  # these two: no complaints; any host and type will do
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
}
# What an executable's arithmetic, memory, cycles and messages take, each as if it were alone.
SECONDS = ("flops_s", "hbm_s", "cycles_s", "ici_s")
_PARTS = ("argument", "output", "temporary", "code")
EXAMPLES = "v5e:4x4, v5e:8x8, v4:2x2x4, v5p:2x2x2, v6e:4x4, v7x:2x2x1"


def devices(name: str, *, flag: str = "--topology") -> list[Any]:
    """Describe the chips of a slice such as "v5e:8x8", as JAX would see them there.

    Call it before anything imports JAX. `flag` is what people wrote the slice behind.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ImportError(f"{flag} {name} needs the TPU compiler", name="libtpu")
    if "0" in re.split("[:x]", name)[1:]:  # by which newer compilers divide, and end the process
        raise ValueError(f"{flag} {name}: a side has no chips; write one such as {EXAMPLES}")
    os.environ.update(ENVIRONMENT)
    import jax
    from jax.errors import JaxRuntimeError
    from jax.experimental import topologies
    from jax.experimental.compilation_cache import compilation_cache

    # A compiler without chips writes to the cache on disk what it then fails to read.
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # JAX may have looked at the setting already
    own = f"tpu{name.removeprefix('v')}" if name.startswith("v7x:") else name  # as libtpu has it
    options = {"chip_config_name": "megacore"} if name.startswith("v4:") else {}  # as on Cloud TPU
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=own, **options).devices
    except JaxRuntimeError as error:
        reason = str(error).removeprefix("INVALID_ARGUMENT: ").split("\n")[0]
        raise ValueError(f"{flag} {name}: {reason}; write one such as {EXAMPLES}") from error


def compiled(function: Any, *arguments: Any, remedy: str = "a smaller batch") -> dict[str, Any]:
    """Compile a jitted function of `jax.ShapeDtypeStruct`s for its chips; figures per chip."""
    from jax.errors import JaxRuntimeError

    from jaxrobust.runtime.devices import tpus

    start = time.perf_counter()
    with _mesh_of(arguments):  # kernels ask for the chip that they are traced for
        lowered = function.lower(*arguments)
    traced = time.perf_counter()
    try:
        executable = tpus.compiled(lowered)
    except JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise ValueError(too_large(str(error), remedy)) from error
    seconds = time.perf_counter() - traced
    figures = {
        "trace_s": traced - start,
        "compile_s": seconds,
        **sizes(executable),
        "flops_loops_once": executable.cost_analysis()["flops"],  # XLA's own count
    }
    return figures | read(executable.as_text())


def _mesh_of(arguments: Any) -> Any:
    import jax

    shardings = (getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(arguments))
    meshes = (s.mesh for s in shardings if isinstance(s, jax.sharding.NamedSharding))
    mesh: Any = next(meshes, None)
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def sizes(executable: Any) -> dict[str, int]:
    """Read the bytes that an executable takes on each device, by what they hold."""
    memory = executable.memory_analysis()
    return {
        "argument_bytes": memory.argument_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "code_bytes": memory.generated_code_size_in_bytes,
    }


def too_large(error: str, remedy: str) -> str:
    """Shorten the compiler's pages about memory to one sentence."""
    sizes = re.findall(r"\b[\d.]+[KMGT]\b", error)
    needed, there = sizes[:2] if len(sizes) > 1 else ("more", "less")
    return (
        f"the program needs {needed} of memory on each chip, which has {there} for it; try {remedy}"
    )


def read(text: str) -> dict[str, Any]:
    """Read the costs in the text of an executable: per chip, and per run of the program."""
    module = hlo.parse(text)
    collectives = hlo.collectives(module)
    kinds: dict[tuple[str, bool], list[hlo.Collective]] = {}
    for collective in collectives:
        kinds.setdefault((collective.kind, collective.inside), []).append(collective)
    # What a loop of unknown length repeats counts once in bytes, and as repeated.
    gathers: Counter[str] = Counter()
    for collective in collectives:
        for name in collective.parameters:
            gathers[name] += 2 if collective.times is None else collective.times
    return {
        "instructions": sum(1 for _ in hlo.instructions(module.computations)),
        "flops_executable": hlo_costs.flops(module),
        "hbm_bytes": hlo_costs.traffic(module),
        "cycles": hlo_costs.cycles(module),
        "kernels": [kernel._asdict() for kernel in hlo_costs.kernels(module)],
        **hlo_parts.figures(module),
        "sent_bytes": sum(c.sent * (c.times or 1) for c in collectives),
        "row_bytes": sum(c.sent * (c.times or 1) for c in collectives if c.row),
        "in_flight": [each._asdict() for each in hlo_overlap.in_flight(module)],
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
    parts: bool = False,
) -> dict[str, Any]:
    """Print figures of `compiled` for people; return memory in all, and the roofline.

    `flops` are those of the model on one chip in one run, which takes so many `images`; `parts`
    adds the tables of `hlo_parts`.
    """
    memory = memory_of(figures)
    gib = ", ".join(f"{figures[f'{part}_bytes'] / 2**30:.2f} {part}" for part in _PARTS)
    print(
        f"  traced in {figures['trace_s']:.1f} s, compiled in {figures['compile_s']:.1f} s; "
        f"{figures['instructions']:,} instructions"
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
    for line in hlo_parts.lines(figures) if parts else ():
        print(f"  {line}")
    usage = {"memory_bytes": memory, "chip_memory_bytes": chip and chip.memory}
    if chip is None:
        return usage
    bounds = roofline(figures, chip, flops=flops, images=images)
    seconds = {key.removesuffix("_s"): bounds[key] for key in SECONDS if key in bounds}
    for kernel in figures["kernels"]:
        print(
            f"  kernel {kernel['name']}: {kernel['calls']} calls of {kernel['cycles']:,} cycles, "
            f"{kernel['bytes'] / 1e6:,.1f} MB, {kernel['flops'] / 1e9:,.1f} GFLOP, as its file says"
        )
    if "hidden_share" in bounds:
        sent, beside = figures["sent_bytes"], sum(each["sent"] for each in figures["in_flight"])
        print(
            f"  {sent / 1e6:,.1f} MB sent by a chip, {beside / 1e6:,.1f} MB of that beside other "
            f"work, {bounds['hidden_share']:.0%} hidden behind it"
        )
    print(
        f"  roofline, not measured: {1e3 * bounds['roofline_step_s']:.1f} ms per step, "
        f"{bounds['roofline_images_per_s_per_chip']:.0f} images/s per chip, bound by "
        f"{bounds['bound_by']} "
        f"({', '.join(f'{key} {1e3 * value:.1f} ms' for key, value in seconds.items())})"
    )
    return usage | bounds


def roofline(
    figures: dict[str, Any], chip: "hardware.Chip", *, flops: float, images: float
) -> dict[str, Any]:
    """Compute the time of a run that a chip's peaks allow; arguments as in `show`."""
    # The compiler's own, which alone know vector units and copies, and what kernels declare.
    cycles = figures["cycles"] + sum(k["calls"] * k["cycles"] for k in figures["kernels"])
    seconds = {  # each as if it were alone
        "flops": flops / chip.flops,
        "hbm": figures["hbm_bytes"] / chip.bandwidth,
        **({"cycles": cycles / chip.clock} if chip.clock else {}),
        # What stays in a row of the slice has half of a chip's links.
        "ici": (figures["sent_bytes"] + figures["row_bytes"]) / chip.interconnect,
    }
    bound = max(seconds, key=lambda key: seconds[key])
    return {
        **{f"{key}_s": value for key, value in seconds.items()},
        "roofline_step_s": seconds[bound],
        "roofline_images_per_s_per_chip": images / seconds[bound],
        "bound_by": bound,
        **_hidden(figures, chip),
    }


def _hidden(figures: dict[str, Any], chip: "hardware.Chip") -> dict[str, float]:
    """Compute how much of what a chip sends is hidden behind other work; {} if nothing is sent."""
    if not figures["sent_bytes"] or not chip.clock:
        return {}
    under_way = [hlo_overlap.InFlight(**each) for each in figures["in_flight"]]
    bytes_ = hlo_overlap.hidden(under_way, clock=chip.clock, interconnect=chip.interconnect)
    return {"hidden_bytes": bytes_, "hidden_share": bytes_ / figures["sent_bytes"]}


def memory_of(figures: dict[str, Any]) -> int:
    """Add up the bytes of a chip that a program takes; `figures` are those of `compiled`."""
    return sum(figures[f"{part}_bytes"] for part in _PARTS)
