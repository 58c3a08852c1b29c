"""Which collectives of a TPU program overlap with other work, and for how long.

The text of a compiled program is its schedule. A collective in a single instruction makes its chip
wait; work scheduled between the start and the end of an asynchronous collective overlaps with it.
The TPU compiler writes asynchronous collectives in three ways: `all-gather-start` and `-done`, the
same around a computation (`async-start`), and as a chain of fusions, the first of which calls
`AsyncCollectiveStart` and the last `AsyncCollectiveDone`. The GPU compiler writes the first two.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from jaxrobust.doctor.programs import hlo, hlo_costs

if TYPE_CHECKING:
    from jaxrobust.runtime.devices.hardware import Chip


class InFlight(NamedTuple):
    """An asynchronous collective, over all its runs."""

    kind: str
    sent: float  # bytes, of one chip
    cycles: float  # of the work between its start and end, shared by concurrent collectives;
    # on a GPU, seconds of that work at its rates of memory and products
    row: bool  # whether its messages stay within a part of the slice


def in_flight(module: hlo.Module, gpu: "Chip | None" = None) -> list[InFlight]:
    """List the collectives with separate start and end in the schedule."""
    beside: dict[str, float] = {}
    for name in module.computations:
        beside |= _beside(module, name, gpu)
    return [
        InFlight(c.kind, c.sent * (c.times or 1), beside[c.key] * (c.times or 1), c.row)
        for c in hlo.collectives(module)
        if c.key in beside
    ]


def hidden(under_way: list[InFlight], *, clock: float, interconnect: float) -> float:
    """Add up the bytes for which the work next to them lasts, by a chip's cycles and bytes/s.

    Messages within a row of the slice use half of a chip's links.
    """
    speed = interconnect / clock
    return sum(min(each.sent, each.cycles * speed / (1 + each.row)) for each in under_way)


def _beside(module: hlo.Module, computation: str, gpu: "Chip | None") -> dict[str, float]:
    """Map collectives that start and end in a computation to the cycles in between."""
    under_way: dict[str, float] = {}
    ended: dict[str, float] = {}
    keys: dict[str, tuple[str, ...]] = {}  # the collectives that an instruction starts or continues
    for i in module.computations[computation].values():
        carried = keys.get(i.operands[0], ()) if i.operands else ()
        ends = carried if i.opcode.endswith("-done") else tuple(_chains(module, i, hlo.ENDS))
        ended |= {key: under_way.pop(key) for key in ends if key in under_way}
        if under_way and not ends:
            share = _time(module, i, gpu) / len(under_way)
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
    """Yield the chains that a fusion starts, or ends."""
    if i.opcode != "fusion":
        return
    for callee in hlo.called(i):
        inside = module.computations[callee]
        for call in inside.values():
            if end in call.attributes:
                carried = (inside[name] for name in call.operands)
                yield from filter(None, map(hlo.chain_of, carried))


def _time(module: hlo.Module, i: hlo.Instruction, gpu: "Chip | None") -> float:
    """Return the cycles, or a GPU's seconds, of an instruction, including what it runs."""
    if i.opcode in ("while", "conditional", "call"):
        trips = (hlo.trip_count(module, i) or 1) if i.opcode == "while" else 1
        bodies = (module.computations[name].values() for name in hlo.called(i))
        return trips * sum(_time(module, inner, gpu) for body in bodies for inner in body)
    if i.opcode in hlo_costs.FREE:
        return 0.0
    cost = hlo_costs.cost_of(module, i, gpu)
    return cost.bound_s if gpu else cost.cycles
