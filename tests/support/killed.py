"""A command that is killed with SIGKILL, again and again, each time at another call of ours.

As a program it reads a line of JSON, [words of the command, folder, points]. A point is
[module, function, n]: the command dies at the n-th call of it; null: it does not die. Each time the
command runs in a fork of this process, which has imported everything already, and its code and what
it says are a line of JSON.
"""

import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

_ROOT = Path(__file__).resolve().parents[2]


class Ended(NamedTuple):
    """How a command ended, and what it said on both of its outputs."""

    code: int  # -9: it was killed
    said: str


def run(words: Sequence[str], folder: Path, points: Sequence[Any]) -> list[Ended]:
    """Run `jaxrobust *words` in a folder once for each point, in a process without `tests`."""
    own = ("JAX_", "XLA_", "TFDS_")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(own)}
    environment |= {"JAX_PLATFORMS": "cpu", "JAXROBUST_ALLOCATOR": "system"}
    done = subprocess.run(
        [sys.executable, "-P", __file__],
        env=environment | {"PYTHONPATH": str(_ROOT)},
        input=json.dumps([list(words), str(folder), list(points)]),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return [Ended(**json.loads(line)) for line in done.stdout.splitlines()]


def _deadly(point: Any) -> None:
    name, function, count = point
    module, left = importlib.import_module(name), [count]
    original = getattr(module, function)

    def counted(*given: Any, **how: Any) -> Any:
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*given, **how)

    setattr(module, function, counted)


def _child(words: list[str], folder: str, point: Any, out: int) -> None:
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.chdir(folder)
    if point:
        _deadly(point)
    from jaxrobust.__main__ import main

    sys.argv = ["jaxrobust", *words]
    main()


def _main() -> None:
    words, folder, points = json.loads(sys.stdin.read())
    for name in ("training.run.run", "results.stages.running"):
        importlib.import_module(f"jaxrobust.{name}")
    for point in points:
        with tempfile.TemporaryFile("w+") as out:
            child = os.fork()
            if not child:
                code = 1
                try:
                    _child(words, folder, point, out.fileno())
                    code = 0
                except SystemExit as left:
                    code = left.code if isinstance(left.code, int) else 1 if left.code else 0
                finally:
                    sys.stdout.flush()
                    sys.stderr.flush()
                    os._exit(code)
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            out.seek(0)
            print(json.dumps({"code": code, "said": out.read()}), flush=True)


if __name__ == "__main__":
    _main()
