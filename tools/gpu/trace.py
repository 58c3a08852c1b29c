"""A trace of a step, and where its time goes, by kind of operation."""

import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jaxrobust.doctor.programs import hlo

CALLS = ("while", "conditional", "call", "async-start", "async-done")  # their bodies have events
Events = Iterable[tuple[str, str, float]]  # (plane, operation, seconds)


def write(program: Any, folder: Path, steps: int) -> None:
    """Write an XProf trace of `steps` steps, and the compiled module's text with its names."""
    import jax

    program.run()
    with jax.profiler.trace(str(folder)):
        for _ in range(steps):
            program.run()
    if program.executable:
        (folder / "module.hlo").write_text(program.executable.as_text())


def events(folder: Path) -> list[tuple[str, str, float]]:
    """List the operations of a folder's latest trace, on a GPU each kernel."""
    import jax

    operations = []
    latest = max(folder.rglob("*.xplane.pb"), key=lambda file: file.stat().st_mtime)
    for plane in jax.profiler.ProfileData.from_file(str(latest)).planes:
        device = (plane.name or "").startswith("/device:")
        for line in plane.lines:
            if device and not (line.name or "").startswith("Stream"):
                continue  # sums over the streams
            for event in line.events:
                name = dict(event.stats).get("hlo_op") or (event.name if device else None)
                if name:
                    operations.append((plane.name or "", str(name), event.duration_ns / 1e9))
    return operations


def shares(timed: Events, module: hlo.Module) -> tuple[dict[str, float], list[tuple[str, float]]]:
    """Return (share per kind of operation, [(operation, share)]), of the GPU if there is one."""
    timed = list(timed)
    timed = [row for row in timed if row[0].startswith("/device:")] or timed
    by_name = {i.name: i for i in hlo.instructions(module.computations)}
    kinds: defaultdict[str, float] = defaultdict(float)
    operations: defaultdict[str, float] = defaultdict(float)
    for _, name, seconds in timed:
        instruction = by_name.get(name)
        if instruction and instruction.opcode in CALLS:
            continue
        what = kind(instruction, module) if instruction else "other"
        kinds[what] += seconds
        source = re.search(r'op_name="([^"]*)"', instruction.attributes) if instruction else None
        operations[f"{name} ({what}) {source[1] if source else ''}".strip()] += seconds
    total = sum(kinds.values())
    by_kind, by_operation = (
        sorted(((key, s / total) for key, s in part.items()), key=lambda row: -row[1])
        for part in (kinds, operations)
    )
    return dict(by_kind), by_operation


def kind(instruction: hlo.Instruction, module: hlo.Module) -> str:
    """Name the main kind of an operation, or of the fusion behind it."""
    inside = [instruction]
    for computation in hlo.called(instruction):
        inside += module.computations.get(computation, {}).values()
    text = [f"{i.opcode} {i.attributes}" for i in inside]
    convolutions = [t for t in text if t.startswith("convolution ") or "__cudnn$conv" in t]
    if any("_group_count=" in t for t in convolutions):  # printed if it is not 1
        return "depthwise convolution"
    if convolutions:
        return "convolution"
    if any(t.startswith("dot ") or "__cublas" in t for t in text):
        return "matrix product"
    return "other"


def read(folder: Path) -> dict[str, Any]:
    """Return the shares of kinds and of the costliest operations in a folder's latest trace."""
    kinds, operations = shares(events(folder), hlo.parse((folder / "module.hlo").read_text()))
    return {"kinds": kinds, "costliest": dict(operations[:10])}


def shown(folder: Path, traced: dict[str, Any]) -> str:
    """Format the result of `read`."""
    lines = [
        f"{folder}: time of the step's operations (pip install xprof; xprof --logdir {folder})"
    ]
    lines.append("  " + ", ".join(f"{what} {share:.1%}" for what, share in traced["kinds"].items()))
    lines += [f"  {share:6.1%}  {what[:90]}" for what, share in traced["costliest"].items()]
    return "\n".join(lines)
