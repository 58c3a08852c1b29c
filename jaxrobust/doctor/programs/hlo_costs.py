"""Operations and memory traffic of a compiled program on one chip, with loops' trip counts.

XLA's own `cost_analysis` counts the body of a loop only once.
"""

import functools
import math
import re
from typing import NamedTuple

from jaxrobust.doctor.programs import hlo


def flops(module: hlo.Module) -> float:
    """Count the FLOPs of all convolutions, matrix products and declared kernels on one chip.

    A loop whose trip count is not in the text counts once, here and in `traffic`.
    """
    total = 0.0
    for i, n in hlo.executed(module):
        if i.opcode in ("convolution", "dot"):
            types = [module.computations[i.computation][name].type for name in i.operands]
            total += 2 * n * (_convolution if i.opcode == "convolution" else _dot)(i, *types)
        elif match := re.search(r'"cost_estimate":\{"flops":"(\d+)"', i.attributes):
            total += n * int(match[1])
    return total


def _shape(type_: str) -> list[int]:
    return [int(n) for n in re.search(r"\[([\d,]*)\]", type_)[1].split(",") if n]  # type: ignore[index]


def _dot(i: hlo.Instruction, lhs: str, rhs: str) -> int:
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", i.attributes)
    axes = contracted[1].split(",") if contracted and contracted[1] else []
    return math.prod(_shape(i.type)) * math.prod(_shape(lhs)[int(axis)] for axis in axes)


def _convolution(i: hlo.Instruction, image: str, kernel: str) -> int:
    """Count multiply-adds without padding and dilation, by XLA's rule."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.attributes)
    assert labels, i
    sides = [
        dict(zip(names, _shape(type_), strict=True))
        for names, type_ in zip(labels.groups(), (image, kernel, i.type), strict=True)
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


_FREE = {"parameter", "constant", "get-tuple-element", "tuple", "bitcast"}
_FREE |= {"while", "conditional", "call"}


class InstructionCost(NamedTuple):
    """The cost of an instruction over all its executions."""

    instruction: hlo.Instruction
    bytes: int  # between HBM and the chip's units, with the padding of tiles
    cycles: int  # by the compiler's estimate; for a kernel, as its file declares


def works(module: hlo.Module) -> list[InstructionCost]:
    """List the instructions that take time, with their reads and writes in HBM.

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
        if i.computation in inner or i.opcode in _FREE or i.opcode.endswith("-done"):
            continue
        types = [module.computations[i.computation][operand].type for operand in i.operands]
        moved = _of_fusion(module, i, types) if i.opcode == "fusion" else _moved(i, types)
        rows.append(InstructionCost(i, n * moved, n * cycles_of(i)))
    return rows


def traffic(module: hlo.Module) -> float:
    """Sum the bytes moved between HBM and a chip's units; see `works`."""
    return sum(work.bytes for work in works(module))


def _moved(i: hlo.Instruction, operands: list[str]) -> int:
    if i.opcode in ("copy-start", "slice-start"):  # (copy, ...) and ((operand), slice, ...)
        part = hlo.elements(i.type)[i.opcode == "slice-start"]
        return hlo.size(part) * (len(_in_hbm(part)) + len(_in_hbm(operands[0])))
    if i.opcode in ("slice", "dynamic-slice"):
        operands = [i.type]
    if i.opcode == "dynamic-update-slice":
        return 2 * hlo.size(operands[1])
    return sum(hlo.padded_size(array) for type_ in [i.type, *operands] for array in _in_hbm(type_))


def _of_fusion(module: hlo.Module, i: hlo.Instruction, operands: list[str]) -> int:
    """Count the bytes that a fusion reads as parameters and writes as its root."""
    (callee, *_) = hlo.called(i)
    inside, root = module.computations[callee], module.root(callee)
    several = root.opcode == "tuple"
    ends = [inside[name] for name in root.operands] if several else [root]
    types = hlo.elements(i.type) if several else [i.type]
    accesses = [(array, _placed(inside, end)) for array, end in zip(types, ends, strict=True)]
    for parameter in inside.values():
        if parameter.opcode == "parameter":
            accesses.append((operands[int(parameter.arguments)], _taken(inside, parameter)))
    total = 0
    for array, parts in accesses:
        if arrays := _in_hbm(array):
            total += sum(map(hlo.padded_size, arrays if parts is None else parts))
    return total


def _taken(inside: dict[str, hlo.Instruction], of: hlo.Instruction) -> list[str] | None:
    """List the types of the parts that a fusion reads of a value; None if it reads all."""
    parts: list[str] = []
    for user in inside.values():
        if of.name not in user.operands:
            continue
        if of.name in user.operands[1:]:
            return None
        if user.opcode == "dynamic-slice":
            parts.append(user.type)
        elif user.opcode == "bitcast" and (more := _taken(inside, user)) is not None:
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
    """List the kernels that a TPU program calls, with the number of calls."""
    calls_of: dict[KernelCalls, int] = {}
    for i, n in hlo.executed(module):
        if kernel := _declared(i):
            calls_of[kernel] = calls_of.get(kernel, 0) + n
    return [kernel._replace(calls=calls) for kernel, calls in sorted(calls_of.items())]


def _declared(i: hlo.Instruction) -> KernelCalls | None:
    """Read the figures that a kernel's call declares in its metadata and `pl.CostEstimate`."""
    if 'custom_call_target="tpu_custom_call"' not in i.attributes:
        return None
    number = r'"?(\d+)'
    keys = r'kernel_metadata=\{\s*"cycles":', r'"cost_estimate":\{"flops":', r'"bytes_accessed":'
    figures = (re.search(key + number, i.attributes) for key in keys)
    cycles, flops, moved = (int(match[1]) if match else 0 for match in figures)
    return KernelCalls(re.sub(r"[.\d]+$", "", i.name), 0, cycles, flops, moved)
