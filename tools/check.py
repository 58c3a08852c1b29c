"""Everything that must pass before a change lands: format, lint, types, tests.

python tools/check.py [--slow] [--matrix] [--no-tests]
"""

import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTHON = sys.executable
STATIC = {
    "format": [PYTHON, "-m", "ruff", "format", "--check", "."],
    "lint": [PYTHON, "-m", "ruff", "check", "."],
    "types": [PYTHON, "-m", "mypy"],
}
FAST = {
    "tests": [PYTHON, "-m", "pytest"],
    "landing's tests": [PYTHON, "-m", "pytest", "-m", "landing", "--dist", "worksteal"],
}
# The networks again in tree mode, which Flax announces as NNX's default.
_TREE = [f"families/test_{name}" for name in ("families", "convnext", "xcit", "resnet")]
_TREE += ["families/test_robust_resnet", "interface/test_foreign", "modules/test_module"]
TREE_TESTS = [f"tests/models/{name}.py" for name in _TREE]
TREE_MODE = ["env", "NNX_GRAPH_MODE=false", "NNX_GRAPH_UPDATES=false"]
MATRIX = {"golden sets, architectures": [PYTHON, "-m", "pytest", "-m", "matrix"]}
SLOW = {
    "slow tests": [PYTHON, "-m", "pytest", "-m", "slow and not matrix"],
    "NNX tree mode": [*TREE_MODE, PYTHON, "-m", "pytest", "-m", "not matrix", *TREE_TESTS],
}


def main(arguments: list[str]) -> int:
    """Run all checks, also after a failure; return how many failed."""
    unknown = set(arguments) - {"--slow", "--matrix", "--no-tests"}
    if unknown:
        print(f"check: unknown option {sorted(unknown)}; {__doc__}", file=sys.stderr)
        return 2
    checks = dict(STATIC)
    if "--no-tests" not in arguments:
        checks |= FAST
    if "--slow" in arguments:
        checks |= SLOW
    if "--matrix" in arguments:
        checks |= MATRIX
    failed = []
    for name, command in checks.items():
        start = time.perf_counter()
        code = subprocess.run(command, cwd=ROOT).returncode
        print(f"{'ok  ' if code == 0 else 'FAIL'} {name} ({time.perf_counter() - start:.0f} s)")
        failed += [name] * (code != 0)
    return len(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
