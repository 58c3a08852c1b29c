"""The result tables of the papers, from `data/*.json`.

The numbers are as printed in the papers; captions and notes are our words. A row is one trained
network on one data set at one test size; a table's `settings` are defaults for all its rows. In a
row, `uncertain` names values that something contradicts (`note` says what), and `line` the commands
that measure it (`lines`). Radii are strings in units of the [0, 1] pixel range, accuracies percent,
`params_m` millions, `macs_g` 1e9 multiply-adds.

Details that the papers omit are from their code: nmndeep/revisiting-at,
dedeswim/vits-robustness-torch, DIG-Beihang/RobustART, zhichao-lu/robust-residual-network 8c6d2c2;
and numbers of images from TensorFlow Datasets.
"""

import functools
import json
import math
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

from jaxrobust.runtime.text.spelling import meant

_DATA = Path(__file__).parent / "data"
PAPERS = ("revisiting_at", "xcit_light_recipe", "twenty_architectures", "robust_resnets")
FIGURES = "figures"  # id of the table of experiments that stand in figures and text
PLACES = ("dataset", "split", "images", "image_size")

# Entries of a row that do not describe how its network was trained or tested.
ABOUT = (
    *("name", "origin", "note", "uncertain", "inferred", "approximate", "robustbench", "run"),
    *("stem", "family", "size", "varied", "unit", "width", "architecture_from", "params_m"),
    *("macs_g", "passes_per_image", "hours", "batch_per_core", "timm", "meta", "options", "line"),
)


class Table(NamedTuple):
    """One table of a paper."""

    paper: str
    id: str  # table_2, text_1
    caption: str
    kind: str  # accuracy, size, cost, settings, weights, other
    decimals: int
    results: dict[str, dict[str, Any]]  # key of a row -> its attack, norm and epsilon
    rows: list[dict[str, Any]]  # with the table's defaults
    notes: list[str]
    curve: dict[str, Any] | None = None  # the attack and sizes that determined its resolutions

    def value(self, row: dict[str, Any], key: str) -> str:
        """Return a printed value; empty if the paper has none."""
        number = row.get(key)
        if number is None:
            return ""
        mark = "?" if key in row.get("uncertain", ()) else ""
        fixed = key in self.attacked() and isinstance(number, float | int)
        return (f"{number:.{self.decimals}f}" if fixed else f"{number}") + mark

    def attacked(self) -> dict[str, dict[str, Any]]:
        """Return the results that are accuracies."""
        return {key: result for key, result in self.results.items() if "attack" in result}


@functools.cache
def paper(name: str) -> dict[str, Any]:
    """Return the file of a paper: `source`, `tables`, `contradictions`."""
    if name not in PAPERS:
        raise ValueError(f"--paper {name} is unknown; {meant(name, PAPERS)}")
    return json.loads((_DATA / f"{name}.json").read_text())


def tables(name: str, wanted: str | None = None) -> list[Table]:
    """Return the tables of a paper, or only `wanted`: an id, or its number, or `FIGURES`."""
    all_tables = [_table(name, raw) for raw in paper(name)["tables"]]
    if wanted is None:
        return all_tables
    if wanted == FIGURES:
        return [figures(name)]
    chosen = [t for t in all_tables if wanted in (t.id, t.id.removeprefix("table_"))]
    if not chosen:
        ids = [*(table.id for table in all_tables), FIGURES]
        raise ValueError(f"--table {wanted}: {name} has no such table; {meant(wanted, ids)}")
    return chosen


@functools.cache
def figures(name: str) -> Table:
    """Return the experiments that a paper has in figures and text, as rows of a table."""
    entries = json.loads((_DATA / "figures.json").read_text()).get(name, [])
    rows = [{"model": None, "image_size": None} | entry for entry in entries]
    caption = "experiments outside the paper's tables"
    return Table(name, FIGURES, caption, FIGURES, 2, {}, rows, [])


def row(table: Table, wanted: str) -> int:
    """Find the index of a row, from 0, by its number, from 1, or the name of its network."""
    names = [named(table_row) for table_row in table.rows]
    if wanted.isdecimal() and 0 < int(wanted) <= len(names):
        return int(wanted) - 1
    matches = [at for at, name in enumerate(names) if name == wanted]
    if len(matches) == 1:
        return matches[0]
    of = f"--row {wanted}: {title(table)} of {table.paper} has"
    if matches:
        numbers = ", ".join(str(at + 1) for at in matches)
        raise ValueError(
            f"{of} {len(matches)} rows with that name; give a number instead, one of {numbers}"
        )
    near = meant(wanted, dict.fromkeys(names))
    advice = near if near.startswith("did") else f"give a name, or a number from 1 to {len(names)}"
    raise ValueError(f"{of} no such row; {advice}")


def _table(name: str, raw: dict[str, Any]) -> Table:
    results = {key: dict(result) for key, result in raw["results"].items()}
    for result in results.values():
        if "of" in result:  # the worst case of other results
            result["members"] = [results[key] for key in result["of"]]
    rows = [raw["settings"] | row for row in raw["rows"]]
    about: dict[str, Any] = {key: value for key, value in raw.items() if key != "settings"}
    return Table(**{"paper": name, "decimals": 2, **about, "results": results, "rows": rows})


def named(row: dict[str, Any]) -> str:
    """Return the name of a row's network, and who trained it if not the paper's authors."""
    origin = row.get("origin", "authors")
    return row["name"] if origin == "authors" else f"{row['name']} [{origin}]"


def title(table: Table) -> str:
    """Return the readable name of a table: Table 2."""
    if table.id == FIGURES:
        return "Figures and text"
    return table.id.replace("_", " ").capitalize()


def settings(table: Table, row: dict[str, Any], places: tuple[str, ...] = PLACES) -> dict[str, Any]:
    """Select the entries of a row that describe its network's training."""
    excluded = {*ABOUT, *places, *table.results, "model"}
    return {k: v for k, v in row.items() if k not in excluded and not k.endswith("_std")}


def same(one: Any, other: Any) -> bool:
    """Tell whether two values are equal, with radii in either notation."""
    try:
        numbers = [float(Fraction(x) if isinstance(x, str) else x) for x in (one, other)]
        return math.isclose(*numbers, rel_tol=1e-9)
    except (TypeError, ValueError):
        return one == other and one is not None
