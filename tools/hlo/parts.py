"""Where a compiled program's time goes: by part of a step, kind of work and line of source.

An instruction's metadata names the JAX transformations that made it (its name stack) and our
function calls. The compiler omits both for copies, which belong to their first user.
"""

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from jaxrobust.doctor.programs.hlo import KINDS, Instruction, Module, called, op_name
from jaxrobust.doctor.programs.hlo_costs import works

if TYPE_CHECKING:
    from jaxrobust.runtime.devices.hardware import Chip

# The first pattern in a name stack determines the part.
_PARTS = (
    ("attack backward", r"\battack/.*transpose\("),
    ("attack forward", r"\battack/"),
    ("optimiser", r"\boptimiser/"),
    ("augmentation", r"\baugmentation/"),
    ("verdict", r"\bverdict/"),
    ("backward", r"transpose\("),
    ("forward", r"jvp\(|^jit\(forward\)/"),
)
PARTS = (*(part for part, _ in _PARTS), "other")
# The innermost of our functions that matches a pattern determines the kind.
_FUNCTIONS = (
    ("matrix product", r"^linear$|^Linear\."),
    ("softmax", r"_softmax"),
    ("attention", r"attention|Attention|_attend|cross_covariance|^talking_heads$"),
    # Kernels of several kinds count as the kind with most of their cycles.
    ("depthwise", r"depthwise|^convnext_block$|^local_interaction$"),
    ("convolution", r"^(batch_)?stem_layers$|^norm_halving$"),
    ("norm", r"[nN]orm"),
    ("activation", r"gelu"),
    ("element-wise", r"^_?residual"),
)
_SHARED = r"/models/(kernels|modules|interface)/|/runtime/"
_LIBRARY = r'custom_call_target="__(cublas|cudnn\$conv)'
_MOVES = {"bitcast", "broadcast", "constant", "copy", "iota", "pad", "parameter", "reshape"}
_MOVES |= {"slice", "transpose", "tuple", "get-tuple-element", "concatenate", "dynamic-slice"}
_MOVES |= {"dynamic-update-slice", "bitcast-convert", "fusion"}


class Heavy(NamedTuple):
    """Instructions from one line of our source, over all their runs."""

    part: str
    kind: str
    line: str  # FILE:LINE FUNCTION, or the instruction's name if the line is unknown
    instructions: int
    runs: int
    bytes: float
    cycles: float
    flops: float
    bound_s: float  # on a GPU


def _summed(rows: Iterator[Heavy], keys: int) -> list[Heavy]:
    """Add up rows whose first `keys` fields are equal; the most expensive sums come first."""
    sums: dict[tuple[Any, ...], Heavy] = {}
    for row in rows:
        old = sums.get(row[:keys])
        added = (a + b for a, b in zip(old[3:], row[3:], strict=True)) if old else row[3:]
        sums[row[:keys]] = Heavy(*row[:3], *added)
    return sorted(sums.values(), key=lambda row: (-row.cycles, -row.bound_s, -row.bytes))


def shares(module: Module, gpu: "Chip | None" = None) -> list[Heavy]:
    """Add up costs by part and kind, the most expensive first."""
    return _summed(each(module, gpu), 2)


def heaviest(module: Module, count: int = 20, *, gpu: "Chip | None" = None) -> list[Heavy]:
    """List the most expensive lines; a row is one line, part and kind."""
    return _summed(each(module, gpu), 3)[:count]


def figures(module: Module, gpu: "Chip | None" = None) -> dict[str, Any]:
    """Collect shares as {part: {kind: {"bytes", ...}}}, and the heaviest lines of source."""
    costs = Heavy._fields[4:] if gpu else ("bytes", "cycles")
    parts: dict[str, dict[str, dict[str, float]]] = {part: {} for part in PARTS}
    for row in shares(module, gpu):
        parts[row.part][row.kind] = {key: getattr(row, key) for key in costs}
    parts = {part: kinds for part, kinds in parts.items() if kinds}
    return {"by_part": parts, "heaviest": [row._asdict() for row in heaviest(module, gpu=gpu)]}


def lines(costs: dict[str, Any]) -> Iterator[str]:
    """Format `figures` as two tables: parts by kinds with shares, and the heaviest lines."""
    rows = [
        {"part": part, "kind": kind, **share}
        for part, kinds in costs["by_part"].items()
        for kind, share in kinds.items()
        if share["bytes"] or share["cycles"]
    ]
    gpu = any("bound_s" in row for row in rows)
    key, unit, scale = ("bound_s", "bound ms", 1e3) if gpu else ("cycles", "1000 cycles", 1e-3)
    digits = 3 if gpu else 0
    all_bytes, all_time = (sum(row[name] for row in rows) or 1 for name in ("bytes", key))
    more = f" {'kernels':>8} {'GFLOP':>9}" if gpu else ""
    yield f"{'part':16} {'kind':15} {'MB':>9} {'share':>6} {unit:>12} {'share':>6}{more}"
    for row in rows:
        more = f" {row['runs']:8,} {row['flops'] / 1e9:9,.1f}" if gpu else ""
        yield (
            f"{row['part']:16} {row['kind']:15} {row['bytes'] / 1e6:9,.1f} "
            f"{row['bytes'] / all_bytes:6.1%} {scale * row[key]:12,.{digits}f} "
            f"{row[key] / all_time:6.1%}{more}"
        )
    yield f"{unit:>12} {'MB':>9}  the heaviest lines of source, and how often they occur"
    for row in costs["heaviest"]:
        yield (
            f"{scale * row[key]:12,.{digits}f} {row['bytes'] / 1e6:9,.1f}  {row['part']}, "
            f"{row['kind']}: {row['line']} ({row['instructions']})"
        )


def each(module: Module, gpu: "Chip | None" = None) -> Iterator[Heavy]:
    users: dict[tuple[str, str], Instruction] = {}
    for computation in module.computations.values():
        for i in computation.values():
            for operand in i.operands:
                users.setdefault((i.computation, operand), i)
    for work in works(module, gpu):
        frame, part = _origin(module, work.instruction, users)
        kind = _kind(module, work.instruction, frame)
        line = _line(module, frame, detailed=gpu is not None) or work.instruction.name
        yield Heavy(part, kind, line, 1, *work[1:])


def _origin(
    module: Module, instruction: Instruction, users: dict[tuple[str, str], Instruction]
) -> tuple[int, str]:
    """Find an instruction's call and part: its own, else from its fusion, else from its users."""
    user: Instruction | None = instruction
    while user:
        fused = [user, *reversed([*_fused(module, user)])]
        frames = (re.search(r"stack_frame_id=(\d+)", i.attributes) for i in fused)
        frame = next((int(match[1]) for match in frames if match), 0)
        name = next((name for name in map(op_name, fused) if "/" in name), "")
        for part, pattern in _PARTS:
            if re.search(pattern, name):
                return frame, part
        user = None if name else users.get((user.computation, user.name))
    return 0, "other"


def _kind(module: Module, instruction: Instruction, frame: int) -> str:
    fused = [instruction, *_fused(module, instruction)]
    opcodes = {i.opcode for i in fused}
    if any(opcode.removesuffix("-start").removesuffix("-done") in KINDS for opcode in opcodes):
        return "collective"
    function = _function_kind(module, frame)
    for i in fused:
        if i.opcode in ("convolution", "dot") or re.search(_LIBRARY, i.attributes):
            if not op_name(i).endswith("conv_general_dilated"):
                return "attention" if function in ("attention", "softmax") else "matrix product"
            grouped = re.search(r"(?:feature|batch)_group_count=(?!1\b)", i.attributes)
            return "depthwise" if grouped else "convolution"
    if opcodes <= _MOVES or instruction.opcode in ("copy-start", "slice-start", "async-start"):
        return "copy"
    return function or "element-wise"


def _fused(module: Module, instruction: Instruction) -> Iterator[Instruction]:
    """Yield the instructions inside one instruction, in the order of the text."""
    if instruction.opcode in ("fusion", "call", "async-start"):
        for callee in called(instruction):
            for i in module.computations[callee].values():
                yield i
                yield from _fused(module, i)


def _function_kind(module: Module, frame: int) -> str | None:
    for function, *_ in module.stack(frame):
        for kind, pattern in _FUNCTIONS:
            if re.search(pattern, function):
                return kind
    return None


def _line(module: Module, frame: int, *, detailed: bool) -> str:
    """Name the innermost line outside code that all networks share, else any.

    With `detailed`, also name the innermost line, where one kernel of ours is many of a GPU's.
    """
    stack = [entry for entry in module.stack(frame) if "jaxrobust/" in entry[1]]
    own = [entry for entry in stack if not re.search(_SHARED, entry[1])]
    lines = [*own[:1], *(stack[:1] if detailed or not own else [])]
    return " < ".join(
        f"{file.rpartition('jaxrobust/')[2]}:{line} {function}"
        for function, file, line, _ in dict.fromkeys(reversed(lines))
    )
