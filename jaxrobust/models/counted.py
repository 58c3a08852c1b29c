"""What the networks cost, by tracing them, as `tools/generate/refresh_counts.py` writes it."""

import json
from pathlib import Path
from typing import Any

# name -> parameters, multiply-adds of one image, stem, norms
COUNTED: dict[str, Any] = json.loads(Path(__file__).with_suffix(".json").read_text())
