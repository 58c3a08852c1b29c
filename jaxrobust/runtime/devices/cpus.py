"""What XLA is told for each kind of CPU: a table, and the row of this machine."""

import functools
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

# YNNPACK, which makes products of matrices for XLA on CPU, packs the weights again at each use: in
# the steps of AutoAttack a PreActResNet-18 at 32 px takes a quarter more than with XLA's own. It
# also rounds more: of 1536 terms 4.1e-7 of the sum's length, XLA's own 2.9e-7, PyTorch's 3.6e-7.
_WITHOUT_YNN = {"xla_cpu_experimental_ynn_fusion_type": ""}
_YNN_MULTIPLIES = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"}


class CpuKind(NamedTuple):
    """One row: the instructions that a CPU must have, and what programs are compiled with on it."""

    name: str
    flag: str  # of Linux' /proc/cpuinfo; "": none
    step: Mapping[str, str]  # compiler options of a step of training
    search: Mapping[str, str]  # those of AutoAttack's programs
    narrow: bool = False  # AutoAttack's search makes products of matrices in bfloat16
    own_products: int = 0  # in a step, XLA itself multiplies by at most this many weights


# The first whose flag is there. On AMX only products in bfloat16 use its tiles, and of those only
# YNNPACK's. With AVX2 alone XLA's own are the faster ones while the weights stay in the
# second-level cache (67 to 69 instead of 52 GFLOP/s a core for 12,544 rows of 96 to 384, Zen 3),
# YNNPACK's with more (56 to 63 instead of 27 to 35 for 196 rows of 768 to 3,072).
KINDS = (
    CpuKind("amx", "amx_bf16", step={}, search={}, narrow=True),
    CpuKind("avx512", "avx512f", step={}, search=_WITHOUT_YNN),
    CpuKind("avx2", "avx2", step=_YNN_MULTIPLIES, search=_WITHOUT_YNN, own_products=2**18),
    CpuKind("other", "", step={}, search=_WITHOUT_YNN),
)


def kind(cpuinfo: Path = Path("/proc/cpuinfo")) -> CpuKind:
    """Find the row of this machine, or of what `--xla_cpu_max_isa` of $XLA_FLAGS leaves of it."""
    limits = re.findall(r"--xla_cpu_max_isa=(\w+)", os.environ.get("XLA_FLAGS", ""))
    allowed: Sequence[CpuKind] = KINDS
    if limits:
        at_most = (n for n, k in enumerate(KINDS) if limits[-1].lower().startswith(k.name))
        allowed = KINDS[next(at_most, len(KINDS) - 1) :]
    flags = _flags(cpuinfo)
    return next(row for row in allowed if row.flag in flags)


@functools.cache  # which each product of a trace asks for
def _flags(cpuinfo: Path) -> frozenset[str]:
    try:
        match = re.search(r"^flags\s*:(.*)$", cpuinfo.read_text(), re.M)
    except OSError:  # not Linux
        match = None
    return frozenset({"", *(match[1].split() if match else ())})


def step_options(platform: str) -> dict[str, str] | None:
    """Choose compiler options of a step of training on devices of `platform`; None: XLA's own."""
    return dict(kind().step) or None if platform == "cpu" else None


def search_options(platform: str) -> dict[str, str] | None:
    """Choose those of AutoAttack's programs."""
    return dict(kind().search) or None if platform == "cpu" else None
