"""Cycles and busy units of a TPU program's operations, from the compiler's final schedule.

A bundle is what a chip starts in one cycle. The compiler writes the bundles of each fusion and
kernel, and how many slots of each unit a bundle takes. A loop's bundles count as often as the
comparison at its end says, and a stage of a pipeline as often as its guard says. A branch that
depends on anything else counts as taken, and waiting for memory is in no bundle.
"""

import math
import operator
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from jaxrobust.doctor.programs import hlo, hlo_costs
from tools.hlo import parts

if TYPE_CHECKING:
    from jaxrobust.runtime.devices.hardware import Chip

_FUNCTIONS: dict[str, Callable[..., int]] = {
    "pnand": lambda a, b: not (a and b),
    "por": operator.or_,
    "pneg": operator.not_,
    "sadd.s32": operator.add,
    **{
        f"scmp.{name}.s32": getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge")
    },
}


def flags(folder: Path) -> str:
    """Return the value of `LIBTPU_INIT_ARGS` with which the compiler writes into `folder`."""
    return (
        f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex="
        "^final_(bundles|hlo-static-per-bundle-utilization)$"
    )


def schedules(folder: Path) -> dict[str, "Schedule"]:
    """Read the works that the compiler wrote since the last call, by instruction."""
    files: dict[str, dict[str, Path]] = {}
    for file in sorted(folder.glob("*-final_*")):  # the time; TLP is the program around them
        if match := re.fullmatch(r"\d+-(?!TLP)(.+?)-\d+-final_(bundles|hlo-.*)\.txt", file.name):
            files.setdefault(match[1], {})[match[2][:3]] = file
    found = {
        name: schedule(both["bun"].read_text(), both["hlo"].read_text())
        for name, both in files.items()
        if len(both) == 2
    }
    for file in folder.iterdir():
        file.unlink()
    return found


def read(module: hlo.Module, folder: Path, count: int = 10) -> dict[str, Any]:
    """Read a program's heaviest works, and the cycles and bytes of all.

    The compiler writes one schedule for all works of the same types and costs. Instructions of one
    line with one schedule are one work. A work without a schedule counts with its estimate.
    """
    found, costs = schedules(folder), hlo_costs.works(module)

    def alike(cost: hlo_costs.InstructionCost) -> tuple[Any, ...]:
        i, runs = cost.instruction, cost.runs or 1
        types = [module.computations[i.computation][operand].type for operand in i.operands]
        return i.opcode, i.type, *types, cost.cycles / runs, cost.flops / runs

    of = {alike(c): found[c.instruction.name] for c in costs if c.instruction.name in found}
    works: dict[tuple[Any, ...], dict[str, Any]] = {}
    waits: list[tuple[float, float, bool]] = []
    for cost, row in zip(costs, parts.each(module), strict=True):
        i, scheduled = cost.instruction, of.get(alike(cost))
        moved = 0 if i.opcode.endswith("-start") else cost.bytes  # these run during other works
        cycles = cost.runs * scheduled.cycles if scheduled else cost.cycles
        waits.append((cycles, moved, scheduled is not None))
        if scheduled and cost.runs:
            once = {"estimate": cost.cycles / cost.runs, "bundles": scheduled.cycles}
            about = {"part": row.part, "kind": row.kind, "line": row.line, "work": i.name}
            new = about | once | {"units": scheduled.units, "runs": 0}
            works.setdefault((*row[:3], scheduled.cycles), new)["runs"] += cost.runs
    if not works:
        raise ValueError("--bundles: the compiler wrote no schedule of this program's operations")
    heaviest = sorted(works.values(), key=lambda work: -work["runs"] * work["bundles"])[:count]
    return {"schedules": heaviest, "scheduled_costs": waits}


def total(figures: dict[str, Any], chip: "Chip", flops: float) -> dict[str, Any]:
    """Sum the works' seconds: each takes its cycles, or longer for its bytes of HBM.

    The sum is at least the time of all bytes. {}: the chip's clock is unknown.
    """
    costs = figures.pop("scheduled_costs")
    if not chip.clock:
        return {}
    cycles = sum(cost[0] for cost in costs)
    works = sum(max(c / chip.clock, b / chip.bandwidth) for c, b, _ in costs)
    seconds = max(works, figures["hbm_bytes"] / chip.bandwidth)
    return {
        "scheduled_s": seconds,
        "scheduled_share": sum(c for c, _, read in costs if read) / cycles,
        "cycles_alone_s": cycles / chip.clock,
        "peak_share": flops / chip.flops / seconds,
    }


def lines(works: Sequence[dict[str, Any]], sums: dict[str, Any]) -> Iterator[str]:
    """Format the heaviest works as a table, and the program's time."""
    yield "1000 cycles    bundles  busiest unit  heaviest operations, estimate and bundles"
    for work in works:
        estimate, bundles = (work["runs"] * work[key] / 1e3 for key in ("estimate", "bundles"))
        unit, share = max(work["units"].items(), key=lambda unit: unit[1])
        yield (
            f"{estimate:11,.0f} {bundles:10,.0f}  {unit:5} {share:6.1%}  {work['part']}, "
            f"{work['kind']}: {work['line']} ({work['work']}, {work['runs']} runs)"
        )
    if "scheduled_s" in sums:
        yield (
            f"by the schedule, not measured: {1e3 * sums['scheduled_s']:.1f} ms, "
            f"{sums['peak_share']:.1%} of the peak FLOP/s; {1e3 * sums['cycles_alone_s']:.1f} ms "
            f"without waiting for memory; {sums['scheduled_share']:.1%} of the cycles are bundles"
        )


class Schedule(NamedTuple):
    """One execution of a work: its cycles, and the share of them in which each unit is busy."""

    cycles: float
    units: dict[str, float]


def schedule(bundles: str, utilization: str) -> Schedule:
    """Read the compiler's two files of a work."""
    lines = [line for line in bundles.splitlines() if re.match(r" *(0|0x[0-9a-f]+) ", line)]
    _, names, capacities, _, *rows = utilization.splitlines()
    turns = _turns(lines)
    busy = [0.0] * len(names.split(","))
    for times, row in zip(turns, rows, strict=True):
        for unit, slots in enumerate(row.split()):
            busy[unit] += times * int(slots)
    cycles = sum(turns)
    totals = zip(names.split(","), busy, map(int, capacities.split()), strict=True)
    # Spills and fills are part of the stores and loads.
    units = {n.strip(): b / c / cycles for n, b, c in totals if ":" not in n}
    return Schedule(cycles, units)


def _turns(lines: Sequence[str]) -> list[int]:
    """Count the executions of each bundle."""
    starts: dict[str, int] = {}
    ends: dict[str, int] = {}
    values: dict[str, str] = {}
    branches: list[tuple[int, str, str, str]] = []
    for index, line in enumerate(lines):
        for word, region in re.findall(r"(Start|End|Start/End empty) region (\d+)", line):
            ends[region] = index
            if word != "End":
                starts[region] = index
        unconditional = re.sub(r" \(!?%\w+\),", "", line)
        values |= re.findall(r"%(\w+) = ([^;}/]*)", unconditional)
        branch = re.search(r"sbr\.rel \((!?)%(\w+)\) target = \$region(\d+)", line)
        if branch:
            branches.append((index, branch[1], branch[2], branch[3]))
    branches = [branch for branch in branches if branch[3] in starts]  # the file names it
    # In which turns of the loops around it each bundle runs.
    turns: list[dict[str, frozenset[int]]] = [{} for _ in lines]
    loops = [branch for branch in branches if starts[branch[3]] <= branch[0]]
    for _, _, test, region in loops:
        counter, count = _loop(values, test)
        for bundle in turns[starts[region] : ends[region] + 1]:
            bundle[counter] = frozenset(count)
    for index, negated, test, region in branches:
        for counter, steps in turns[index].items():
            taken = {turn: _value(values, test, {counter: turn}) for turn in steps}
            if starts[region] > index and None not in taken.values():
                passed = frozenset(turn for turn in steps if bool(taken[turn]) == bool(negated))
                for bundle in turns[index + 1 : starts[region]]:
                    bundle[counter] &= passed
    return [math.prod(map(len, bundle.values())) for bundle in turns]


def _loop(values: dict[str, str], test: str) -> tuple[str, range]:
    """Return a loop's counter and its values, from the comparison at the loop's end."""

    def copied(name: str) -> str:
        move = re.match(r"smov %(\w+)", values.get(name, ""))
        return copied(move[1]) if move else name

    def constant(pattern: str, name: str, default: int) -> int:
        match = re.match(pattern, values.get(name, ""))
        return int(match[1]) if match else default

    comparison = re.match(r"scmp\.ge\.s32\.totalorder %(\w+), (\d+)", values.get(test, ""))
    if not comparison:  # a count that only the run knows
        return test, range(1)
    following, stop = comparison[1], int(comparison[2])
    phis = {counter: re.match(r"sphi %(\w+), %(\w+)", value) for counter, value in values.items()}
    for counter, phi in phis.items():
        if phi and copied(phi[2]) == following:
            start = constant(r"smov (\d+)", phi[1], 0)
            return counter, range(start, stop, constant(r"sadd\.s32 (\d+),", following, 1))
    return test, range(stop)


def _value(values: dict[str, str], name: str, turn: dict[str, int]) -> int | None:
    """Compute a number or a condition in a turn of a loop; None: it depends on something else."""
    if re.fullmatch(r"\d+", name):
        return int(name) - (int(name) >> 31 << 32)
    if name in turn:
        return turn[name]
    if not re.fullmatch(r"[\w.]+ [%\w, ]+", value := values.get(name, "")):
        return None
    function, *arguments = re.findall(r"[\w.]+", value)
    call = _FUNCTIONS.get(function.removesuffix(".totalorder"))
    operands = [_value(values, argument, turn) for argument in arguments] if call else [None]
    return None if call is None or None in operands else call(*operands)
