"""Where tests find their numbers."""

import os
from pathlib import Path

GOLDEN = Path(__file__).parent / "golden"
SHARED = Path(os.environ.get("JAXROBUST_SHARED", Path(__file__).resolve().parents[2] / "shared"))
PARITY = "needs the references: pip install -e '.[test,parity]'"
NO_SHARED = "needs the project's shared/ folder beside the checkout (developers and CI)"
