"""An account as lines for people, no wider than the terminal."""

import itertools
import textwrap
from collections.abc import Iterable, Iterator
from typing import Any

_GAP = 3  # columns between two phases
_UNDER = "  "  # indent of a row that is part of the one above


def page(result: dict[str, Any], *, width: int = 80) -> str:
    """Lay out a column per phase, the total costs and the assumptions in `width` columns."""
    on = f"{result['slices']} slices of {result['on']}" if "slices" in result else result["on"]
    lines = [f"{result['model']} on {result['dataset']}, {result['device']} ({on})"]
    columns = [_column(row, result) for row in result["phases"]]
    for group in _fitting(columns, width):
        lines += ["", *_table(group)]
    lines += ["", *_sums(result)]
    lines += ["", *result["known"], *(f"Assumed: {line}" for line in result["assumed"])]
    return "\n".join(part for line in lines for part in _wrapped(line, width))


def _wrapped(line: str, width: int) -> list[str]:
    if len(line) <= width:
        return [line]
    options: Any = {"break_long_words": False, "break_on_hyphens": False}
    indent = " " * (len(line) - len(line.lstrip()) + 2)
    return textwrap.wrap(line, width, subsequent_indent=indent, **options)


def _column(row: dict[str, Any], result: dict[str, Any]) -> dict[str, str]:
    steps = f", {row['attack_steps']}-step attack" if row["attack_steps"] else ""
    steps += f", {row['attack_norms']}" if row.get("attack_norms") else ""
    several = result["chips"] > 1
    per_chip = f" ({row['images_per_s_per_chip']:,.0f} a chip)" if several else ""
    memory = f" of {result['chip_memory'] / 2**30:.0f} GiB" if result["chip_memory"] else ""
    cells = {
        "phase": row["phase"],
        "objective": f"{row['objective']}{steps}",
        "images": f"{row['images_per_epoch']:,} of {row['image_size']} px",
        "epochs": f"{row['epochs']:,}",
        "steps": f"{row['steps']:,} of {row['batch_size']:,} images",
        "GFLOP per image": f"{row['flops_per_image'] / 1e9:,.3g}",
        "seconds per step": f"{row['step_s']:.3g}",
        "images/s": f"{row['images_per_s']:,.0f}{per_chip}",
    }
    if row["mfu"] is not None:
        cells["share of peak FLOP/s"] = f"{row['mfu']:.1%}"
    name = "memory per chip" if result["on"] != "cpu" else "memory"
    cells[name] = f"{_bytes(row['memory_bytes'])}{memory}"
    if "activation_bytes" in row:
        cells[f"{_UNDER}activations, counted"] = _bytes(row["activation_bytes"])
    if roofline := row.get("roofline"):
        step = f"{1e3 * roofline['roofline_step_s']:.1f} ms"
        cells["roofline per step"] = f"{step}, by {_BOUNDS[roofline['bound_by']]}"
        for key, name in _BOUNDS.items():
            if f"{key}_s" in roofline:
                cells[f"{_UNDER}{name}"] = f"{1e3 * roofline[f'{key}_s']:.1f} ms"
        best = roofline["roofline_images_per_s_per_chip"]
        cells[f"{_UNDER}images/s at best"] = f"{best:,.0f} a chip"
    if "network_bytes" in row:
        took = f", {1e3 * row['network_s']:.1f} ms" if row["network_s"] else ""
        cells["to other slices per step"] = f"{_bytes(row['network_bytes'])}{took}"
    cells["time"] = duration(row["seconds"])
    for key, seconds in row["parts_s"].items():
        cells[f"{_UNDER}{_PARTS.get(key, key)}"] = duration(seconds) if seconds else ""
    if result["on"] != "cpu":
        cells["chip-hours"] = f"{row['chip_hours']:,.3g}"
    return cells | ({"money": _money(row["money"])} if "money" in row else {})


_BOUNDS = {"flops": "arithmetic", "hbm": "memory traffic", "cycles": "cycles"}
_BOUNDS |= {"ici": "interconnect", "network": "network between slices"}
_PARTS = {"selection": "selection split", "test": "test split", "compile": "compilation"}


def _fitting(columns: list[dict[str, str]], width: int) -> Iterator[list[dict[str, str]]]:
    free = width - _width(itertools.chain(*columns))
    group: list[dict[str, str]] = []
    for column in columns:
        if group and sum(_width(c.values()) + _GAP for c in (*group, column)) > free:
            yield group
            group = []
        group.append(column)
    yield group


def _width(texts: Iterable[str]) -> int:
    return max(map(len, texts))


def _table(columns: list[dict[str, str]]) -> list[str]:
    first, lines = _width(itertools.chain(*columns)), []
    for name in columns[0]:
        if any(column[name] for column in columns):
            cells = (f"{column[name] or '-':{_width(column.values())}}" for column in columns)
            lines.append((" " * _GAP).join([f"{name:{first}}", *cells]).rstrip())
    return lines


def _sums(result: dict[str, Any]) -> list[str]:
    costs = {"training": result["training"]}
    if aa := result.get("autoattack"):
        costs[f"AutoAttack, {aa['images']:,} images, {aa['robust']:.0%} robust"] = aa["expected"]
        if aa["robust"] < 1:
            passes = sum(aa["passes_per_image"].values())
            costs[f"{_UNDER}all robust, {passes:,} passes each"] = aa["at_most"]
    heads = ["time"] + ["chip-hours"] * (result["on"] != "cpu")
    heads += ["money"] * ("money" in result["training"])
    rows = {"": heads}
    for name, one in costs.items():
        money = [_money(one["money"])] if "money" in one else []
        rows[name] = [duration(one["seconds"]), f"{one['chip_hours']:,.3g}", *money][: len(heads)]
    first = max(map(len, rows))
    return [f"{name:{first}}" + "".join(f"  {c:>10}" for c in row) for name, row in rows.items()]


def _money(money: float) -> str:
    return f"{money:,.2f}" if money >= 0.01 else "< 0.01"


def _bytes(number: float) -> str:
    return f"{number / 2**30:.1f} GiB" if number >= 2**30 / 10 else f"{number / 2**20:.1f} MiB"


def duration(seconds: float) -> str:
    """Format seconds for people."""
    if seconds < 1:
        return f"{1e3 * seconds:.0f} ms"
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"
