"""The three files of a comparison: its text, its numbers, its picture."""

import io
import json
from pathlib import Path
from typing import Any

from jaxrobust.analysis.comparison import findings, markdown, picture
from jaxrobust.runtime.files import jsonl, whole


def write(out: Path, name: str, found: findings.Findings, plain: dict[str, Any]) -> None:
    """Write the three files, each of them whole."""
    text, table, drawn = (out / f"{name}.{kind}" for kind in ("md", "json", "png"))
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; name a folder")
    if table.exists() and _compares(table) != _files(plain):
        raise ValueError(f"{table} compares other evaluations; name another folder with --out")
    image = io.BytesIO()
    picture.draw(found).savefig(image, dpi=130, format="png")
    out.mkdir(parents=True, exist_ok=True)
    with whole.writing(drawn) as part:
        part.write_bytes(image.getvalue())
    jsonl.replace(table, json.dumps(plain, indent=1) + "\n")
    jsonl.replace(text, markdown.document(found, drawn.name))


def _compares(table: Path) -> list[tuple[str, str]] | None:
    try:
        return _files(json.loads(table.read_text()))
    except (ValueError, KeyError, TypeError):
        return None


def _files(plain: dict[str, Any]) -> list[tuple[str, str]]:
    return [(one["file"], one["evaluation"]) for one in plain["evaluations"]]
