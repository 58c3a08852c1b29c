"""What the tables of networks say, as text that is reviewed when it changes.

Rows are read off papers and released code, and only some of their fields can be seen in the shapes
of weights: the number of heads, a constant in a norm, an accuracy that a leaderboard prints.
"""

import json
from typing import Any

from jaxrobust import models
from jaxrobust.models.published import LEADERBOARDS, PUBLISHED
from tests.support import paths

STORED = paths.GOLDEN / "models" / "network_tables.json"


def plain(value: Any) -> Any:
    """Return named tuples as dicts, and other sequences as lists."""
    if hasattr(value, "_asdict"):
        return {key: plain(each) for key, each in value._asdict().items()}
    if hasattr(value, "items"):
        return {key: plain(each) for key, each in value.items()}
    return [plain(each) for each in value] if isinstance(value, list | tuple) else value


def tables() -> dict[str, dict[str, Any]]:
    """Return every table: name of an entry -> its fields."""
    families = {
        family.file: {"variants": [*family.variants]}
        | {key: getattr(family, key) for key in ("title", "decay_mask", "any_size", "compared")}
        | {"stem": family.names.stem, "head": family.names.head}
        for family in models.FAMILIES
    }
    found = {
        "families": families,
        "rows": {name: models.variant(name) for name in models.available()},
        "members": {name: models.member(name) for name in models.available()},
        "published": PUBLISHED,
        "leaderboards": LEADERBOARDS,
    }
    return plain(found)


def stored() -> dict[str, dict[str, Any]]:
    """Return what has been reviewed."""
    return json.loads(STORED.read_text())


def main() -> None:
    """Store what they say now, a line for each entry; review it."""
    parts = []
    for name, entries in tables().items():
        lines = (f"  {json.dumps(key)}: {json.dumps(entry)}" for key, entry in entries.items())
        parts.append(f" {json.dumps(name)}: {{\n" + ",\n".join(lines) + "\n }")
    STORED.write_text("{\n" + ",\n".join(parts) + "\n}\n")


if __name__ == "__main__":
    main()
