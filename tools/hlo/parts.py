"""Where a compiled program's time goes: by part of a step, kind of work and line of source.

An instruction's metadata names the JAX transformations that made it (its name stack) and our
function calls. The compiler omits both for copies, which belong to their first user.
"""

import re
from collections import defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple

from jaxrobust.doctor.programs.hlo import KINDS, Instruction, Module, called, op_name
from jaxrobust.doctor.programs.hlo_costs import works

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
)
_SHARED = r"/models/(kernels|modules|interface)/|/runtime/"
_MOVES = {"bitcast", "broadcast", "constant", "copy", "iota", "pad", "parameter", "reshape"}
_MOVES |= {"slice", "transpose", "tuple", "get-tuple-element", "concatenate", "dynamic-slice"}
_MOVES |= {"dynamic-update-slice", "bitcast-convert", "fusion"}


class Share(NamedTuple):
    """The work of one kind in a part of a step, in one run of the program."""

    part: str
    kind: str
    bytes: float
    cycles: float


class Heavy(NamedTuple):
    """Instructions from one line of our source, over all their runs."""

    part: str
    kind: str
    line: str  # FILE:LINE FUNCTION, or the instruction's name if the line is unknown
    instructions: int
    bytes: float
    cycles: float


def shares(module: Module) -> list[Share]:
    """Sum bytes and cycles by part and kind, most cycles first."""
    bytes_: defaultdict[tuple[str, str], float] = defaultdict(float)
    cycles: defaultdict[tuple[str, str], float] = defaultdict(float)
    for heavy in _all(module):
        bytes_[heavy.part, heavy.kind] += heavy.bytes
        cycles[heavy.part, heavy.kind] += heavy.cycles
    rows = [Share(*key, bytes_[key], cycles[key]) for key in bytes_]
    return sorted(rows, key=lambda share: (-share.cycles, -share.bytes))


def heaviest(module: Module, count: int = 20) -> list[Heavy]:
    """List the lines with the most cycles; a row is one line, part and kind."""
    rows: dict[tuple[str, str, str], Heavy] = {}
    for one in _all(module):
        row = rows.get(one[:3], Heavy(*one[:3], 0, 0, 0))
        sums = row.instructions + 1, row.bytes + one.bytes, row.cycles + one.cycles
        rows[one[:3]] = Heavy(*one[:3], *sums)
    return sorted(rows.values(), key=lambda row: (-row.cycles, -row.bytes))[:count]


def figures(module: Module) -> dict[str, Any]:
    """Collect shares as {part: {kind: {"bytes", "cycles"}}}, and the heaviest instructions."""
    parts: dict[str, dict[str, dict[str, float]]] = {part: {} for part in PARTS}
    for part, kind, bytes_, cycles in shares(module):
        parts[part][kind] = {"bytes": bytes_, "cycles": cycles}
    parts = {part: kinds for part, kinds in parts.items() if kinds}
    return {"by_part": parts, "heaviest": [row._asdict() for row in heaviest(module)]}


def lines(costs: dict[str, Any]) -> Iterator[str]:
    """Format `figures` as two tables: parts by kinds with shares, and the heaviest instructions."""
    rows = [
        (part, kind, share["bytes"], share["cycles"])
        for part, kinds in costs["by_part"].items()
        for kind, share in kinds.items()
        if share["bytes"] or share["cycles"]
    ]
    all_bytes, all_cycles = (sum(row[n] for row in rows) or 1 for n in (2, 3))
    yield f"{'part':16} {'kind':15} {'MB':>9} {'share':>6} {'1000 cycles':>12} {'share':>6}"
    for part, kind, bytes_, cycles in rows:
        yield (
            f"{part:16} {kind:15} {bytes_ / 1e6:9,.1f} {bytes_ / all_bytes:6.1%} "
            f"{cycles / 1e3:12,.0f} {cycles / all_cycles:6.1%}"
        )
    yield f"{'1000 cycles':>12} {'MB':>9}  the heaviest lines of source, and how often they stand"
    for row in costs["heaviest"]:
        yield (
            f"{row['cycles'] / 1e3:12,.0f} {row['bytes'] / 1e6:9,.1f}  {row['part']}, "
            f"{row['kind']}: {row['line']} ({row['instructions']})"
        )


def _all(module: Module) -> Iterator[Heavy]:
    users: dict[tuple[str, str], Instruction] = {}
    for computation in module.computations.values():
        for i in computation.values():
            for operand in i.operands:
                users.setdefault((i.computation, operand), i)
    for work in works(module):
        frame, part = _origin(module, work.instruction, users)
        kind = _kind(module, work.instruction, frame)
        line = _line(module, frame) or work.instruction.name
        yield Heavy(part, kind, line, 1, work.bytes, work.cycles)


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
        if i.opcode in ("convolution", "dot"):
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


def _line(module: Module, frame: int) -> str:
    """Name the innermost line outside code that all networks share, else any."""
    stack = [entry for entry in module.stack(frame) if "jaxrobust/" in entry[1]]
    own = [entry for entry in stack if not re.search(_SHARED, entry[1])]
    for function, file, line, _ in own or stack:
        return f"{file.rpartition('jaxrobust/')[2]}:{line} {function}"
    return ""
