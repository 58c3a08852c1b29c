"""The tables as Markdown: paper, ours or `not measured`, and records that fit no row."""

from typing import TYPE_CHECKING, Any, NamedTuple

from jaxrobust.papers.tables import matching, tables
from jaxrobust.papers.tables.tables import Table
from jaxrobust.results.comparison.comparison_markdown import grid
from jaxrobust.results.run_records import RunRecord

if TYPE_CHECKING:
    from jaxrobust.evaluation.records.record import AccuracyRecord

NOT_MEASURED = "not measured"
_NEAR = 3  # differences listed per record next to a table


class Cell(NamedTuple):
    """Our value in a cell: percent, and the number of its record."""

    value: float
    record: int
    alike: bool = False  # same network and attack, but another training or other images


class Filled(NamedTuple):
    """A table with our values."""

    table: Table
    cells: dict[tuple[int, str], Cell]  # (row, key of a result) -> ours


def filled(table: Table, records: list[RunRecord], *, alike: bool = False) -> Filled:
    """Fill a table with the last record of each value or, if `alike`, the last similar one.

    Raises:
      ValueError: a record fits two rows, which print different values.
    """
    cells: dict[tuple[int, str], Cell] = {}
    rows: dict[tuple[str, int], int] = {}  # (key of a result, record) -> the row that it fits
    for index, row in enumerate(table.rows):
        for key, result in table.attacked().items():
            for strict in (False, True) if alike else (True,):
                for number, run_record in enumerate(records):
                    value = matching.measured(result, run_record.record)
                    if value is None or matching.differences(
                        table, row, key, run_record, of_training=strict
                    ):
                        continue
                    cells[index, key] = Cell(value, number, not strict)
                    first = rows.setdefault((key, number), index) if strict else index
                    printed = [table.value(table.rows[at], key) for at in (first, index)]
                    if all(printed) and printed[0] != printed[1]:
                        raise ValueError(
                            f"{run_record.file}: a record matches rows {first + 1} and {index + 1} "
                            f"of {tables.title(table)} in {table.paper}, which print {printed[0]} "
                            f"and {printed[1]}; correct one of these rows in "
                            f"papers/tables/data/{table.paper}.json"
                        )
    return Filled(table, cells)


def document(name: str, shown: list[Filled], records: list[RunRecord]) -> str:
    """Return the tables of one paper, their contradictions, and the records."""
    source = tables.paper(name)["source"]
    where = f"arXiv {source['arxiv']}" if source["arxiv"] else "thesis"
    parts = [
        f"# {source['title']}",
        f"{source['authors']} {source['year']} ({where}); its numbers next to ours. Our numbers "
        "appear only with their records. `?`: something contradicts the printed value.",
    ]
    if any(cell.alike for one in shown for cell in one.cells.values()):
        parts.append(
            "*In italics*: the same network, data set, objective and attack, but different "
            "training or images; the differences are listed below, under Records."
        )
    tables_shown = [_table(one) for one in shown]
    if any(f"| {NOT_MEASURED} |" in text for text in tables_shown):
        parts.append(
            f"`{NOT_MEASURED}`: `jaxrobust reproduce --paper {name} --commands` prints the "
            "commands that measure each row."
        )
    parts += tables_shown
    if records:
        parts.append(_records(records, shown))
    if len(shown) == len(tables.tables(name)):
        parts.append(_contradictions(tables.paper(name)["contradictions"]))
    return "\n\n".join(parts) + "\n"


def _table(shown: Filled) -> str:
    table = shown.table
    attacked = table.attacked()
    keys = varying(table)
    head = ["network", *keys]
    for key, result in table.results.items():
        head += (
            [f"{_title(key, result)}: paper", "ours"] if key in attacked else [_title(key, result)]
        )
    lines = [head]
    for index, row in enumerate(table.rows):
        cells = [tables.named(row), *(plain(row.get(key)) for key in keys)]
        for key in table.results:
            cells.append(table.value(row, key))
            if key in attacked:
                cells.append(_ours(shown, index, key, table.value(row, key)))
        lines.append(cells)
    title = f"## {tables.title(table)}: {table.caption}"
    of_rows = [f"{row['name']}: {row['note']}" for row in table.rows if "note" in row]
    notes = "\n".join(f"- {note}" for note in dict.fromkeys([*table.notes, *of_rows]))
    return "\n\n".join(filter(None, (title, _same(table, keys), grid(lines), notes)))


def varying(table: Table) -> list[str]:
    """List the settings that differ between rows of a table."""
    keys = dict.fromkeys(key for row in table.rows for key in tables.settings(table, row, ()))
    return [key for key in keys if len({str(row.get(key)) for row in table.rows}) > 1]


def _ours(shown: Filled, index: int, key: str, printed: str) -> str:
    cell = shown.cells.get((index, key))
    if cell is None:
        return NOT_MEASURED if printed else ""
    mark = "*" if cell.alike else "**"
    return f"{mark}{cell.value:.{max(shown.table.decimals, 1)}f}{mark} [{cell.record + 1}]"


def _same(table: Table, varying: list[str]) -> str:
    row = table.rows[0]
    keys = [key for key in row if key not in (*tables.ABOUT, *table.results, *varying, "model")]
    settings = [f"{key} {plain(row[key])}" for key in keys if row[key] is not None]
    return f"All rows: {', '.join(settings)}." if settings else ""


def _title(key: str, result: dict[str, Any]) -> str:
    if "attack" not in result or "classifier" in result:
        units = {"params_m": "parameters, M", "macs_g": "multiply-adds, G"}
        return units.get(key, key.replace("_", " "))
    ball = f" {result['norm']} {result['epsilon']}" if result.get("norm") else ""
    return f"{result['attack']}{ball}"


def _records(records: list[RunRecord], shown: list[Filled]) -> str:
    used = {cell.record for one in shown for cell in one.cells.values() if not cell.alike}
    lines = ["## Records", ""]
    for number, run_record in enumerate(records):
        record = run_record.record
        robust = "" if record.robust is None else f", {record.robust:.2%} robust"
        place = f"{run_record.file.parent.name}/{run_record.file.name}"
        attack = "no attack"
        if record.attacks:
            first = record.attacks[0]
            method = record.method or f"{first['name']}, {first['steps']} steps"
            attack = f"{method}, {first['norm']} {first['epsilon']:.4g}"
        text = (
            f"{number + 1}. {matching.label(run_record)}: {_clean(record)}{robust}; "
            f"{record.dataset}, split {record.split}, images {record.image_ids}; "
            f"{attack}; weights sha256 {str(record.weights_sha256)[:12]}, commit "
            f"{short(record)}; {place}."
        )
        for name, doubt in record.flags.items():
            text += f" Doubt about it, {name}: {doubt}."
        if number not in used:
            alike = any(c.record == number for one in shown for c in one.cells.values())
            where = "Only in cells in italics" if alike else "In no cell above"
            text += f" **{where}**: {_nearest(run_record, shown)}."
        lines.append(text)
    return "\n".join(lines)


def _clean(record: "AccuracyRecord") -> str:
    parts = [] if record.clean is None else [f"{record.clean:.2%} clean"]
    if measured := record.corruptions:
        parts.append(f"{measured['mean']:.2%} under corruptions ({measured['images']})")
    return ", ".join(parts)


def short(record: "AccuracyRecord") -> str:
    """Return a record's commit, shortened, with a mark if files had changed."""
    commit, plus, _ = str(record.commit).partition("+")
    return commit[:8] + ("+changes" if plus else "")


def _nearest(run_record: RunRecord, shown: list[Filled]) -> str:
    best: tuple[int, str] | None = None
    for one in shown:
        for row in one.table.rows:
            for key, result in one.table.attacked().items():
                if row.get(key) is None or not _concerns(result, run_record.record):
                    continue
                differing = matching.differences(one.table, row, key, run_record)
                if best is None or len(differing) < best[0]:
                    more = [f"and {len(differing) - _NEAR} more"] if differing[_NEAR:] else []
                    text = "; ".join(differing[:_NEAR] + more)
                    best = len(differing), f"nearest is {one.table.id}, {row['name']}, but {text}"
    return best[1] if best else "no table above has such a value"


def _concerns(result: dict[str, Any], record: "AccuracyRecord") -> bool:
    if result["attack"] == "corruptions" or record.corruptions:
        return result["attack"] == "corruptions" and bool(record.corruptions)
    return (result["attack"] == "clean") == (not record.attacks)


def _contradictions(contradictions: list[dict[str, Any]]) -> str:
    rows = [["where", "says", "likelier", "why"]]
    for row in contradictions:
        says = " / ".join(plain(value) for value in row["says"])
        rows.append([row["where"], says, plain(row["likely"]), row["why"]])
    return "## Where the paper contradicts itself or others\n\n" + grid(rows)


def plain(value: Any) -> str:
    """Return a readable value of a row."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return " ".join(map(str, value))
    return "" if value is None else str(value)
