"""Records as the command line answers with them."""

import math
from collections.abc import Sequence
from pathlib import Path

from jaxrobust.evaluation.questions import corrupted
from jaxrobust.evaluation.records.record import AccuracyRecord
from jaxrobust.evaluation.records.records import attack_line, notes_of


def of_several(found: Sequence[AccuracyRecord], out: Path) -> str:
    """Write the records of several questions for people, a row each; `out` keeps them."""
    rows = [("attack", "px", "clean", "robust", "95 % interval")]
    for record in found:
        ends = record.interval or {"clean": None, "robust": None}
        low, high = ends["robust"] or ends["clean"] or (math.nan, math.nan)
        method = attack_line(record) if record.attacks else str(record.method)
        accuracies = (_percent(record.clean), _percent(record.robust))
        rows.append((method, str(record.image_size), *accuracies, f"{low:.1%} to {high:.1%}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(map(str.rjust, row[1:], widths[1:]))]) for row in rows
    ]
    first = found[0]
    weights = f" ({first.weights})" if first.weights else ""
    flags = dict.fromkeys(f"flag {k}: {text}" for r in found for k, text in r.flags.items())
    remarks = dict.fromkeys(line for record in found for line in notes_of(record))
    return "\n".join(
        [
            f"\n{_network(first)}{weights}",
            f"{first.dataset}, split {first.split}, images {first.image_ids}",
            *lines,
            *remarks,
            *flags,
            f"records {', '.join(str(r.evaluation) for r in found)} in {out / 'results.jsonl'}",
        ]
    )


def of_one(record: AccuracyRecord, out: Path) -> str:
    """Write a record of an evaluation for people; `out` is the folder that keeps it."""
    rows = {} if record.clean is None else {"clean": record.clean}
    rows |= {f"after {k}": v for k, v in (record.accuracy_after or {}).items() if v is not None}
    width = max([16, *map(len, rows)])
    weights = f" ({record.weights}), {record.dtype}" if record.weights else ""
    lines = [
        f"\n{_network(record)}{weights}",
        f"{record.dataset}, split {record.split}, images {record.image_ids}",
        f"attack: {attack_line(record)}",
        *(f"{name:{width}} {value:7.1%}" for name, value in rows.items()),
        *(corrupted.table(record.corruptions) if record.corruptions else ()),
        *notes_of(record),
        *(f"flag {name}: {text}" for name, text in record.flags.items()),
        f"record {record.evaluation} in {out / 'results.jsonl'}",
    ]
    return "\n".join(lines)


def _network(record: AccuracyRecord) -> str:
    return str((record.model or {}).get("name"))


def _percent(accuracy: float | None) -> str:
    return "-" if accuracy is None else f"{accuracy:.1%}"
