"""GPUs that are not here, as XLA's CUDA plug-in has to see them to compile for them.

Without a GPU, XLA measures no tiles of matrix products and no algorithms of cuDNN.
"""

import importlib.util
import os
import re
from typing import Any

SCRIPT = "tools/gpu/make_environment.py"
_PLUGIN = "jax_cuda12_plugin"
_FLAG = "--xla_gpu_autotune_level=0"  # measuring needs a GPU
MOST = 8  # GPUs that NVLink connects in one machine
# JAX's name, bytes/s and bytes of memory, as the driver reports them. Both have the core below.
CHIPS = {
    "h100": ("NVIDIA H100 80GB HBM3", 3352320000000, 84929347584),
    "h200": ("NVIDIA H200", 4800000000000, 151397597184),
}
_TARGET = """gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448 registers_per_core_limit: 65536
  registers_per_block_limit: 65536 core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  l2_cache_size: 52428800 cuda_compute_capability {{ major: 9 }}
  memory_bandwidth: {1} device_memory_size: {2}
}}
platform_name: "CUDA" runtime_version {{ major: 12 minor: 9 }}
dnn_version_info {{ major: 9 minor: 10 }} device_description_str: "{0}"
"""


def available() -> bool:
    """Tell whether XLA's compiler for NVIDIA GPUs is installed."""
    return importlib.util.find_spec(_PLUGIN) is not None


def target(name: str) -> dict[str, Any]:
    """Return the arguments of `topologies.get_topology_desc` for GPUs such as "h100:8"."""
    kind, _, number = name.partition(":")
    if not re.fullmatch(r"[1-9]\d*", number) or int(number) > MOST:
        raise ValueError(f"request 1 to {MOST} GPUs, such as {kind}:1 or {kind}:{MOST}")
    if not available():
        raise ImportError(
            f"needs the GPU compiler; run python3.13 {SCRIPT} FOLDER in a checkout, then this "
            "command with FOLDER/bin/python",
            name=_PLUGIN,
        )
    os.environ["JAX_PLATFORMS"] = "cpu"  # where JAX computes; the plug-in only compiles
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # XLA warns before it makes a program fit
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} {_FLAG}".strip() if _FLAG not in flags else flags
    about = {"topology": f"1x1x{number}", "target_config": target_config(kind)}
    return {"platform": "cuda", "topology_name": name, **about}


def target_config(kind: str) -> str:
    """Write what XLA reads about a GPU, a `stream_executor.GpuTargetConfigProto`."""
    return _TARGET.format(*CHIPS[kind])


def answer_for_cudnn() -> None:
    """Let this process trace cuDNN's attention, whose checks otherwise ask a GPU."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    from jaxrobust.models.kernels.cuda import fused_attention

    for module, check, answer in (
        (cudnn, "check_cudnn_version", lambda: 91000),
        (cudnn, "check_compute_capability", lambda capability: True),
        (fused_attention, "_on_nvidia", lambda: True),
    ):
        setattr(module, check, answer)
