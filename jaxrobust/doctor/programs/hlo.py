"""The communication of a compiled program between chips, from its optimized HLO text.

Supports programs of the CPU and the TPU compilers. Some properties of these texts are not obvious:
- A collective that overlaps with other work appears several times: as `-start` and `-done`, as
  the body of an `async-start`, or, from the TPU compiler, in three fusions that share a `chain_id`.
- `channel_id` is useless: all collectives of a `shard_map` may have the same one.
- A gather may be written as an all-reduce of zeros into which each chip has put its part.
"""

import functools
import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "collective-permute",
    "all-to-all",
    "ragged-all-to-all",
    "collective-broadcast",
)
# Markers in a fusion that starts or ends a chain.
STARTS, ENDS = (f'custom_call_target="AsyncCollective{end}"' for end in ("Start", "Done"))
# Names that still mark a short loop that the compiler has unrolled.
_LOOP = re.compile(r"(^|/)(while/body|attack)(/|$)")
_BITS = {"pred": 8, "token": 0}  # the names of all other types contain their bits
# Operations that move, split, join or round a value, with the operands that it comes from.
_MOVES: dict[str, slice] = {
    **dict.fromkeys(("bitcast", "convert", "copy", "reshape", "transpose", "slice"), slice(1)),
    **dict.fromkeys(("copy-start", "copy-done", "slice-start", "slice-done"), slice(1)),
    **dict.fromkeys(("pad", "dynamic-slice", "reduce-precision", "bitcast-convert"), slice(1)),
    **dict.fromkeys(("iota", "partition-id", "replica-id"), slice(0)),
    "broadcast": slice(1),
    "dynamic-update-slice": slice(2),
    "select": slice(1, 3),
    "concatenate": slice(None),
}


class Instruction(NamedTuple):
    """One line: `%name = type opcode(operands), attributes`."""

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    arguments: str  # as written, such as the value of a constant
    attributes: str
    computation: str


class Collective(NamedTuple):
    """One message pattern of a program."""

    kind: str
    bytes: int  # of its result on one chip
    sent: float  # minimum bytes that one chip sends per execution
    arrays: int  # number of arrays it carries
    times: int | None  # product of the trip counts of surrounding loops; None: unknown
    inside: bool  # whether it is in a loop, or in an unrolled one of the attack
    op_name: str
    parameters: tuple[str, ...]  # program arguments it carries unchanged, except for their type
    key: str  # its chain, or the name of its instruction
    row: bool  # whether its messages stay in a part of the slice


class Frame(NamedTuple):
    """A call in the source."""

    function: str
    file: str
    line: int
    parent: int  # the enclosing call; 0: none


class Module(NamedTuple):
    """Computations by name, each a dict of instructions; `callers` are call sites."""

    computations: dict[str, dict[str, Instruction]]
    entry: str
    roots: dict[str, str]
    callers: dict[str, list[Instruction]]
    devices: int  # number that run the program together
    frames: dict[int, "Frame"]

    def stack(self, frame: int) -> Iterator["Frame"]:
        """Yield the calls that made an instruction of `stack_frame_id`, the innermost first."""
        while frame in self.frames:
            yield self.frames[frame]
            frame = self.frames[frame].parent

    def root(self, computation: str) -> Instruction:
        """Return the root instruction of a computation."""
        return self.computations[computation][self.roots[computation]]


def parse(text: str) -> Module:
    """Parse the text of `compiled.as_text()`."""
    # Kernel metadata is the only attribute that spans several lines.
    text = re.sub(r"kernel_metadata=\{\n(.*?)\n\}", r"kernel_metadata={\1}", text, flags=re.DOTALL)
    computations: dict[str, dict[str, Instruction]] = {}
    roots: dict[str, str] = {}
    callers: dict[str, list[Instruction]] = {}
    entry = current = ""
    for line in text.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            current = head[2]
            computations[current], callers[current] = {}, []
            entry = current if head[1] else entry
        elif current and (match := re.match(r"  +(ROOT )?%?([\w.\-]+) = (.*)", line)):
            name, line = match[2], match[3]
            end = _closing(line) if line.startswith("(") else line.index(" ")
            start = line.index("(", end)
            close = start + _closing(line[start:])
            opcode, arguments = line[end:start].strip(), line[start + 1 : close - 1]
            operands = tuple(re.findall(r"%([\w.\-]+)", arguments))
            computations[current][name] = Instruction(
                name, line[:end], opcode, operands, arguments, line[close:], current
            )
            if match[1]:
                roots[current] = match[2]
    if not entry:
        raise ValueError("no ENTRY computation; pass the text of compiled.as_text()")
    for instruction in instructions(computations):
        for callee in set(called(instruction)) & set(callers):
            callers[callee].append(instruction)
    counts = re.findall(r"(?:num_partitions|replica_count)=(\d+)", text.partition("\n")[0])
    return Module(computations, entry, roots, callers, math.prod(map(int, counts)), _frames(text))


def _frames(text: str) -> dict[int, Frame]:
    """Read the tables of files, functions, places and calls at the start of a text."""
    head = text.partition("\n%")[0]

    def table(name: str, pattern: str) -> dict[int, Any]:
        rows = re.search(rf"^{name}\n((?:\d+ .*\n)+)", head, re.MULTILINE)
        return {int(n): row for n, *row in re.findall(pattern, rows[1] if rows else "")}

    files, functions = (table(name, r'(\d+) "(.*)"') for name in ("FileNames", "FunctionNames"))
    place_of = r".*file_name_id=(\d+) function_name_id=(\d+) line=(\d+)"
    places = table("FileLocations", r"(\d+) \{" + place_of)
    calls = table("StackFrames", r"(\d+) \{file_location_id=(\d+)(?: parent_frame_id=(\d+))?")
    # Parents are numbered from one, as if "none" were a call: the first call names itself.
    first = int(calls[1][1] or 0) if 1 in calls else 0
    frames = {}
    for number, (place, parent) in calls.items():
        file, function, line = places[int(place)]
        around = max(int(parent or 0) - first, 0)
        frames[number] = Frame(functions[int(function)][0], files[int(file)][0], int(line), around)
    return frames


def _closing(text: str) -> int:
    depth = 0
    for bracket in re.finditer(r"[()]", text):
        depth += 1 if bracket[0] == "(" else -1
        if depth == 0:
            return bracket.end()
    raise ValueError(f"unbalanced HLO: {text[:80]}")


def instructions(computations: dict[str, dict[str, Instruction]]) -> Iterator[Instruction]:
    """Iterate over all instructions in the order of the text."""
    return (i for computation in computations.values() for i in computation.values())


def called(instruction: Instruction) -> list[str]:
    """List the computations that an instruction calls."""
    keys = "calls|to_apply|condition|body|branch_computations|true_computation|false_computation"
    groups = re.findall(rf"\b(?:{keys})=(\{{[^}}]*\}}|%?[\w.\-]+)", instruction.attributes)
    return re.findall(r"[\w.\-]+", " ".join(groups))


def collectives(module: Module) -> list[Collective]:
    """List the collectives, each once, in the order of the text."""
    times = runs(module)
    by_key: dict[object, tuple[tuple[bool, int], Collective]] = {}
    for i in instructions(module.computations):
        kind = i.opcode.removesuffix("-start")
        if kind not in KINDS:
            continue
        chain = chain_of(i)
        carried = {name for operand in i.operands for name in _carried(module, i, operand)}
        kind, result = _result(module, i, kind)
        name, chips = op_name(i), _group(i.attributes) or module.devices
        collective = Collective(
            kind=kind,
            bytes=size(result),
            sent=_sent(kind, size(result), chips),
            arrays=len(re.findall(r"\w\[", result)),
            times=times[i.computation][0],
            inside=times[i.computation][1] or bool(_LOOP.search(name)),
            op_name=name,
            parameters=tuple(sorted(carried)),
            key=chain or i.name,
            row=chips < module.devices,
        )
        # A chain has three parts, and the compiler may put the middle one into a loop of other
        # work that runs meanwhile. The message is sent only once, at the start of the chain.
        key = (kind, chain) if chain else i
        neighbours = module.computations[i.computation].values()
        starts = any(
            i.name in other.operands and STARTS in other.attributes for other in neighbours
        )
        rank = bool(chain) and starts, len(collective.parameters)
        if key not in by_key or rank > by_key[key][0]:
            by_key[key] = rank, collective
    return [collective for _, collective in by_key.values()]


def chain_of(i: Instruction) -> str:
    """Name the chain shared by the parts of an asynchronous collective; "" if it has none."""
    match = re.search(r'chain_id="(\d+)"', i.attributes)
    return f"chain {match[1]}" if match else ""


def _carried(module: Module, i: Instruction, operand: str) -> Iterator[str]:
    """Yield program parameters that an operand carries, except those it only sums."""
    sums = i.opcode.startswith(("all-reduce", "reduce-scatter"))
    type_ = module.computations[i.computation][operand].type
    for leaf in _leaves(module, i.computation, operand) or ():
        if leaf.opcode == "parameter" and not (sums and count(leaf.type) == count(type_)):
            yield op_name(leaf) or leaf.name


def _result(module: Module, i: Instruction, kind: str) -> tuple[str, str]:
    """Return (kind, type of the actual result) of a collective."""
    if i.computation.startswith("all-reduce-scatter"):  # the TPU compiler's fusion of the two
        return "reduce-scatter", module.root(i.computation).type
    if i.opcode in ("all-gather-start", "collective-permute-start"):
        return kind, elements(i.type)[1]  # (operands, results, ...)
    return kind, i.type


def elements(type_: str) -> list[str]:
    """Split a tuple's type into its elements."""
    inner, parts, depth = type_[1:-1], [""], 0
    for character in inner:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def count(type_: str) -> int:
    """Count the values in an array's type."""
    dims = re.search(r"\[([\d,]*)\]", type_)
    return math.prod(int(n) for n in dims[1].split(",") if n) if dims else 0


def size(type_: str) -> int:
    """Return the bytes of an array's or a tuple's type."""
    bits = 0
    for kind, dims in re.findall(r"\b([a-z]\w*)\[([\d,]*)\]", type_):
        bits += _width(kind) * math.prod(map(int, dims.split(",") if dims else []))
    return bits // 8


def _width(kind: str) -> int:
    return _BITS[kind] if kind in _BITS else int(re.search(r"\d+", kind)[0])  # type: ignore[index]


def padded_size(type_: str) -> int:
    """Return the bytes of an array's type with the padding of its tiles.

    A TPU stores an array in tiles of, say, 8 x 128 values along its two innermost axes, `T(8,128)`.
    A row of 197 values then takes two tiles.
    """
    match = re.search(r"\b([a-z]\w*)\[([\d,]+)\]\{([\d,]+):T\(([\d,]+)\)", type_)
    if not match:
        return size(type_)
    sides, order, tile = ([int(n) for n in part.split(",")] for part in match.groups()[1:])
    for axis, side in zip(order, reversed(tile), strict=False):  # the innermost axis is first
        sides[axis] = -(-sides[axis] // side) * side
    return _width(match[1]) * math.prod(sides) // 8


def _sent(kind: str, size: int, chips: int) -> float:
    """Return the bytes each of `chips` must send for a collective with a result of `size` bytes."""
    others = chips - 1
    factors = {
        "all-reduce": 2 * others / chips,
        "reduce-scatter": others,
        "collective-permute": 1,
        "collective-broadcast": 1,
    }
    return size * factors.get(kind, others / chips)


def _group(attributes: str) -> int | None:
    """Return the number of chips that take part; None if the text omits it, meaning all."""
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return len(match[1].split(","))
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]", attributes):
        return int(match[1])
    if match := re.search(r"replica_groups=mesh\[(.*?)\] *\{(.*?)\}", attributes):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", match[2]))
    return None


def op_name(i: Instruction) -> str:
    """Read the JAX transformations and operation behind an instruction."""
    match = re.search(r'op_name="((?:[^"\\]|\\.)*)"', i.attributes)
    return re.sub(r"\\(.)", r"\1", match[1]) if match else ""


# --- Loops ---


def runs(module: Module, unknown: int | None = None) -> dict[str, tuple[int | None, bool]]:
    """Count the runs of each computation, and tell whether it is inside a loop.

    A loop whose trip count is not in the text counts `unknown` times; None: as unknown.
    """

    @functools.cache
    def of(computation: str) -> tuple[int | None, bool]:
        if computation == module.entry:
            return 1, False
        total: int | None = 0
        looped = False
        for call in module.callers[computation]:
            outer, inside = of(call.computation)
            trips = trip_count(module, call) if call.opcode == "while" else 1
            trips = unknown if trips is None else trips
            lost = total is None or outer is None or trips is None
            total = None if lost else total + outer * trips  # type: ignore[operator]
            looped |= inside or call.opcode == "while"
        return total, looped

    return {computation: of(computation) for computation in module.computations}


def executed(module: Module) -> Iterator[tuple[Instruction, int]]:
    """Yield each instruction with how often it runs; a loop of unknown length counts once."""
    times = runs(module, unknown=1)
    return ((i, times[i.computation][0] or 0) for i in instructions(module.computations))


def trip_count(module: Module, loop: Instruction) -> int | None:
    """Return the trip count of a `while` that counts up by one, as in JAX; None if unknown."""
    if match := re.search(r"known_trip_count\W+n\W+(\d+)", loop.attributes):
        return int(match[1])
    compare = module.root(_attribute(loop, "condition"))
    while compare.opcode in ("fusion", "call"):
        compare = module.root(called(compare)[0])
    if compare.opcode != "compare" or "direction=LT" not in compare.attributes:
        return None
    leaves = [_leaves(module, compare.computation, name, start=True) for name in compare.operands]
    ends = [
        int(leaf.arguments)
        for group in leaves
        for leaf in group or ()
        if re.fullmatch(r"-?\d+", leaf.arguments)
    ]
    return max(ends[1] - ends[0], 0) if len(ends) == 2 else None


# --- Origins of values ---

_DEEPEST = 16  # nested tuples; more indicate a cycle through mixed-up calls


_Place = tuple[str, str, tuple[int, ...]]  # computation, name in it, path to a tuple's element


def _leaves(
    module: Module, computation: str, name: str, *, start: bool = False
) -> frozenset[Instruction] | None:
    """Return the constants and parameters that a value is made of; None if it was computed."""
    # A value that a loop changes counts as computed; with `start`, as its value before the loop. A
    # computation called by several instructions leads to all of them, so each place is visited
    # once.
    leaves: set[Instruction] = set()
    todo: list[_Place] = [(computation, name, ())]
    met = set(todo)
    while todo:
        place = todo.pop()
        sources = _sources(module, *place, start=start)
        if sources is None or len(place[2]) > _DEEPEST:
            return None
        leaf = module.computations[place[0]][place[1]]
        if not sources and leaf.opcode in ("parameter", "constant"):
            leaves.add(leaf)
        todo += (fresh := set(sources) - met)
        met |= fresh
    return frozenset(leaves)


def _sources(
    module: Module, computation: str, name: str, path: tuple[int, ...], *, start: bool
) -> list[_Place] | None:
    """List the places a value came from; empty if it originates here, None if computed."""
    i = module.computations[computation][name]
    if i.opcode == "parameter":
        calls = [] if computation == module.entry else module.callers[computation]
        if any(c.opcode == "while" and not (start or _unchanged(module, c, path)) for c in calls):
            return None
        number = int(i.arguments)
        sources = []
        for call in calls:
            of_branch = call.opcode == "conditional"
            at = 1 + called(call).index(computation) if of_branch else number
            sources.append((call.computation, call.operands[at], path))
        return sources
    if i.opcode == "constant":
        return []
    if i.opcode == "get-tuple-element":
        return [(computation, i.operands[0], (int(_attribute(i, "index")), *path))]
    if i.opcode == "tuple" and path:
        return [(computation, i.operands[path[0]], path[1:])]
    if i.opcode == "opt-barrier" or (i.opcode == "while" and _unchanged(module, i, path)):
        return [(computation, operand, path) for operand in i.operands]
    if i.opcode in ("fusion", "call"):
        (callee,) = called(i)
        return [(callee, module.roots[callee], path)]
    if 'custom_call_target="ConcatBitcast"' in i.attributes:
        return [(computation, operand, path) for operand in i.operands]
    if i.opcode not in _MOVES:
        return None
    return [(computation, operand, ()) for operand in i.operands[_MOVES[i.opcode]]]


def _unchanged(module: Module, loop: Instruction, path: tuple[int, ...]) -> bool:
    """Tell whether the element `path` of a loop's carry is the same in all iterations."""
    root = module.root(_attribute(loop, "body"))
    if not path or root.opcode != "tuple":
        return False
    element = module.computations[root.computation][root.operands[path[0]]]
    return element.opcode == "get-tuple-element" and (
        int(_attribute(element, "index")) == path[0]
        and module.computations[root.computation][element.operands[0]].opcode == "parameter"
    )


def _attribute(i: Instruction, key: str) -> str:
    match = re.search(rf"\b{key}=%?([\w.\-]+)", i.attributes)
    assert match, (key, i)
    return match[1]
