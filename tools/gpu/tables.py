"""Tables of the figures of `bench_gpu.py`, in Markdown."""

import statistics
from typing import Any

from tools.gpu.figures import SIDES, Row, chosen

Label = tuple[str, tuple[str, ...]]  # a network and its options


def largest(rows: list[Row]) -> dict[str, int]:
    """Return the largest batch that fits each side, from the steps of one network."""
    fitted = [row["of"] for row in rows if row["figure"]]
    searched = [of for of in fitted if of["turn"] == 0] or fitted  # none if the batch was given
    fitting = {side: [of["batch"] for of in searched if of["side"] == side] for side in SIDES}
    return {side: max(batches) for side, batches in fitting.items() if batches}


def summary(rows: list[Row]) -> dict[str, Any] | None:
    """Summarize the steps of one network; None if no turn is finished."""
    runs: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        if row["figure"]:
            runs.setdefault((row["of"]["side"], row["of"]["batch"]), []).append(row)
    sides, speed = [], {}
    for (side, batch), measured in runs.items():
        turns = [row["figure"] for row in measured if row["of"]["turn"]]
        if not turns:
            continue
        speeds = [figure["images_per_s"] for figure in turns]
        speed[side, batch] = statistics.median(speeds)
        mfu = [figure["mfu"] for figure in turns if figure["mfu"]]
        sides.append(
            {
                "side": side,
                "batch": batch,
                "images_per_s": speed[side, batch],
                "rounds": speeds,
                "mfu": statistics.median(mfu) if mfu else None,
                "peak_memory": max(figure["peak_memory"] or 0 for figure in turns) or None,
                # The first process compiles, the others read its cache.
                "compile_s": max(row["figure"]["compile_s"] for row in measured),
            }
        )
    if not sides:
        return None
    own = largest(rows)
    common = dict.fromkeys(SIDES, min(own.values()))
    ratios = {}
    for key, batches in {"ratio_largest": own, "ratio_same_batch": common}.items():
        ours, theirs = (speed.get((side, batches.get(side, 0))) for side in SIDES)
        ratios[key] = ours / theirs if ours and theirs else None
    device = next(row["figure"]["device"] for row in rows if row["figure"])
    return {"device": device, "rows": sides, **ratios}


def report(there: dict[str, str], rows: list[Row]) -> str:
    """Return the tables of all figures of a file."""
    about = ", ".join(f"{key} {value}" for key, value in there.items())
    labels = {(row["of"]["network"], tuple(row["of"]["options"])): None for row in rows}
    tables = [
        _table(head, [line for label in labels for line in lines(rows, label)])
        for head, lines in TABLES.items()
    ]
    return "\n\n".join([f"Measured on: {about}.", *filter(None, tables)])


def _table(head: str, lines: list[list[str]]) -> str:
    if not lines:
        return ""
    rule = "|" + "---|" * len(head.split(" | "))
    return "\n".join([f"| {head} |", rule, *(f"| {' | '.join(line)} |" for line in lines)])


def _shown(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _label(network: Label) -> str:
    return " ".join([network[0], *network[1]])


def _steps(rows: list[Row], network: Label) -> list[list[str]]:
    lines = []
    sums = summary(chosen(rows, *network, "step"))
    for row in sums["rows"] if sums else ():
        memory = row["peak_memory"] and row["peak_memory"] / 1e9
        line = [_label(network), row["side"], str(row["batch"]), f"{row['images_per_s']:.1f}"]
        line += [_shown(row["mfu"], ".1%"), _shown(memory, ".1f"), f"{row['compile_s']:.0f}"]
        lines.append(line)
    return lines


def _ratios(rows: list[Row], network: Label) -> list[list[str]]:
    sums = summary(chosen(rows, *network, "step"))
    keys = ("ratio_largest", "ratio_same_batch")
    return [[_label(network), *(_shown(sums[key], ".2f") for key in keys)]] if sums else []


def _logits(rows: list[Row], network: Label) -> list[list[str]]:
    lines = []
    for row in chosen(rows, *network, "logits"):
        label = ", ".join([_label(network), *filter(None, [row["of"].get("variant")])])
        errors = row["figure"] or {}
        lines.append([label, *(_shown(errors.get(key), ".4f") for key in (*SIDES, "between"))])
    return lines


def _variants(rows: list[Row], network: Label) -> list[list[str]]:
    sums = summary(chosen(rows, *network, "step")) or {"rows": []}
    plain = {(row["side"], row["batch"]): row["images_per_s"] for row in sums["rows"]}
    lines = []
    for row in chosen(rows, *network, "variant"):
        batch, figure = row["of"]["batch"], row["figure"] or {"refused": "out of memory"}
        line = [_label(network), row["of"]["variant"], str(batch)]
        if "refused" in figure:
            lines.append([*line, "", figure["refused"].replace("|", "/")])
            continue
        before = plain.get((SIDES[0], batch))
        ratio = before and figure["images_per_s"] / before
        lines.append([*line, f"{figure['images_per_s']:.1f}", _shown(ratio, ".3f")])
    return lines


def _autoattack(rows: list[Row], network: Label) -> list[list[str]]:
    lines = []
    for row in chosen(rows, *network, "autoattack"):
        of, figure = row["of"], row["figure"]
        if figure is None:
            continue
        passes = (figure["forward"] + figure["backward"]) / figure["wall_s"]
        line = [_label(network), of["variant"], of["side"], str(of["batch"])]
        line += [f"{figure['wall_s']:.1f}", _shown(figure.get("attacks_s"), ".1f")]
        line += [_shown(figure.get(key), ".1f") for key in ("first_s", "compile_s")]
        lines.append([*line, f"{passes:.0f}"])
    return lines


TABLES = {
    "bfloat16 logits of | jaxrobust's error | PyTorch's error | between them": _logits,
    "step of | side | batch | images/s | MFU | memory, GB | compiled in, s": _steps,
    "jaxrobust / PyTorch | at the largest batches | at the same batch": _ratios,
    "step of | variant | batch | images/s | of the speed without it": _variants,
    "AutoAttack on | how | side | images | s | attacks | first | compiled | passes/s": _autoattack,
}
