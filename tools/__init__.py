"""Commands outside the package, run as files from a checkout, and their shared code."""

import sys
import time
from collections.abc import Callable
from typing import Any

OUT_OF_MEMORY = 4  # the exit code


def timed(call: Callable[[], Any]) -> tuple[Any, float, float]:
    """Call a function; return its result, then its wall and CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    returned = call()
    return returned, time.perf_counter() - wall, time.process_time() - cpu


def out_of_memory(error: BaseException) -> bool:
    """Tell whether an error from XLA, PyTorch or Python means out of memory."""
    words = ("resource_exhausted", "out of memory", "out_of_memory", "can't allocate memory")
    return isinstance(error, MemoryError) or any(word in str(error).lower() for word in words)


def guarded(name: str, main: Callable[[], object]) -> None:
    """Run a benchmark; print mistakes or missing packages as one sentence and exit with 2.

    Running out of memory also prints one sentence, with the exit code `OUT_OF_MEMORY`.
    """
    try:
        main()
    except ImportError as error:
        extra = "tpu-aot" if error.name == "libtpu" else "test,parity"
        gpu = error.name == "jax_cuda12_plugin"  # the message has its remedy
        remedy = "" if gpu else f"; pip install -e '.[{extra}]'"
        print(f"{name}: {error}{remedy}", file=sys.stderr)
        sys.exit(2)
    except ValueError as error:
        print(f"{name}: {error}", file=sys.stderr)
        sys.exit(2)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        print(f"{name}: out of memory; use a smaller batch", file=sys.stderr)
        sys.exit(OUT_OF_MEMORY)
