"""What the runs cost that a run starts from, where they are not finished."""

from pathlib import Path
from typing import Any

from jaxrobust.config import Config
from jaxrobust.doctor.estimate import account
from jaxrobust.doctor.estimate.devices import Target
from jaxrobust.weights.trained import start_run


def of_config(
    config: Config, workdir: Path, target: Target, *, utilisation: float, seconds: float = 3.0
) -> list[dict[str, Any]]:
    """Estimate each run that a run in `workdir` starts from, the nearest first, up to a finished
    one, which costs nothing.
    """
    rows: list[dict[str, Any]] = []
    for start in start_run.chain(config, workdir):
        state = start_run.state(start)
        row: dict[str, Any] = {"run": str(start.folder), "state": state, "training": None}
        if state != start_run.FINISHED:
            how: dict[str, Any] = {"utilisation": utilisation, "seconds": seconds, "images": 0}
            row["training"] = account.account(start.config, target, **how)["training"]
        rows.append(row)
        if state == start_run.FINISHED:
            break
    return rows


def sentence(row: dict[str, Any]) -> str:
    """Say what a start costs."""
    if row["training"] is None:
        return f"It starts from {row['run']}, which is finished and costs nothing."
    known = ", and was begun" if row["state"] == start_run.BEGUN else ""
    hours, chips = row["training"]["hours"], row["training"]["chip_hours"]
    return (
        f"It starts from {row['run']}, which is not finished{known}: that run costs {hours:,.3g} "
        f"hours and {chips:,.3g} chip-hours more, once for all that start from it."
    )
