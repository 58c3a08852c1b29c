"""Writes the resolved text of every config to `tests/golden_configs/`; review the difference."""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from jaxrobust.runtime.commandline.arguments import config_name


def names() -> list[str]:
    """Return the configs, of a family `NAME:ARGUMENTS` for each of its `ROWS`."""
    configs = []
    for path in sorted((ROOT / "configs").glob("[a-z]*.py")):
        rows = getattr(importlib.import_module(f"configs.{path.stem}"), "ROWS", None)
        configs += [path.stem] if rows is None else [f"{path.stem}:{row}" for row in rows]
    return configs


def load(name: str) -> Any:
    file, _, arguments = name.partition(":")
    return importlib.import_module(f"configs.{file}").get_config(*[arguments] * bool(arguments))


def resolved(name: str) -> str:
    return json.dumps(json.loads(load(name).to_json()), indent=2) + "\n"


def golden(name: str) -> Path:
    return ROOT / "tests" / "golden_configs" / f"{config_name(name)}.json"


if __name__ == "__main__":
    for name in names():
        golden(name).parent.mkdir(exist_ok=True)
        golden(name).write_text(resolved(name))
