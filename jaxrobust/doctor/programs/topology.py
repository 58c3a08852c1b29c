"""Compile programs for chips that are not here, and read costs from the executables.

The compiler comes from the wheel `libtpu`, or from JAX's CUDA plug-in; nothing is executed.
"""

import contextlib
import importlib.util
import os
import re
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from jaxrobust.doctor.programs import gpus, hlo, hlo_costs

if TYPE_CHECKING:  # imports JAX, which reads the environment that `devices` sets
    from jaxrobust.runtime.devices import hardware

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",  # JAX computes here, so libtpu serves only as a compiler
    "TPU_SKIP_MDS_QUERY": "1",  # there is no metadata server
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # other processes or a stale lock file are harmless
    "TPU_WORKER_HOSTNAMES": "localhost",  # this and the next avoid warnings; any value works
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
}
# Seconds of an executable's arithmetic, memory, cycles, kernels one after another and messages.
SECONDS = ("flops_s", "hbm_s", "cycles_s", "kernels_s", "ici_s", "network_s")
_TOO_LARGE = "the program needs {} of memory on each chip, which has {} available; try {}"
PARTS = ("argument", "output", "temporary", "code")
EXAMPLES = "v5e:4x4, v5e:8x8, v4:2x2x4, v5p:2x2x2, v6e:4x4, v7x:2x2x1, h100:1, h200:8"


def devices(name: str, *, flag: str = "--topology", slices: int = 1) -> list[Any]:
    """Describe the chips of a slice such as "v5e:8x8" or "h100:8", as JAX would see them there.

    Call this before anything imports JAX. `flag` is the flag that named the slice.
    """
    gpu = name.partition(":")[0] in gpus.CHIPS
    try:
        wanted = gpus.target(name) if gpu else _tpu_target(name)
    except ImportError as error:
        raise ImportError(f"{flag} {name} {error}", name=error.name) from error
    except ValueError as error:
        raise ValueError(f"{flag} {name}: {error}") from error
    import jax
    from jax.errors import JaxRuntimeError
    from jax.experimental import topologies
    from jax.experimental.compilation_cache import compilation_cache

    # A compiler without chips cannot read back what it writes to the cache on disk.
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # JAX may have read the setting already
    if gpu:
        gpus.answer_for_cudnn()
    if slices > 1:
        wanted["num_slices"] = slices
    try:
        return topologies.get_topology_desc(**wanted).devices
    except JaxRuntimeError as error:
        reason = str(error).removeprefix("INVALID_ARGUMENT: ").split("\n")[0]
        raise ValueError(f"{flag} {name}: {reason}; give a topology such as {EXAMPLES}") from error


def _tpu_target(name: str) -> dict[str, Any]:
    if not re.match(r"v\d", name):
        raise ValueError(
            f"there is no compiler for such a chip; give a topology such as {EXAMPLES}"
        )
    if importlib.util.find_spec("libtpu") is None:
        raise ImportError("needs the TPU compiler", name="libtpu")
    if "0" in re.split("[:x]", name)[1:]:  # newer compilers divide by zero and crash
        raise ValueError(f"a side has no chips; give a topology such as {EXAMPLES}")
    os.environ.update(ENVIRONMENT)
    options = {"chip_config_name": "megacore"} if name.startswith("v4:") else {}  # as on Cloud TPU
    libtpu_name = f"tpu{name.removeprefix('v')}" if name.startswith("v7x:") else name
    return {"platform": "tpu", "topology_name": libtpu_name, **options}


class Compiled(NamedTuple):
    """A compiled program and its figures, per chip."""

    figures: dict[str, Any]
    module: hlo.Module
    gpu: "hardware.Chip | None" = None  # None: other chips


def compiled(function: Any, *arguments: Any, remedy: str = "a smaller batch") -> Compiled:
    """Compile a jitted function of `jax.ShapeDtypeStruct`s for its chips."""
    import jax
    from jax.errors import JaxRuntimeError

    from jaxrobust.runtime.devices import hardware, sharding, tpus

    start = time.perf_counter()
    shardings = (getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(arguments))
    meshes = (s.mesh for s in shardings if isinstance(s, jax.sharding.NamedSharding))
    mesh: Any = next(meshes, None)  # kernels query the chip that they are traced for
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        lowered = function.lower(*arguments)
    traced = time.perf_counter()
    try:
        executable = tpus.compiled(lowered)
    except JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise ValueError(too_large(str(error), remedy)) from error
    seconds = time.perf_counter() - traced
    module = hlo.parse(executable.as_text())
    figures = {
        "trace_s": traced - start,
        "compile_s": seconds,
        **sizes(executable),
        "flops_loops_once": (executable.cost_analysis() or {}).get("flops"),  # XLA's own count
    }
    first = mesh and mesh.devices.flat[0]
    chip = hardware.chip(first.device_kind) if first else None
    if chip and memory_of(figures) > chip.memory:
        needed, available = (f"{n / 2**30:.2f}G" for n in (memory_of(figures), chip.memory))
        raise ValueError(_TOO_LARGE.format(needed, available, remedy))
    gpu = chip if first and first.platform == "gpu" else None
    slices = 1 if mesh is None else sharding.slices_of(mesh)
    return Compiled(figures | costs(module, gpu, slices), module, gpu)


def sizes(executable: Any) -> dict[str, int]:
    """Read the bytes that an executable takes on each device, by category."""
    memory = executable.memory_analysis()
    return {
        "argument_bytes": memory.argument_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "code_bytes": memory.generated_code_size_in_bytes,
    }


def too_large(error: str, remedy: str) -> str:
    """Condense the compiler's long message about memory to one sentence."""
    sizes = re.findall(r"\b[\d.]+[KMGT]\b", error)
    needed, available = sizes[:2] if len(sizes) > 1 else ("more", "less")
    return _TOO_LARGE.format(needed, available, remedy)


def costs(
    module: hlo.Module, gpu: "hardware.Chip | None" = None, slices: int = 1
) -> dict[str, Any]:
    """Return the costs of one run of a program on a chip.

    A loop of unknown length counts once.
    """
    collectives = hlo.collectives(module._replace(devices=module.devices // slices))
    works = hlo_costs.works(module, gpu)
    on_gpu = {
        "kernels_launched": sum(work.runs for work in works),
        "kernels_s": sum(work.bound_s for work in works),
    }
    return {
        **(on_gpu if gpu else {}),
        "flops_executable": sum(work.flops for work in works),
        "hbm_bytes": sum(work.bytes for work in works),
        "cycles": hlo_costs.cycles(module),
        "kernels": [kernel._asdict() for kernel in hlo_costs.kernels(module)],
        "sent_bytes": sum(c.sent * (c.times or 1) for c in collectives),
        "row_bytes": sum(c.sent * (c.times or 1) for c in collectives if c.row),
        "network_bytes": sum(network_bytes(size, slices) for size in between_slices(module)),
    }


def between_slices(module: hlo.Module) -> list[int]:
    """List the bytes of each sum over slices, in which a chip handles its share of its slice's."""
    times = hlo.runs(module)
    return [
        hlo.size(hlo.elements(i.type)[0]) * (times[i.computation][0] or 1)
        for i in hlo.instructions(module.computations)
        if i.opcode == "send" and "_xla_megascale_transfer_type" in i.attributes
    ]


def network_bytes(size: float, slices: int) -> float:
    """Return the bytes that a chip must send to other slices to sum `size` bytes over all."""
    return 2 * (slices - 1) / slices * size


def roofline(
    figures: dict[str, Any], chip: "hardware.Chip", *, flops: float, images: float
) -> dict[str, Any]:
    """Compute the minimum time of a run from a chip's peaks.

    `flops` are those of the model on one chip in one run, which processes this many `images`.
    """
    # Only the compiler's estimate covers vector units and copies; kernels declare their cycles.
    cycles = figures["cycles"] + sum(k["calls"] * k["cycles"] for k in figures["kernels"])
    seconds = {  # each on its own
        "flops": flops / chip.flops,
        "hbm": figures["hbm_bytes"] / chip.bandwidth,
        **({"cycles": cycles / chip.clock} if chip.clock else {}),
        # Each kernel of a GPU waits for its memory or its products.
        **({"kernels": figures["kernels_s"]} if "kernels_s" in figures else {}),
        # Messages within a row of the slice can use only half of a chip's links.
        "ici": (figures["sent_bytes"] + figures["row_bytes"]) / chip.interconnect,
    }
    if chip.network and (sent := figures.get("network_bytes")):
        seconds["network"] = sent / chip.network
    bound = max(seconds, key=lambda key: seconds[key])
    return {
        **{f"{key}_s": value for key, value in seconds.items()},
        "roofline_step_s": seconds[bound],
        "roofline_images_per_s_per_chip": images / seconds[bound],
        "bound_by": bound,
    }


def memory_of(figures: dict[str, Any]) -> int:
    """Sum the bytes that a program takes on a chip; `figures` are those of `compiled`."""
    return sum(figures[f"{part}_bytes"] for part in PARTS)
