"""Where tests find their numbers."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden"
SHARED = Path(os.environ.get("JAXROBUST_SHARED", ROOT.parent / "shared"))
PARITY = "needs the references: pip install -e '.[test,parity]'"
NO_SHARED = "needs the project's shared/ folder next to the checkout (developers and CI)"
