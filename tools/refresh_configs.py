"""Writes the resolved text of every config to `tests/golden_configs/`; review the difference."""

import importlib
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def names() -> list[str]:
    """Return the configs."""
    return sorted(p.stem for p in (ROOT / "configs").glob("[a-z]*.py"))


def resolved(name: str) -> str:
    """All values of a config as JSON."""
    config = importlib.import_module(f"configs.{name}").get_config()
    return json.dumps(json.loads(config.to_json()), indent=2) + "\n"


def golden(name: str) -> Path:
    """Where the text of a config is kept."""
    return ROOT / "tests" / "golden_configs" / f"{name}.json"


if __name__ == "__main__":
    for config_name in names():
        golden(config_name).parent.mkdir(exist_ok=True)
        golden(config_name).write_text(resolved(config_name))
