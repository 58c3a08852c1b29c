"""Programs compiled for TPUs that are not here, and what the executables say about themselves.

The compiler is the one inside the wheel `libtpu`; nothing runs.
"""

import contextlib
import importlib.util
import os
import re
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from jaxrobust.doctor.programs import hlo, hlo_costs

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
PARTS = ("argument", "output", "temporary", "code")
EXAMPLES = "v5e:4x4, v5e:8x8, v4:2x2x4, v5p:2x2x2, v6e:4x4, v7x:2x2x1"


def devices(name: str, *, flag: str = "--topology") -> list[Any]:
    """Describe the chips of a slice such as "v5e:8x8", as JAX would see them there.

    Call it before anything imports JAX. `flag` is the flag that named the slice.
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
    slice_name = (
        f"tpu{name.removeprefix('v')}" if name.startswith("v7x:") else name
    )  # as libtpu has it
    options = {"chip_config_name": "megacore"} if name.startswith("v4:") else {}  # as on Cloud TPU
    try:
        return topologies.get_topology_desc(
            platform="tpu", topology_name=slice_name, **options
        ).devices
    except JaxRuntimeError as error:
        reason = str(error).removeprefix("INVALID_ARGUMENT: ").split("\n")[0]
        raise ValueError(f"{flag} {name}: {reason}; write one such as {EXAMPLES}") from error


class Compiled(NamedTuple):
    """What a compiled program says about itself; figures are per chip."""

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
    mesh: Any = next(meshes, None)  # kernels ask for the chip that they are traced for
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


def costs(module: hlo.Module) -> dict[str, Any]:
    """Read what one run of a program costs on a chip.

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
    """Compute the time of a run that a chip's peaks allow.

    `flops` are those of the model on one chip in one run, which takes that many `images`.
    """
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
    }


def memory_of(figures: dict[str, Any]) -> int:
    """Add up the bytes of a chip that a program takes; `figures` are those of `compiled`."""
    return sum(figures[f"{part}_bytes"] for part in PARTS)
