"""Whether an accelerator of this machine is idle, as JAX has no plug-in for it."""

import os
from pathlib import Path

import jax

# The files of a driver (the second for WSL), and the extra with JAX's plug-in for it.
_DRIVERS = (
    ("an NVIDIA GPU", "cuda", ("dev/nvidia[0-9]*", "usr/lib/wsl/lib/libcuda.so*")),
    ("a TPU", "tpu", ("dev/accel[0-9]*", "dev/vfio/[0-9]*")),
)
_GOOGLE = "0x1ae0"  # PCI vendor id; vfio alone may belong to any device


def accelerator(root: Path = Path("/")) -> str | None:
    """Warn about an accelerator that seems present but that JAX does not use; None: all is well."""
    if jax.default_backend() != "cpu" or os.environ.get("JAX_PLATFORMS"):
        return None
    vendors = {file.read_text().strip() for file in root.glob("sys/bus/pci/devices/*/vendor")}
    for name, extra, patterns in _DRIVERS:
        present = any(any(root.glob(pattern)) for pattern in patterns)
        if present and (extra != "tpu" or _GOOGLE in vendors):
            return (
                f"this machine seems to have {name}, but JAX lacks its plug-in and uses the CPU: "
                f"pip install -U 'jaxrobust[{extra}]', or set JAX_PLATFORMS=cpu to use the CPU"
            )
    return None
