"""Writes what is made of the configs: the resolved text of each, in `tests/golden_configs/`, and in
docstrings the keys that `jaxrobust why` prints; review the difference.
"""

import importlib
import json
import re
import sys
import textwrap
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from jaxrobust.analysis import key_sources
from jaxrobust.runtime.commandline.arguments import config_name, load_config

COLUMNS = 100
# What a docstring asks with, of one line of its config; what is indented below it is written anew.
ASKED = re.compile(r"^Keys that are no defaults, by `jaxrobust why (\S+)`:\n", re.MULTILINE)
_BLOCK = re.compile(rf"({ASKED.pattern})(?:\n(?: {{4}}.*\n)+)?", re.MULTILINE)


def paths() -> list[Path]:
    return sorted((ROOT / "configs").glob("[a-z]*.py"))


def names() -> list[str]:
    """Return the configs, of a family `NAME:ARGUMENTS` for each of its `ROWS`."""
    configs = []
    for path in paths():
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


def explained(source: str) -> str:
    """Return the source of a config, whose docstring has the keys wherever it asks for them."""

    def block(asked: re.Match[str]) -> str:
        keys = key_sources.of_config(load_config(asked[2]), key_sources.of_recipe(asked[2]))
        indent = " " * 4
        lines = key_sources.text(key_sources.chosen(keys, None, False), COLUMNS - len(indent))
        return f"{asked[1]}\n{textwrap.indent(lines, indent)}\n"

    return _BLOCK.sub(block, source)


if __name__ == "__main__":
    for name in names():
        golden(name).parent.mkdir(exist_ok=True)
        golden(name).write_text(resolved(name))
    for path in paths():
        path.write_text(explained(path.read_text()))
