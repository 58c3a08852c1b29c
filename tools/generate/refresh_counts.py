"""Writes what the networks cost to `jaxrobust/models/counted.py`, by tracing all; review it."""

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

_HEAD = '''\
"""What the networks cost, by tracing them, as `tools/generate/refresh_counts.py` writes it."""

# name -> parameters, multiply-adds of one image, stem, norms
COUNTED: dict[str, tuple[int, int, str, str]] = {
'''


def text(rows: Iterable[table.ArchitectureRow]) -> str:
    lines = [
        f'    "{row.name}": ({row.parameters}, {row.multiply_adds}, "{row.stem}", "{row.norms}"),\n'
        for row in rows
    ]
    return _HEAD + "".join(lines) + "}\n"


if __name__ == "__main__":
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        counts = list(pool.imap(table.counted, models.available()))
    (ROOT / "jaxrobust" / "models" / "counted.py").write_text(text(counts))
