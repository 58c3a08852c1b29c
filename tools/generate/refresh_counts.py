"""Writes the cost of all networks, by tracing, to `jaxrobust/models/counted.json`; review it."""

import json
import multiprocessing
import os
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing runs

from jaxrobust import models
from jaxrobust.models import table


def text(rows: Iterable[table.ArchitectureRow]) -> str:
    counts = {row.name: [row.parameters, row.multiply_adds, row.stem, row.norms] for row in rows}
    lines = [f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in counts.items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


if __name__ == "__main__":
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        counts = list(pool.imap(table.counted, models.available()))
    (ROOT / "jaxrobust" / "models" / "counted.json").write_text(text(counts))
