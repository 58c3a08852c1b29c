"""Commands beside the package, run as files from a checkout, and what they share."""

import sys
import time
from collections.abc import Callable
from typing import Any


def timed(call: Callable[[], Any]) -> tuple[Any, float, float]:
    """Measure the wall and CPU seconds of a call, which stand behind what it returns."""
    wall, cpu = time.perf_counter(), time.process_time()
    returned = call()
    return returned, time.perf_counter() - wall, time.process_time() - cpu


def guarded(name: str, main: Callable[[], object]) -> None:
    """Run a benchmark; a mistake or a missing package is one sentence and the exit code 2."""
    try:
        main()
    except ImportError as error:
        extra = "tpu-aot" if error.name == "libtpu" else "test,parity"
        print(f"{name}: {error}; pip install -e '.[{extra}]'", file=sys.stderr)
        sys.exit(2)
    except ValueError as error:
        print(f"{name}: {error}", file=sys.stderr)
        sys.exit(2)
