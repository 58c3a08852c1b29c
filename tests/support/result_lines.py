"""The records of a folder as JSON has them."""

from pathlib import Path
from typing import Any

from jaxrobust.evaluation.records import records


def read(folder: Path) -> list[dict[str, Any]]:
    """The lines of results.jsonl, all of which are records."""
    return [record.to_json() for record in records.read(folder)]
