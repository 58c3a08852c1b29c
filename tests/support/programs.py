"""Costs of a program for a chip, written by hand."""

from jaxrobust.runtime.devices.hardware import Chip

CHIP = Chip(flops=1e12, memory=16 * 2**30, bandwidth=1e11, interconnect=1e10, clock=1e9)
COSTS = {
    "trace_s": 1.25,
    "compile_s": 12.5,
    "argument_bytes": 2**30,
    "output_bytes": 2**29,
    "temporary_bytes": 2**31,
    "code_bytes": 2**20,
    "flops_executable": 3e9,
    "hbm_bytes": 1e9,
    "cycles": 1_000_000,
    "kernels": [{"name": "k", "calls": 3, "cycles": 2_000_000, "bytes": 5e6, "flops": 7e9}],
    "sent_bytes": 4e7,
    "row_bytes": 1e7,
}
