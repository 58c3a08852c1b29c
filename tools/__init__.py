"""Commands outside the package, run as files from a checkout, and what they share."""

import sys
import time
from collections.abc import Callable
from typing import Any

OUT_OF_MEMORY = 4  # the exit code


def timed(call: Callable[[], Any]) -> tuple[Any, float, float]:
    """Measure the wall and CPU seconds of a call, which follow what it returns."""
    wall, cpu = time.perf_counter(), time.process_time()
    returned = call()
    return returned, time.perf_counter() - wall, time.process_time() - cpu


def out_of_memory(error: BaseException) -> bool:
    """Whether an error of XLA, of PyTorch or of Python says that memory did not suffice."""
    words = ("resource_exhausted", "out of memory", "out_of_memory", "can't allocate memory")
    return isinstance(error, MemoryError) or any(word in str(error).lower() for word in words)


def guarded(name: str, main: Callable[[], object]) -> None:
    """Run a benchmark; a mistake or a missing package is one sentence and the exit code 2.

    What does not fit into memory is one too, with the exit code `OUT_OF_MEMORY`.
    """
    try:
        main()
    except ImportError as error:
        extra = "tpu-aot" if error.name == "libtpu" else "test,parity"
        print(f"{name}: {error}; pip install -e '.[{extra}]'", file=sys.stderr)
        sys.exit(2)
    except ValueError as error:
        print(f"{name}: {error}", file=sys.stderr)
        sys.exit(2)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        print(f"{name}: out of memory; take a smaller batch", file=sys.stderr)
        sys.exit(OUT_OF_MEMORY)
