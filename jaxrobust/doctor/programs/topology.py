"""Compile programs for TPUs that are not here, and read costs from the executables.

The compiler comes from the wheel `libtpu`; nothing is executed.
"""

import contextlib
import importlib.util
import os
import re
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from jaxrobust.doctor.programs import hlo, hlo_costs

if TYPE_CHECKING:  # imports JAX, which reads the environment that `devices` sets
    from jaxrobust.runtime.devices import hardware

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",  # JAX computes here, so libtpu serves only as a compiler
    "TPU_SKIP_MDS_QUERY": "1",  # there is no metadata server
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # other processes or a stale lock file are harmless
    "TPU_WORKER_HOSTNAMES": "localhost",  # this and the next avoid warnings; any value works
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
}
# Seconds of an executable's arithmetic, memory, cycles and messages, each on its own.
SECONDS = ("flops_s", "hbm_s", "cycles_s", "ici_s")
PARTS = ("argument", "output", "temporary", "code")
EXAMPLES = "v5e:4x4, v5e:8x8, v4:2x2x4, v5p:2x2x2, v6e:4x4, v7x:2x2x1"


def devices(name: str, *, flag: str = "--topology") -> list[Any]:
    """Describe the chips of a slice such as "v5e:8x8", as JAX would see them there.

    Call this before anything imports JAX. `flag` is the flag that named the slice.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ImportError(f"{flag} {name} needs the TPU compiler", name="libtpu")
    if "0" in re.split("[:x]", name)[1:]:  # newer compilers divide by zero and crash
        raise ValueError(f"{flag} {name}: a side has no chips; write one such as {EXAMPLES}")
    os.environ.update(ENVIRONMENT)
    import jax
    from jax.errors import JaxRuntimeError
    from jax.experimental import topologies
    from jax.experimental.compilation_cache import compilation_cache

    # A compiler without chips cannot read back what it writes to the cache on disk.
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # JAX may have read the setting already
    slice_name = (
        f"tpu{name.removeprefix('v')}" if name.startswith("v7x:") else name
    )  # libtpu's name
    options = {"chip_config_name": "megacore"} if name.startswith("v4:") else {}  # as on Cloud TPU
    try:
        return topologies.get_topology_desc(
            platform="tpu", topology_name=slice_name, **options
        ).devices
    except JaxRuntimeError as error:
        reason = str(error).removeprefix("INVALID_ARGUMENT: ").split("\n")[0]
        raise ValueError(f"{flag} {name}: {reason}; write one such as {EXAMPLES}") from error


class Compiled(NamedTuple):
    """A compiled program and its figures, per chip."""

    figures: dict[str, Any]
    module: hlo.Module


def compiled(function: Any, *arguments: Any, remedy: str = "a smaller batch") -> Compiled:
    """Compile a jitted function of `jax.ShapeDtypeStruct`s for its chips."""
    import jax
    from jax.errors import JaxRuntimeError

    from jaxrobust.runtime.devices import tpus

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
        "flops_loops_once": executable.cost_analysis()["flops"],  # XLA's own count
    }
    return Compiled(figures | costs(module), module)


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
    needed, there = sizes[:2] if len(sizes) > 1 else ("more", "less")
    return (
        f"the program needs {needed} of memory on each chip, which has {there} for it; try {remedy}"
    )


def costs(module: hlo.Module) -> dict[str, Any]:
    """Return the costs of one run of a program on a chip.

    A loop of unknown length counts once.
    """
    collectives = hlo.collectives(module)
    return {
        "flops_executable": hlo_costs.flops(module),
        "hbm_bytes": hlo_costs.traffic(module),
        "cycles": hlo_costs.cycles(module),
        "kernels": [kernel._asdict() for kernel in hlo_costs.kernels(module)],
        "sent_bytes": sum(c.sent * (c.times or 1) for c in collectives),
        "row_bytes": sum(c.sent * (c.times or 1) for c in collectives if c.row),
    }


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
        # Messages within a row of the slice can use only half of a chip's links.
        "ici": (figures["sent_bytes"] + figures["row_bytes"]) / chip.interconnect,
    }
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
