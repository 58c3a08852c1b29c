"""Operations and memory traffic of a compiled program on one chip, with loops' trip counts.

XLA's own `cost_analysis` counts the body of a loop only once.
"""

import functools
import math
import re
from typing import TYPE_CHECKING, NamedTuple

from jaxrobust.doctor.programs import hlo

if TYPE_CHECKING:
    from jaxrobust.runtime.devices import hardware


def flops(module: hlo.Module) -> float:
    """Count the FLOPs of all convolutions, matrix products and declared kernels on one chip.

    A loop whose trip count is not in the text counts once, here and in `traffic`.
    """
    return sum(work.flops for work in works(module))


def _flops(module: hlo.Module, i: hlo.Instruction) -> float:
    """Count the FLOPs of an instruction and of what it calls."""
    types = [module.computations[i.computation][name].type for name in i.operands]
    if i.opcode == "dot":
        return 2.0 * _dot(i, types[0], types[1])
    if i.opcode == "convolution":
        return 2.0 * _convolution(i, types[0], types[1], i.type)
    if i.opcode == "custom-call":
        return _of_library(i, types) or float(_declared_cost(i, "flops") or 0)
    inside = (module.computations[callee].values() for callee in hlo.called(i))
    return sum(_flops(module, each) for instructions in inside for each in instructions)


def _of_library(i: hlo.Instruction, operands: list[str]) -> float:
    """Count the FLOPs of a call of NVIDIA's libraries; 0 for other calls."""
    match = re.search(r'custom_call_target="__(cudnn|cublas)\$(\w+)', i.attributes)
    if not match:
        return 0.0
    result = hlo.elements(i.type)[0] if i.type.startswith("(") else i.type
    if match[1] == "cublas":
        return 2.0 * _dot(i, operands[0], operands[1], result)
    if match[2].startswith("conv"):
        image, kernel, out = operands[0], operands[1], result
        if match[2] == "convBackwardInput":
            image, out = result, operands[0]
        elif match[2] == "convBackwardFilter":
            kernel, out = result, operands[1]
        return 2.0 * _convolution(i, image, kernel, out)
    scores = re.search(r'intermediate_tensor_shape.*?"dimensions": ?\[(.*?)\]', i.attributes)
    assert match[2].startswith("fmha") and scores, i
    products = 5 if match[2].endswith("Backward") else 2
    width = _shape(result)[-1]
    return 2.0 * products * width * math.prod(map(int, re.findall(r"\d+", scores[1])))


def _shape(type_: str) -> list[int]:
    return [int(n) for n in re.search(r"\[([\d,]*)\]", type_)[1].split(",") if n]  # type: ignore[index]


def _dot(i: hlo.Instruction, lhs: str, rhs: str, result: str = "") -> int:
    pattern = r'lhs_contracting_dim(?:s=\{|ensions": ?\[)([\d,"]*)'  # XLA's, and of a cuBLAS call
    contracted = re.search(pattern, i.attributes)
    axes = re.findall(r"\d+", contracted[1]) if contracted else []
    return math.prod(_shape(result or i.type)) * math.prod(_shape(lhs)[int(n)] for n in axes)


def _convolution(i: hlo.Instruction, image: str, kernel: str, out: str) -> int:
    """Count multiply-adds without padding and dilation, by XLA's rule."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.attributes)
    assert labels, i
    sides = [
        dict(zip(names, _shape(type_), strict=True))
        for names, type_ in zip(labels.groups(), (image, kernel, out), strict=True)
    ]
    window = re.search(r"window=\{(.*?)\}", i.attributes)
    written = dict(re.findall(r"(\w+)=([\d_x\-]+)", window[1] if window else ""))
    valid = 1
    for axis, key in enumerate(sorted(key for key in sides[0] if key.isdigit())):
        stride, pad, spread, apart = (
            int(written[name].split("x")[axis].split("_")[0]) if name in written else default
            for name, default in (("stride", 1), ("pad", 0), ("lhs_dilate", 1), ("rhs_dilate", 1))
        )
        valid *= _valid(*(side[key] for side in sides), stride, pad, spread, apart)
    groups = re.search(r"batch_group_count=(\d+)", i.attributes)
    batch = sides[0]["b"] // (int(groups[1]) if groups else 1)
    return batch * sides[1]["i"] * sides[2]["f"] * valid


@functools.cache
def _valid(
    image: int, kernel: int, out: int, stride: int, pad: int, spread: int, apart: int
) -> int:
    """Count pairs of a result position and a kernel position that hit an input value."""
    positions = (o * stride + k * apart - pad for o in range(out) for k in range(kernel))
    return sum(0 <= p <= (image - 1) * spread and p % spread == 0 for p in positions)


FREE = {"parameter", "constant", "get-tuple-element", "tuple", "bitcast"}
FREE |= {"while", "conditional", "call"}


class InstructionCost(NamedTuple):
    """The cost of an instruction over all its executions."""

    instruction: hlo.Instruction
    runs: int
    bytes: float  # between HBM and the chip's units, with the padding of tiles
    cycles: float  # by the compiler's estimate; for a kernel, as its file declares
    flops: float
    bound_s: float  # at a GPU's rates of memory and of matrix products; 0 on other chips


def works(module: hlo.Module, gpu: "hardware.Chip | None" = None) -> list[InstructionCost]:
    """List the instructions that take time, on a GPU its kernels.

    Arrays in a TPU's fast memory (`S(1)` in their layout) do not count; the padding of tiles does.
    If an instruction reads or replaces only a part of an array, as in a loop over a network's
    blocks, only that part counts. A loop whose trip count is not in the text counts once.
    """
    rows = []
    inner = {
        callee
        for i in hlo.instructions(module.computations)
        if i.opcode not in ("while", "conditional", "call")
        for callee in hlo.called(i)
    }
    for i, n in hlo.executed(module):
        if i.computation in inner or i.opcode in FREE or i.opcode.endswith("-done"):
            continue
        once = cost_of(module, i, gpu)
        rows.append(InstructionCost(i, n, *(n * cost for cost in once[2:])))
    return rows


def cost_of(
    module: hlo.Module, i: hlo.Instruction, gpu: "hardware.Chip | None" = None
) -> InstructionCost:
    """Return the cost of one execution; see `works`."""
    types = [module.computations[i.computation][operand].type for operand in i.operands]
    fusion = i.opcode == "fusion"
    moved = _of_fusion(module, i, types, gpu is not None) if fusion else _moved(i, types)
    flops = _flops(module, i)
    bound = max(moved / gpu.bandwidth, flops / gpu.flops) if gpu else 0.0
    return InstructionCost(i, 1, moved, cycles_of(i), flops, bound)


def traffic(module: hlo.Module) -> float:
    """Sum the bytes moved between HBM and a chip's units; see `works`."""
    return sum(work.bytes for work in works(module))


def _moved(i: hlo.Instruction, operands: list[str]) -> int:
    if "mosaic_gpu" in i.attributes and (declared := _declared_cost(i, "bytes_accessed")):
        return declared
    if i.opcode in ("copy-start", "slice-start"):  # (copy, ...) and ((operand), slice, ...)
        part = hlo.elements(i.type)[i.opcode == "slice-start"]
        return hlo.size(part) * (len(_in_hbm(part)) + len(_in_hbm(operands[0])))
    if i.opcode in ("slice", "dynamic-slice"):
        operands = [i.type]
    if i.opcode == "dynamic-update-slice":
        return 2 * hlo.size(operands[1])
    return sum(hlo.padded_size(array) for type_ in [i.type, *operands] for array in _in_hbm(type_))


def _of_fusion(module: hlo.Module, i: hlo.Instruction, operands: list[str], gpu: bool) -> int:
    """Count the bytes that a fusion reads as parameters and writes as its root."""
    (callee, *_) = hlo.called(i)
    inside, root = module.computations[callee], module.root(callee)
    several = root.opcode == "tuple"
    ends = [inside[name] for name in root.operands] if several else [root]
    types = hlo.elements(i.type) if several else [i.type]
    accesses = [(array, _placed(inside, end)) for array, end in zip(types, ends, strict=True)]
    for parameter in inside.values():
        if parameter.opcode == "parameter":
            accesses.append((operands[int(parameter.arguments)], _taken(inside, parameter, gpu)))
    total = 0
    for array, parts in accesses:
        if arrays := _in_hbm(array):
            all_ = sum(map(hlo.padded_size, arrays))
            total += all_ if parts is None else min(all_, sum(map(hlo.padded_size, parts)))
    return total


def _taken(
    inside: dict[str, hlo.Instruction], of: hlo.Instruction, gpu: bool = False
) -> list[str] | None:
    """List the types of the parts that a fusion reads of a value; None if it reads all.

    A GPU also reads no more of an array than a slice at a fixed place, padded or not.
    """
    parts: list[str] = []
    for user in inside.values():
        if of.name not in user.operands:
            continue
        if of.name in user.operands[1:]:
            return None
        if user.opcode == "dynamic-slice" or (gpu and user.opcode == "slice"):
            parts.append(user.type)
            continue
        moves = user.opcode == "bitcast" or (gpu and user.opcode == "pad")
        more = _taken(inside, user, gpu) if moves else None
        if more or (more == [] and user.opcode == "bitcast"):
            parts += more
        elif user.opcode != "dynamic-update-slice" or not _returned(inside, user):
            return None
    return parts


def _returned(inside: dict[str, hlo.Instruction], of: hlo.Instruction) -> bool:
    """Tell whether a fusion only returns a value; computing with it would read all of it."""
    users = (user for user in inside.values() if of.name in user.operands)
    return all(
        u.opcode == "tuple" or (u.opcode == "bitcast" and _returned(inside, u)) for u in users
    )


def _placed(inside: dict[str, hlo.Instruction], end: hlo.Instruction) -> list[str] | None:
    """Return the type of the part that a fusion replaces in an operand; None if it writes all."""

    def source(of: hlo.Instruction) -> hlo.Instruction:
        return source(inside[of.operands[0]]) if of.opcode == "bitcast" else of

    end = source(end)
    in_place = end.opcode == "dynamic-update-slice"
    if in_place and source(inside[end.operands[0]]).opcode == "parameter":
        return [inside[end.operands[1]].type]
    return None


def _in_hbm(type_: str) -> list[str]:
    arrays = re.findall(r"\b[a-z]\w*\[[\d,]*\](?:\{[^}]*\})?", type_)
    return [array for array in arrays if "S(" not in array]


class KernelCalls(NamedTuple):
    """A Pallas kernel; figures are per call, as declared in its file."""

    name: str
    calls: int
    cycles: int
    flops: int
    bytes: int


def cycles(module: hlo.Module) -> int:
    """Sum the compiler's cycle estimates, which most operations of a TPU program carry.

    Only this estimate covers vector units, copies to other layouts and the padding of tiles. Pallas
    kernels have none: see `kernels`.
    """
    return sum(n * _estimate(i) for i, n in hlo.executed(module))


def cycles_of(i: hlo.Instruction) -> int:
    """Return the cycles of one execution of an instruction; for a kernel, as declared."""
    kernel = _declared(i)
    return kernel.cycles if kernel else _estimate(i)


def _estimate(i: hlo.Instruction) -> int:
    match = re.search(r'"estimated_cycles":"(\d+)"', i.attributes)
    return int(match[1]) if match else 0


def kernels(module: hlo.Module) -> list[KernelCalls]:
    """List the Pallas kernels that a program calls, with the number of calls."""
    calls_of: dict[KernelCalls, int] = {}
    for i, n in hlo.executed(module):
        if kernel := _declared(i):
            calls_of[kernel] = calls_of.get(kernel, 0) + n
    return [kernel._replace(calls=calls) for kernel, calls in sorted(calls_of.items())]


def _declared(i: hlo.Instruction) -> KernelCalls | None:
    """Read the figures that a kernel's call declares in its metadata and `pl.CostEstimate`."""
    if not re.search(r'custom_call_target="(tpu_custom_call|mosaic_gpu)', i.attributes):
        return None
    cycles = re.search(r'kernel_metadata=\{\s*"cycles":"?(\d+)', i.attributes)
    costs = (_declared_cost(i, key) or 0 for key in ("flops", "bytes_accessed"))
    name = hlo.op_name(i).split("/")[-2] if "mpmd_map" in i.name else i.name  # of Mosaic GPU
    return KernelCalls(re.sub(r"[.\d]+$", "", name), 0, int(cycles[1]) if cycles else 0, *costs)


def _declared_cost(i: hlo.Instruction, key: str) -> int | None:
    """Read a figure of a kernel's `pl.CostEstimate`; None if it has none."""
    match = re.search(rf'cost_estimate.*?(?:"|\\22){key}(?:"|\\22): ?"?(\d+)', i.attributes)
    return int(match[1]) if match else None
