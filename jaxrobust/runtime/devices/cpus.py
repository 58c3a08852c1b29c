"""Compiler options by CPU: a table, and the row for this machine."""

import functools
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

# YNNPACK, which XLA uses for matrix products on CPU, packs the weights again at each use: steps of
# AutoAttack on a PreActResNet-18 at 32 px take a quarter longer than with XLA's products. It also
# rounds more: by 4.1e-7 of a 1536-term sum's length; XLA by 2.9e-7, PyTorch by 3.6e-7.
_WITHOUT_YNN = {"xla_cpu_experimental_ynn_fusion_type": ""}
_YNN_MULTIPLIES = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"}


class CpuKind(NamedTuple):
    """A row: the instructions that a CPU must have, and the compiler options for it."""

    name: str
    flag: str  # in Linux's /proc/cpuinfo; "": none
    step: Mapping[str, str]  # compiler options for a training step
    search: Mapping[str, str]  # compiler options for AutoAttack's programs
    narrow: bool = False  # whether AutoAttack's search multiplies matrices in bfloat16
    own_products: int = 0  # in a training step, XLA itself multiplies by up to this many weights


# The first row whose flag is present applies. AMX tiles are used only by bfloat16 products in
# YNNPACK. With AVX2 alone, XLA's products are faster if the weights fit in the second-level cache
# (67 to 69 instead of 52 GFLOP/s per core for 12,544 rows of 96 to 384, Zen 3), YNNPACK's if not
# (56 to 63 instead of 27 to 35 for 196 rows of 768 to 3,072).
KINDS = (
    CpuKind("amx", "amx_bf16", step={}, search={}, narrow=True),
    CpuKind("avx512", "avx512f", step={}, search=_WITHOUT_YNN),
    CpuKind("avx2", "avx2", step=_YNN_MULTIPLIES, search=_WITHOUT_YNN, own_products=2**18),
    CpuKind("other", "", step={}, search=_WITHOUT_YNN),
)


def kind(cpuinfo: Path = Path("/proc/cpuinfo")) -> CpuKind:
    """Return the row of this machine, limited by `--xla_cpu_max_isa` in $XLA_FLAGS."""
    limits = re.findall(r"--xla_cpu_max_isa=(\w+)", os.environ.get("XLA_FLAGS", ""))
    allowed: Sequence[CpuKind] = KINDS
    if limits:
        at_most = (n for n, k in enumerate(KINDS) if limits[-1].lower().startswith(k.name))
        allowed = KINDS[next(at_most, len(KINDS) - 1) :]
    flags = _flags(cpuinfo)
    return next(row for row in allowed if row.flag in flags)


@functools.cache  # each product in a trace calls it
def _flags(cpuinfo: Path) -> frozenset[str]:
    try:
        match = re.search(r"^flags\s*:(.*)$", cpuinfo.read_text(), re.M)
    except OSError:  # not Linux
        match = None
    return frozenset({"", *(match[1].split() if match else ())})


def step_options(platform: str) -> dict[str, str] | None:
    """Return compiler options for a training step on `platform` devices; None: XLA's defaults."""
    return dict(kind().step) or None if platform == "cpu" else None


def search_options(platform: str) -> dict[str, str] | None:
    """Return the compiler options for AutoAttack's programs."""
    return dict(kind().search) or None if platform == "cpu" else None
