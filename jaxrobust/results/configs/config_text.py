"""A config file, as it is written for somebody's data."""

import os
import textwrap
from collections.abc import Sequence
from pathlib import Path

from jaxrobust.results.configs.chosen_values import ConfigLine, Expression
from jaxrobust.results.configs.data_facts import DataFacts

_COLUMNS = 100


def text(data: DataFacts, lines: Sequence[ConfigLine], file: str) -> str:
    """Write the lines with their reasons as a config, and above them how it is used."""
    first = f"{data.name}: {data.images:,} images to train on, {len(data.classes)} classes."
    body, section = [], ""
    for line in lines:
        if line.key.partition(".")[0] != section:
            section = line.key.partition(".")[0]
            body.append("")
        value = str(line.value) if isinstance(line.value, Expression) else _shown(line.value)
        body += _with_reason(f"    config.{line.key} = {value}", line.reason)
    return "\n".join(
        [
            f'"""{first}',
            "",
            f"    jaxrobust check {file}",
            f"    jaxrobust train --config {file}",
            "",
            "jaxrobust new wrote it from what it saw in the data. Change what you know better.",
            '"""',
            "",
            "from jaxrobust.config import base",
            "",
            "# `jaxrobust why` prints it.",
            'SOURCES = {"*": "ours: jaxrobust new chose it for these images"}',
            "",
            "",
            "def get_config():",
            "    config = base()",
            *body[1:],
            "    return config",
            "",
        ]
    )


def _with_reason(code: str, reason: str) -> list[str]:
    if len(code) + len(reason) + 4 <= _COLUMNS:
        return [f"{code}  # {reason}"]
    above = textwrap.wrap(reason, _COLUMNS - 6)
    return [*(f"    # {part}" for part in above), code]


def _shown(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) and '"' not in value else repr(value)


def write(file: Path, content: str, lists: dict[str, list[str]]) -> None:
    """Write a config and its lists of images; what is there already is not replaced."""
    for path in (file, *map(Path, lists)):
        if os.path.lexists(path):
            raise ValueError(f"{path} is there already; name another file, or remove it")
    file.parent.mkdir(parents=True, exist_ok=True)
    for name, images in lists.items():
        Path(name).write_text("\n".join(images) + "\n")
    file.write_text(content)
