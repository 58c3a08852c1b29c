"""An account as lines for people."""

from typing import Any


def page(found: dict[str, Any]) -> str:
    """Return the table of phases, what each part takes, and what is assumed."""
    lines = [f"{found['model']} on {found['dataset']}, {found['device']} ({found['on']})", ""]
    lines += _table([_row(row, found) for row in found["phases"]])
    lines += [_parts(row) for row in found["phases"]]
    lines += [_bound(row) for row in found["phases"] if "roofline" in row]
    lines += ["", f"training: {_costs(found['training'])}"]
    if aa := found.get("autoattack"):
        lines += [
            f"AutoAttack of {aa['images']:,} images: {_costs(aa['expected'])} if "
            f"{aa['robust']:.0%} are robust,",
            f"  at most {_costs(aa['at_most'])}, if all are "
            f"({sum(aa['passes_per_image'].values()):,} passes each)",
        ]
    how = (
        "Measured: the programs were compiled and run on this machine, for a moment each."
        if found["measured"]
        else "Computed, not measured: no step has run on such chips."
    )
    return "\n".join([*lines, "", how, *(f"Assumed: {line}" for line in found["assumed"])])


def _row(row: dict[str, Any], found: dict[str, Any]) -> dict[str, str]:
    """Return the cells of a phase by the heads of their columns."""
    attack = f", {row['attack_steps']} steps" if row["attack_steps"] else ""
    cells = {
        "phase": row["phase"],
        "": f"{row['objective']}{attack}, {row['image_size']} px",
        "epochs": f"{row['epochs']}",
        "images": f"{row['images_per_epoch']:,}",
        "GFLOP/image": f"{row['flops_per_image'] / 1e9:,.3g}",
        "images/s": f"{row['images_per_s']:,.0f}",
        "per chip": f"{row['images_per_s_per_chip']:,.0f}",
        "GiB/chip": f"{row['memory_bytes'] / 2**30:.2f}",
        "time": _seconds(row["seconds"]),
        "chip-hours": f"{row['chip_hours']:,.3g}",
    }
    if row["mfu"] is not None:
        cells["MFU"] = f"{row['mfu']:.0%}"
    return cells | ({"money": f"{row['money']:,.2f}"} if "money" in row else {})


def _table(rows: list[dict[str, str]]) -> list[str]:
    heads = list(rows[0])
    widths = {head: max(len(head), *(len(row[head]) for row in rows)) for head in heads}
    words = heads[:2]

    def line(cells: dict[str, str]) -> str:
        found = (
            f"{cells[h]:{widths[h]}}" if h in words else f"{cells[h]:>{widths[h]}}" for h in heads
        )
        return "  ".join(found).rstrip()

    return [line({head: head for head in heads}), *map(line, rows)]


def _parts(row: dict[str, Any]) -> str:
    """Return what the time of a phase consists of, the longest part first."""
    parts = {key: s for key, s in row["parts_s"].items() if s > 0}
    order = sorted(parts, key=lambda key: -parts[key])
    return f"  {row['phase']}: " + ", ".join(f"{key} {_seconds(parts[key])}" for key in order)


def _bound(row: dict[str, Any]) -> str:
    r = row["roofline"]
    each = ", ".join(f"{key} {1e3 * s:.1f} ms" for key, s in r["roofline_s"].items())
    return (
        f"  {row['phase']}, roofline of the executable: {1e3 * r['roofline_step_s']:.1f} ms per "
        f"step, {r['roofline_images_per_s_per_chip']:,.0f} images/s per chip at best, bound by "
        f"{r['bound_by']} ({each})"
    )


def _costs(costs: dict[str, float]) -> str:
    money = f", {costs['money']:,.2f} in money" if "money" in costs else ""
    return f"{_seconds(costs['seconds'])}, {costs['chip_hours']:,.3g} chip-hours{money}"


def _seconds(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"
