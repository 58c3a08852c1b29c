"""Test setup, before JAX starts: 8 devices, strict types and ranks.

Here and not in conftest.py, so that `python -m unittest discover -t . tests` has it too.
"""

import os
import sys
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    # With AMX AutoAttack would search in bfloat16, and golden verdicts are those of float32.
    + " --xla_cpu_max_isa=AVX512"
    * any("amx_bf16" in file.read_text() for file in Path("/proc").glob("cpuinfo"))
    + " --xla_force_host_platform_device_count=8"
)


def start_jax() -> None:
    """Import JAX, and let it refuse mixed types and ranks."""
    import jax
    from absl import flags

    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    flags.FLAGS.mark_as_parsed()  # absltest's temporary folders are flags; pytest parses none


if "pytest" not in sys.modules:  # which calls it only in the processes that run tests
    start_jax()
