"""Copies and matrix products of a Mosaic GPU kernel, counted by following its PTX.

One thread of each warp runs the integer instructions, which decide on branches and on what is
copied; barriers never wait, and values from memory are unknown. Blocks of the grid do alike work:
the first and the last one stand for all.
"""

import functools
import math
import operator
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

_WARPS = 4  # in a group of warps that multiplies together
_COMPARE = {name: getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge")}
_COMPARE |= {"lo": operator.lt, "ls": operator.le, "hi": operator.gt, "hs": operator.ge}
_BINARY: dict[str, Callable[[int, int, int], int]] = {
    "add": lambda a, b, bits: a + b,
    "sub": lambda a, b, bits: a - b,
    "mul.lo": lambda a, b, bits: a * b,
    "mul.wide": lambda a, b, bits: a * b,
    "mul.hi": lambda a, b, bits: a * b >> bits,
    "and": lambda a, b, bits: a & b,
    "or": lambda a, b, bits: a | b,
    "xor": lambda a, b, bits: a ^ b,
    "shl": lambda a, b, bits: a << min(b, bits),
    "shr": lambda a, b, bits: a >> min(b, bits),
    "min": lambda a, b, bits: min(a, b),
    "max": lambda a, b, bits: max(a, b),
    "div": lambda a, b, bits: int(a / b) if b else 0,
    "rem": lambda a, b, bits: a - b * int(a / b) if b else 0,
}
# Waits, which never last, and floating-point numbers, which decide nothing.
_SKIPPED = re.compile(r"LAB_WAIT|DONE|try_wait|P1|\.b?f(16|32)|stmatrix|ldmatrix|fence|^bar\.")
_LINE = re.compile(r"(?:@(!?%p\d+) )?([a-z][\w.:]*)\s*(.*?);?\s*$")


class Kernel(NamedTuple):
    """The work of a kernel in one launch, and what its threads need."""

    name: str
    flops: int  # of matrix products
    copied: int  # bytes from memory or the level-2 cache to shared memory
    distinct: int  # of these, each part of an array once
    registers: int  # of a thread
    spilled: int  # bytes of a thread


class _Step(NamedTuple):
    predicate: str  # a register, after "!" if negated, or ""
    name: str
    operands: list[str]


def _steps(text: str) -> tuple[list[_Step], dict[str, int]]:
    """Parse a kernel's instructions, without waits, and its labels."""
    steps: list[_Step] = []
    labels: dict[str, int] = {}
    for line in text[text.index(".entry") :].splitlines():
        line = line.partition("//")[0].strip()
        if label := re.match(r"(\$\w+):", line):
            labels[label[1]] = len(steps)
        elif product := re.search(r"wgmma\.mma_async\S*\.m\d+n\d+k\d+", line):
            steps.append(_Step("", product[0], []))
        elif (match := _LINE.match(line)) and not _SKIPPED.search(line):
            operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", match[3].replace("|", ","))
            steps.append(_Step(match[1] or "", match[2], operands))
    return steps, labels


class _Thread:
    """The integer registers of a thread, and what its instructions have counted."""

    def __init__(self, thread: int, block: int) -> None:
        self.registers: dict[str, int | None] = {"%tid.x": thread, "%ctaid.x": block}
        self.leads = thread // 32 % _WARPS == 0
        self.flops, self.expected = 0, 0
        self.copies: list[tuple[tuple[Any, ...], int]] = []  # of parts of arrays, with their bytes

    def value(self, word: str) -> int | None:
        return self.registers.get(word) if word[0] == "%" else _number(word)

    def holds(self, predicate: str) -> bool:
        value = self.value(predicate.lstrip("!"))
        if value is None:
            raise ValueError(f"a branch of the kernel depends on {predicate}, which is not known")
        return bool(value) != predicate.startswith("!")

    def run(self, step: _Step) -> None:
        """Run any instruction but a branch."""
        name, operands = step.name, step.operands
        if name.startswith("wgmma.mma"):
            self.flops += _product_flops(name) * self.leads
        elif ".expect_tx" in name:  # each thread of a group expects its share, or one all bytes
            share = self.value(operands[-1]) or 0
            self.expected = share * (1 if step.predicate else 32 * _WARPS)
        elif name.startswith("cp.async.bulk.tensor") and ".shared::cta.global" in name:
            descriptor, *places = re.findall(r"%\w+|\d+", operands[1])
            part = descriptor, *map(self.value, places)
            self.copies.append((part, self.expected))
        elif operands and operands[0].startswith("%"):
            self._assign(name, operands)

    def _assign(self, name: str, operands: list[str]) -> None:
        target, *words = operands
        operation, kind, bits = _operation(name)
        if operation == "elect":  # sets a lane and a predicate
            self.registers[operands[1]] = 1
        values = [self.value(word) for word in words]
        if operation in ("mov", "cvt", "shfl"):
            values = values[:1]
        self.registers[target] = None
        if not bits or not values or None in values:
            return
        numbers = [_wrapped(value or 0, bits, kind == "s") for value in values]
        if operation == "setp":
            _, compare, both, *_ = name.split(".")
            result = int(_COMPARE[compare](numbers[0], numbers[1]))
            if both in ("and", "or"):
                result = _BINARY[both](result, numbers[2], 1)
        elif operation == "selp":
            result = numbers[0] if numbers[2] else numbers[1]
        elif operation == "mad":
            result = numbers[0] * numbers[1] + numbers[2]
        elif operation in ("mov", "cvt", "shfl"):
            result = numbers[0]
        elif operation in _BINARY:
            result = _BINARY[operation](numbers[0], numbers[1], bits)
        else:
            return
        self.registers[target] = _wrapped(result, 64 if "wide" in name else bits, kind == "s")


@functools.cache
def _number(word: str) -> int | None:
    return int(word) if re.fullmatch(r"-?\d+", word) else None


@functools.cache
def _product_flops(name: str) -> int:
    m, n, k = map(int, re.findall(r"[mnk](\d+)", name.rpartition(".")[2]))
    return 2 * m * n * k


@functools.cache
def _operation(name: str) -> tuple[str, str, int]:
    """Split an instruction's name into (operation, kind of integer, bits); 0 bits: no integer."""
    operation = ".".join(name.split(".")[: 2 if name.startswith("mul.") else 1])
    type_ = re.search(r"\.([usb])(16|32|64)\b", name)
    last = type_ if operation == "cvt" else re.search(r".*\.([usb])(16|32|64)$", name)
    if operation == "shfl" and ".idx" not in name:
        last = None
    return (operation, last[1], int(last[2])) if last else (operation, "u", 0)


def _wrapped(value: int, bits: int, signed: bool) -> int:
    value &= (1 << bits) - 1
    return value - (1 << bits) if signed and value >> (bits - 1) else value


def _followed(steps: list[_Step], labels: dict[str, int], thread: int, block: int) -> _Thread:
    state, at = _Thread(thread, block), 0
    while at < len(steps):
        step = steps[at]
        at += 1
        if step.predicate and not state.holds(step.predicate):
            continue
        if step.name.startswith("bra"):
            at = labels[step.operands[0]]
        elif step.name == "ret":
            break
        else:
            state.run(step)
    return state


def counts(text: str, blocks: int) -> dict[str, int]:
    """Count the work of a kernel from its PTX and the number of its blocks."""
    steps, labels = _steps(text)
    threads = _found(r"\.(?:max|req)ntid (\d+)", text)
    flops = copied = 0
    parts: list[dict[tuple[Any, ...], int]] = []
    for block in sorted({0, blocks - 1}):
        parts.append({})
        for thread in range(0, threads, 32):
            done = _followed(steps, labels, thread, block)
            flops += done.flops
            copied += sum(size for _, size in done.copies)
            parts[-1] |= dict(done.copies)
    first, last = parts[0], parts[-1]
    times, common = blocks / len(parts), sum(first[part] for part in first.keys() & last.keys())
    alone = sum(sum(part.values()) - common for part in parts)
    distinct = common + times * alone
    return {
        "flops": round(times * flops),
        "copied": round(times * copied),
        "distinct": round(distinct),
    }


def kernels(folder: Path) -> Iterator[Kernel]:
    """Read the kernels that Mosaic has compiled with this folder as $MOSAIC_GPU_DUMP_TO."""
    for file in sorted(folder.glob("*.ptx")):
        passes = file.with_suffix(".mlir-passes.log").read_text()
        grid = re.findall(r"known_grid_size = array<i32: (\d+), (\d+), (\d+)>", passes)[-1]
        ptxas = file.with_suffix(".ptxas").read_text()
        yield Kernel(
            re.sub(r"_\d+$", "", file.stem),
            registers=_found(r"Used (\d+) registers", ptxas),
            spilled=_found(r"(\d+) bytes spill stores", ptxas),
            **counts(file.read_text(), math.prod(map(int, grid))),
        )


def _found(pattern: str, text: str) -> int:
    return int(re.search(pattern, text)[1])  # type: ignore[index]
