"""TPU compiler options for collectives: a table, and which of them this compiler accepts.

By default, libtpu 0.0.42 overlaps no collective of a training step with other work. It sums all
gradients together once the last one is ready.
"""

import functools
import os
import re
import time
from typing import Any

import jax
from jax.errors import JaxRuntimeError
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxrobust.runtime.devices import compilation

OPTIONS: dict[str, str | bool] = {
    # Sums overlap one by one with the matrix product that computes the next gradient.
    "xla_enable_async_all_reduce": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_reduce": "true",
    # They also overlap with element-wise work: gradients from our own kernels come with no
    # compiler-made product to overlap with.
    "xla_tpu_enable_async_collective_fusion_fuse_kloop_fusions": "true",
    "xla_lhs_loop_fusion_latency_multiplier": "2",  # of 1 to 3, the value that hides most
    "xla_enable_async_reduce_scatter_fusion": "true",  # for sums of which each chip keeps a part
    "xla_jf_crs_combiner_threshold_count": "1",
    # On 256 chips, gathers otherwise become sums of zeros, which send twice as much.
    "xla_tpu_prefer_async_allgather_to_allreduce": "true",
}
# A sum that overlaps with other work needs fast memory, which some programs lack.
SPARING = {
    "xla_tpu_enable_async_collective_fusion_fuse_all_reduce": "false",
    "xla_tpu_enable_async_collective_fusion_fuse_kloop_fusions": "false",
}


def step_options(mesh: Mesh) -> dict[str, str | bool] | None:
    """Return compiler options for a training step on a mesh of TPUs; None: libtpu's defaults.

    Options named in $LIBTPU_INIT_ARGS are left as they are there.
    """
    chip = mesh.devices.flat[0]
    if chip.platform != "tpu" or mesh.size == 1:
        return None
    chosen = re.findall(r"--(\w+)", os.environ.get("LIBTPU_INIT_ARGS", ""))
    local = jax.process_index()
    chip = next((c for c in mesh.devices.flat if c.process_index == local), chip)
    return {name: OPTIONS[name] for name in _known(chip) if name not in chosen} or None


def compiled(lowered: Any) -> Any:
    """Compile a program; retry with less overlap if fast memory runs out."""
    try:
        return lowered.compile()
    except JaxRuntimeError as error:
        if "ScopedVmemOom" not in str(error):
            raise
    return lowered.compile(compiler_options=SPARING)


def compile_timed(function: Any, *arguments: Any) -> tuple[Any, float, bool]:
    """Return (executable, seconds, cache hit) of a jitted function for these arguments."""
    start = time.perf_counter()
    with compilation.cache_hits() as hits:
        executable = compiled(function.lower(*arguments))
    return executable, time.perf_counter() - start, bool(hits)


@functools.cache
def _known(chip: jax.Device) -> tuple[str, ...]:
    """List the options that a chip's compiler accepts; later versions may have dropped some."""
    if _takes(chip, OPTIONS):
        return tuple(OPTIONS)
    return tuple(name for name in OPTIONS if _takes(chip, {name: OPTIONS[name]}))


def _takes(chip: jax.Device, options: dict[str, Any]) -> bool:
    place = NamedSharding(Mesh([chip], "chip"), PartitionSpec())
    number = jax.ShapeDtypeStruct((), "float32", sharding=place)
    try:
        jax.jit(lambda x: x).lower(number).compile(compiler_options=options)
    except JaxRuntimeError as error:
        if "No such compile option" in str(error):
            return False
        raise
    return True
