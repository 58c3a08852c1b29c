"""Writes signatures, defaults and tables of each folder to `tests/golden_api/`, to be reviewed.

python tools/generate/refresh_api.py [FOLDER ...]
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.support import api

if __name__ == "__main__":
    rooms = sorted(p.parent.name for p in (ROOT / "jaxrobust").glob("*/__init__.py"))
    for room in sys.argv[1:] or rooms:
        api.golden(room).parent.mkdir(exist_ok=True)
        found = [line for module in api.modules(room) for line in api.lines(module)]
        api.golden(room).write_text("\n".join(found) + "\n")
        print(room, len(found))
