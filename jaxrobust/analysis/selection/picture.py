"""A picture of what the candidates for a checkpoint reach, over the epochs."""

from pathlib import Path
from typing import Any

from jaxrobust.analysis.plotting import plotting

_COLOURS = ("#1f4e79", "#d1495b", "#3c896d", "#b07d2b", "#6b4c9a", "#5f6b73")


def draw(said: dict[str, Any], path: Path) -> str:
    """Draw both accuracies over the epochs; return the picture's path, or why there is none."""
    try:
        plt = plotting()
    except ValueError as error:
        return f"no curve: {error}"
    figure, panel = plt.subplots(figsize=(7, 4.2), layout="constrained")
    rows, chosen = said["candidates"], said["chosen"]
    lines = sorted({(row["image_size"], row["weights"]) for row in rows})
    for i, (size, which) in enumerate(lines):
        own = [row for row in rows if (row["image_size"], row["weights"]) == (size, which)]
        epochs, colour = [row["epoch"] for row in own], _COLOURS[i % len(_COLOURS)]
        for key, style in (("robust", "o-"), ("clean", "o--")):
            values = [100 * row[key] for row in own]
            panel.plot(
                epochs, values, style, ms=3, color=colour, label=f"{key}, {which}, {size} px"
            )
    metric = said["metric"]
    at = (chosen["epoch"], 100 * chosen[metric])
    panel.plot(*at, "*", ms=14, color="black", label="chosen", zorder=0)
    steps = said["attack"]["steps"]
    bounds = not all(row.get("exact", True) for row in rows)
    attack = (
        said["attack"]["name"]
        + (", upper bounds" if bounds else "")
        + (f", {steps} steps" if steps else "")
    )
    panel.set(xlabel=f"epoch of {said['phase']}", ylabel="accuracy, %", ylim=(0, 103))
    panel.set_title(f"{said['dataset']}, split {said['split']}: {attack}", fontsize=9)
    panel.legend(fontsize=7, ncols=2)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return str(path)
