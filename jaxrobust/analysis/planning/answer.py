"""From what the command line names to a plan: its runs, costs, progress, and scripts."""

from pathlib import Path
from typing import Any

from jaxrobust.analysis.papers import matching
from jaxrobust.analysis.planning import costs, page, progress, runs, scripts
from jaxrobust.estimate import devices
from jaxrobust.runtime.text import patience


def of(flags: Any, made_by: str) -> str:
    """Plan as the flags of `jaxrobust plan` say; the text for people."""
    target = devices.target(flags.on)
    if target.here:
        raise ValueError(f"--on {flags.on} is no chip that can be assumed; name some, as v5e:8x8")
    planned = runs.of_paper(flags.paper, flags.table, flags.row)
    with patience.lasting(f"estimating {len(planned)} runs"):
        how: dict[str, Any] = {"utilisation": flags.utilisation, "file": flags.estimates}
        priced = list(costs.of_runs(planned, target, **how))
    places = [
        Path(each.folder) for each in planned if (Path(each.folder) / "config.json").is_file()
    ]
    records = matching.collect([*places, *flags.records])
    steps = progress.in_order(flags.paper, priced, records, root=Path(), budget=flags.budget)
    text = page.text(steps, flags.paper, target, flags.utilisation, flags.budget)
    for doubt in dict.fromkeys(filter(None, map(matching.other_config, records))):
        text += f"\nnot counted: {doubt}"
    if flags.write is None:
        return text
    written = scripts.write(steps, flags.write, made_by)
    return "\n".join([text, "", "written:", *(f"  {path}" for path in written)])
