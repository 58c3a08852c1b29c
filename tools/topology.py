"""Programs compiled for TPUs that are not here, and what the executables say about themselves.

The compiler is the one inside the wheel `libtpu`; nothing runs. Import this before JAX.
"""

import importlib.util
import json
import os
import re
import time
from collections import Counter
from typing import Any

# JAX computes on CPU; libtpu looks for no metadata server and shares itself with other processes.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TPU_SKIP_MDS_QUERY"] = "1"
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"

from jaxrobust import hardware
from tools import hlo, hlo_costs

EXAMPLES = "v5e:4x4, v5e:8x8, v4:2x2x4, v5p:2x2x2, v6e:4x4"


def devices(name: str) -> list[Any]:
    """The chips of a slice such as "v5e:8x8": of each version, as many as JAX sees there.

    Raises:
      ImportError: no libtpu.
      ValueError: no such slice.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ImportError(f"--topology {name} needs the TPU compiler; pip install -e '.[tpu-aot]'")
    from jax.errors import JaxRuntimeError
    from jax.experimental import topologies

    options = {"chip_config_name": "megacore"} if name.startswith("v4:") else {}  # as on Cloud TPU
    try:
        return topologies.get_topology_desc(
            platform="tpu", topology_name=name, **options
        ).devices
    except JaxRuntimeError as error:
        reason = str(error).removeprefix("INVALID_ARGUMENT: ").split("\n")[0]
        raise ValueError(f"--topology {name}: {reason}; write one such as {EXAMPLES}") from error


class DoesNotFitError(ValueError):
    """The program needs more memory than a chip has."""


def compiled(function: Any, *arguments: Any, remedy: str = "a smaller batch") -> dict[str, Any]:
    """Compiles a jitted function for the devices of its shardings; its figures, per chip.

    Args:
      function: whose shardings, or those of its arguments, are of `devices`.
      arguments: `jax.ShapeDtypeStruct`s.
      remedy: what makes it smaller.
    Raises:
      DoesNotFitError: with the bytes.
    """
    from jax.errors import JaxRuntimeError

    start = time.perf_counter()
    lowered = function.lower(*arguments)
    traced = time.perf_counter()
    try:
        executable = lowered.compile()
    except JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise DoesNotFitError(_too_large(str(error), remedy)) from error
    seconds = time.perf_counter() - traced
    memory, cost = executable.memory_analysis(), executable.cost_analysis()
    figures = {
        "trace_s": traced - start,
        "compile_s": seconds,
        "argument_bytes": memory.argument_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "code_bytes": memory.generated_code_size_in_bytes,
        "flops_loops_once": cost["flops"],  # XLA's own count
    }
    return figures | read(executable.as_text())


def _too_large(error: str, remedy: str) -> str:
    """One sentence out of the compiler's pages."""
    found = re.search(r"([\d.]+[KMGT]) of ([\d.]+[KMGT]) hbm|\(([\d.]+[KMGT])\).*?\(([\d.]+[KMGT])\)", error)
    needed, there = [part for part in found.groups() if part] if found else ("more", "the chip's")
    return f"the program needs {needed} of memory on each chip, which has {there}; try {remedy}"


def read(text: str) -> dict[str, Any]:
    """What the text of an executable says."""
    module = hlo.parse(text)
    found = hlo.collectives(module)
    kinds: dict[tuple[str, bool], list[hlo.Collective]] = {}
    for collective in found:
        kinds.setdefault((collective.kind, collective.inside), []).append(collective)
    # What a loop of unknown length repeats, it repeats at least once.
    gathers = Counter(
        name for c in found for name in c.parameters for _ in range(2 if c.times is None else c.times)
    )
    return {
        "instructions": sum(1 for _ in hlo.instructions(module.computations)),
        "flops": hlo_costs.flops(module),
        "hbm_bytes": hlo_costs.traffic(module),
        "sent_bytes": _total(c.sent for c in found)
    }
