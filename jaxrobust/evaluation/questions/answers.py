"""Records as the command line answers with them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxrobust.evaluation.questions import corrupted
from jaxrobust.evaluation.records.records import how, said


def of_several(found: Sequence[dict[str, Any]], out: Path) -> str:
    """Return the records of several questions for people, a row each; `out` keeps them."""
    rows = [("attack", "px", "clean", "robust", "95 % interval")]
    for record in found:
        low, high = record["interval"]["robust"] or record["interval"]["clean"]
        method = how(record) if record["attacks"] else record["method"]
        robust = "-" if record["robust"] is None else f"{record['robust']:.1%}"
        size, clean = str(record["model"]["image_size"]), f"{record['clean']:.1%}"
        rows.append((method, size, clean, robust, f"{low:.1%} to {high:.1%}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(map(str.rjust, row[1:], widths[1:]))]) for row in rows
    ]
    first = found[0]
    named = f" ({first['weights']})" if first["weights"] else ""
    flags = dict.fromkeys(f"flag {k}: {text}" for r in found for k, text in r["flags"].items())
    notes = dict.fromkeys(line for record in found for line in said(record))
    return "\n".join(
        [
            f"\n{first['model']['name']}{named}",
            f"{first['dataset']}, split {first['split']}, images {first['image_ids']}",
            *lines,
            *notes,
            *flags,
            f"records {', '.join(str(r['evaluation']) for r in found)} in {out / 'results.jsonl'}",
        ]
    )


def of_one(record: dict[str, Any], out: Path) -> str:
    """Return a record of an evaluation for people; `out` is the folder that keeps it."""
    rows = {} if record["clean"] is None else {"clean": record["clean"]}
    rows |= {f"after {name}": value for name, value in record["accuracy_after"].items()}
    width = max([16, *map(len, rows)])
    known = (f" ({record['weights']})", f", {record['dtype']}") if record["weights"] else ()
    lines = [
        f"\n{record['model']['name']}{''.join(known)}",
        f"{record['dataset']}, split {record['split']}, images {record['image_ids']}",
        f"attack: {how(record)}",
        *(f"{name:{width}} {value:7.1%}" for name, value in rows.items()),
        *(corrupted.table(record["corruptions"]) if "corruptions" in record else ()),
        *said(record),
        *(f"flag {name}: {text}" for name, text in record["flags"].items()),
        f"record {record['evaluation']} in {out / 'results.jsonl'}",
    ]
    return "\n".join(lines)
