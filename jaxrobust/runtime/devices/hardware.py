"""Peak performance of accelerators, by the names that JAX uses: peaks, not measurements."""

from typing import NamedTuple

_GIB = 2**30


class Chip(NamedTuple):
    """Peaks of a JAX device: a chip, except for TPU v2, v3 and 7x (half a chip).

    `flops` is dense bfloat16 per second. `interconnect` counts one direction over all links to
    other chips: a TPU's inter-chip links, a GPU's NVLink (half of NVIDIA's figure, which sums both
    directions) or, without NVLink, PCIe.
    """

    flops: float  # FLOP/s
    memory: int  # bytes of HBM
    bandwidth: float  # bytes/s of HBM
    interconnect: float  # bytes/s
    clock: float | None = None  # cycles/s of a TPU's units
    network: float | None = None  # bytes/s to other slices, one direction; None: unknown


# TPUs: cloud.google.com/tpu/docs, the "System architecture" page of each version (links in Gbit/s
# there; v2, v3 and 7x per chip, halved here; 7x has twice as many FLOP/s in fp8, which is not used
# here). Clocks: arXiv 2304.01433, table 4; for v5e, v5p and v6e, peak FLOP/s divided by the
# multiply-adds of their matrix units per cycle. `network`: "Data center network (DCN) bandwidth per
# chip" on Compute Engine's page "TPU machines" (v5p, v6e and 7x, halved here), and for v5e the
# 6.4 Tbit/s of a pod of 256 chips on its page; for v4, no figure was found. GPUs: NVIDIA's data
# sheets, whose figures "with sparsity" are halved here.
_CHIPS = {
    "TPU v2": Chip(23e12, 8 * _GIB, 350e9, 124e9, 0.7e9),
    "TPU v3": Chip(61.5e12, 16 * _GIB, 450e9, 164e9, 0.94e9),
    "TPU v4": Chip(275e12, 32 * _GIB, 1228e9, 300e9, 1.05e9),
    "TPU v5 lite": Chip(197e12, 16 * _GIB, 819e9, 200e9, 1.5e9, 3.125e9),
    "TPU v5e": Chip(197e12, 16 * _GIB, 819e9, 200e9, 1.5e9, 3.125e9),
    "TPU v5": Chip(459e12, 95 * _GIB, 2765e9, 600e9, 1.75e9, 6.25e9),
    "TPU v5p": Chip(459e12, 95 * _GIB, 2765e9, 600e9, 1.75e9, 6.25e9),
    "TPU v6 lite": Chip(918e12, 32 * _GIB, 1640e9, 448e9, 1.75e9, 12.5e9),
    "TPU v6e": Chip(918e12, 32 * _GIB, 1640e9, 448e9, 1.75e9, 12.5e9),
    "TPU7x": Chip(1153.5e12, 96 * _GIB, 3690e9, 300e9, network=6.25e9),
    "NVIDIA A100-SXM4-40GB": Chip(312e12, 40 * _GIB, 1555e9, 300e9),
    "NVIDIA A100-SXM4-80GB": Chip(312e12, 80 * _GIB, 2039e9, 300e9),
    "NVIDIA A100-PCIE-40GB": Chip(312e12, 40 * _GIB, 1555e9, 300e9),
    "NVIDIA A100 80GB PCIe": Chip(312e12, 80 * _GIB, 1935e9, 300e9),
    "NVIDIA A10": Chip(125e12, 24 * _GIB, 600e9, 32e9),
    "NVIDIA A10G": Chip(70e12, 24 * _GIB, 600e9, 32e9),
    "NVIDIA L4": Chip(121e12, 24 * _GIB, 300e9, 32e9),
    "NVIDIA L40S": Chip(362e12, 48 * _GIB, 864e9, 32e9),
    "NVIDIA H100 80GB HBM3": Chip(989e12, 80 * _GIB, 3350e9, 450e9),
    "NVIDIA H100 SXM": Chip(989e12, 80 * _GIB, 3350e9, 450e9),
    "NVIDIA H100 PCIe": Chip(756e12, 80 * _GIB, 2000e9, 300e9),
    "NVIDIA H100 NVL": Chip(835e12, 94 * _GIB, 3900e9, 300e9),
    "NVIDIA H200": Chip(989e12, 141 * 10**9, 4800e9, 450e9),
    "NVIDIA H200 NVL": Chip(835e12, 141 * 10**9, 4800e9, 450e9),
    "NVIDIA GH200": Chip(989e12, 96 * 10**9, 4000e9, 450e9),
    "NVIDIA B200": Chip(2250e12, 180 * 10**9, 7700e9, 900e9),
}


def chip(device_kind: str) -> Chip | None:
    """Find the chip with the longest full name that `device_kind` starts with; None if unknown."""
    kind = device_kind.strip().lower() + " "
    if " mig " in kind:  # a slice of a GPU, under the full GPU's name
        return None
    names = [
        name for name in _CHIPS if kind.startswith(name.lower()) and not kind[len(name)].isalnum()
    ]
    return _CHIPS[max(names, key=len)] if names else None
