"""Which collectives of a TPU program overlap with other work, and how long that lasts.

The text of a compiled program is its schedule. A collective that stands there as one instruction
makes its chip wait; what is scheduled between the start and the end of an asynchronous one runs
next to it. The TPU compiler writes those in three ways: `all-gather-start` and `-done`, the same
around a computation (`async-start`), and as a chain of fusions, the first of which calls
`AsyncCollectiveStart` and the last `AsyncCollectiveDone`.
"""

from collections.abc import Iterator
from typing import NamedTuple

from jaxrobust.doctor.programs import hlo
from jaxrobust.doctor.programs.hlo_costs import cycles_of


class InFlight(NamedTuple):
    """An asynchronous collective, in all its runs."""

    kind: str
    sent: float  # bytes, of one chip
    cycles: float  # of the work between its start and its end; shared, where several are under way
    row: bool  # whether its messages stay in a part of the slice


def in_flight(module: hlo.Module) -> list[InFlight]:
    """List the collectives that begin and end in two places of the schedule."""
    beside: dict[str, float] = {}
    for name in module.computations:
        beside |= _beside(module, name)
    return [
        InFlight(c.kind, c.sent * (c.times or 1), beside[c.key] * (c.times or 1), c.row)
        for c in hlo.collectives(module)
        if c.key in beside
    ]


def hidden(under_way: list[InFlight], *, clock: float, interconnect: float) -> float:
    """Add up the bytes for which the work next to them lasts, at a chip's cycles and bytes a
    second.

    Messages in a row of the slice have half of a chip's links.
    """
    speeds = (interconnect / (2 if each.row else 1) for each in under_way)
    return sum(
        min(each.sent, each.cycles / clock * speed)
        for each, speed in zip(under_way, speeds, strict=True)
    )


def _beside(module: hlo.Module, computation: str) -> dict[str, float]:
    """{key of a collective that starts and ends in a computation: cycles between the two}."""
    under_way: dict[str, float] = {}
    ended: dict[str, float] = {}
    keys: dict[str, tuple[str, ...]] = {}  # what an instruction has started, or carries on
    for i in module.computations[computation].values():
        carried = keys.get(i.operands[0], ()) if i.operands else ()
        ends = carried if i.opcode.endswith("-done") else tuple(_chains(module, i, hlo.ENDS))
        ended |= {key: under_way.pop(key) for key in ends if key in under_way}
        if under_way and not ends:
            share = _cycles(module, i) / len(under_way)
            under_way = {key: before + share for key, before in under_way.items()}
        starts = tuple(_started(module, i))
        under_way |= dict.fromkeys(starts, 0.0)
        keys[i.name] = carried if i.opcode.endswith("-update") else starts
    return ended


def _started(module: hlo.Module, i: hlo.Instruction) -> Iterator[str]:
    if i.opcode.endswith("-start") and i.opcode.removesuffix("-start") in hlo.KINDS:
        yield hlo.chain_of(i) or i.name
    elif i.opcode == "async-start":
        for callee in hlo.called(i):
            for inner in module.computations[callee].values():
                if inner.opcode in hlo.KINDS:
                    yield hlo.chain_of(inner) or inner.name
    else:
        yield from _chains(module, i, hlo.STARTS)


def _chains(module: hlo.Module, i: hlo.Instruction, end: str) -> Iterator[str]:
    """Yield the chains of which a fusion is the start, or the end."""
    if i.opcode != "fusion":
        return
    for callee in hlo.called(i):
        inside = module.computations[callee]
        for call in inside.values():
            if end in call.attributes:
                carried = (inside[name] for name in call.operands)
                yield from filter(None, map(hlo.chain_of, carried))


def _cycles(module: hlo.Module, i: hlo.Instruction) -> float:
    """Of an instruction, with what it runs."""
    if i.opcode in ("while", "conditional", "call"):
        trips = (hlo.trip_count(module, i) or 1) if i.opcode == "while" else 1
        bodies = (module.computations[name].values() for name in hlo.called(i))
        return trips * sum(_cycles(module, inner) for body in bodies for inner in body)
    return cycles_of(i)
