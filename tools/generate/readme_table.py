"""Print the rows of README's table of results from runs.

`python tools/generate/readme_table.py [RUN_OR_CONFIG ...]`: runs with their records, configs with
their expected results; default: the runs of tools/records.
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from jaxrobust.config import completed, plain
from jaxrobust.evaluation.records import records
from jaxrobust.evaluation.records.record import AccuracyRecord
from jaxrobust.papers.tables import matching, tables, tables_markdown
from jaxrobust.runtime.commandline.arguments import Arguments, flat, load_config, stop
from jaxrobust.weights.trained import runs, start_run
from tools.generate import refresh_configs

KEPT = ROOT / "tools" / "records"  # of the runs that the READMEs quote
HEAD = (
    "| command | test images | clean training | adversarial training | measured on |\n"
    "|---|---|---|---|---|\n"
)


def main(argv: list[str] | None = None) -> None:
    parser = Arguments(__doc__ or "")
    parser.add_argument("places", nargs="*", type=Path, help="Runs, and config files.")
    places = parser.parse_args(argv).places
    try:
        print(rows(places or kept()), end="")
    except ValueError as error:
        stop(error, 2)


def kept() -> list[Path]:
    """Return the runs of README's table, which are stored with their configs."""
    return sorted(config.parent for config in KEPT.glob("*/config.json"))


def rows(places: list[Path]) -> str:
    """Return the table: runs with configs and records, config files with expected results."""
    of_config = re.compile(r".+\.py(:.*)?")
    return HEAD + "".join(
        _planned(str(place)) if of_config.fullmatch(str(place)) else _run(place) for place in places
    )


def _run(place: Path) -> str:
    measured = records.read(place)
    if not measured:
        raise ValueError(
            f"{place} has no results.jsonl with records; pass a run that has been tested, or a "
            "config such as configs/convnext_t_cvst.py"
        )
    own = command(plain(runs.run_config(place)))
    lines = [_line(own, measured)]
    evaluated = f"`python -m jaxrobust.evaluate --workdir {place}`"
    for record in records.read(place / "evaluation"):
        if record.attacks:
            lines.append(_line(f"{evaluated}: {record.method}", [record]))
    return "".join(lines)


def _line(first: str, measured: list[AccuracyRecord]) -> str:
    last = measured[-1]
    reached = {str(record.weights).partition(",")[0]: record for record in measured}
    ball = f"{last.threats[0].norm} {_radius(last.threats[0].epsilon)}"
    images = f"{int(str(last.image_ids).split('..')[1]) + 1:,} {last.dataset}"
    clean, robust = (_accuracies(reached.get(phase)) for phase in ("pretrain", "train"))
    where = f"{last.device} (commit {tables_markdown.short(last)})"
    return f"| {' | '.join((first, f'{images}, {ball}', clean, robust, where))} |\n"


def _planned(given: str) -> str:
    config = plain(load_config(given))
    measured = "not yet measured"
    ball = f"{config['attack']['norm']} {_radius(config['attack']['epsilon'])}"
    for table, row in published(config):
        robust = next((k for k, w in table.attacked().items() if w["attack"] == "autoattack"), None)
        if robust and row.get(robust) is not None and row.get("clean") is not None:
            measured += (
                f"; **in the paper** ({tables.title(table)}): {row['clean']}% clean, "
                f"{row[robust]}% under AutoAttack"
            )
            break
    images = f"{config['data']['name']}, {ball}"
    return f"| `--config {given}` | {images} | not yet measured | {measured} | |\n"


def published(config: dict[str, Any]) -> Iterator[tuple[tables.Table, dict[str, Any]]]:
    """Yield the rows whose training a config describes; if it starts from another config, that
    one counts.
    """
    named = start_run.named(config["init"]["weights"])
    started = plain(load_config(named)) if named else None
    for paper in tables.PAPERS:
        for table in tables.tables(paper):
            for row in table.rows:
                own = row.get("model") == config["model"]["name"]
                own = own and row.get("origin") == "authors"
                if own and not any(matching.other_training(row, config, started)):
                    yield table, row


def _accuracies(record: AccuracyRecord | None) -> str:
    if record is None or record.clean is None or record.robust is None:
        return ""
    return f"{100 * record.clean:.1f}% clean, {100 * record.robust:.1f}% robust"


def _radius(epsilon: float) -> str:
    levels = epsilon * 255
    return f"{round(levels)}/255" if abs(levels - round(levels)) < 1e-6 else f"{epsilon:g}"


OF_THE_HOST = "data.workers"  # no figure depends on it


def command(config: dict[str, Any]) -> str:
    """Return the flags that make a config: the nearest recipe, and the differences."""
    best: tuple[int, str] | None = None
    values = flat(completed(config))
    for name in refresh_configs.names():
        own = flat(plain(refresh_configs.load(name)))
        differing = [
            key
            for key in values
            if key != OF_THE_HOST and (key not in own or own[key] != values[key])
        ]
        if best is None or len(differing) < best[0]:
            file, colon, arguments = name.partition(":")
            flags = [f"--config configs/{file}.py{colon}{arguments}"]
            flags += [f"--config.{key}={values[key]}" for key in differing]
            best = len(differing), " ".join(flags)
    assert best is not None
    return f"`{best[1]}`"


if __name__ == "__main__":
    main()
