"""Collective operations of a pod in an evaluation: split the images, merge the results.

Every process must call these functions in the same order. If a process is killed, the others end:
for our commands at once, through `lifeline.py`. In other programs JAX aborts them, at once if it
was process 0, which runs the coordination service, otherwise once its heartbeats have been missing
for 100 s.
"""

import itertools
import json
import pickle
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax._src import distributed  # the coordination service has no public name
from jax.experimental.multihost_utils import process_allgather

from jaxrobust.runtime.text import patience

T = TypeVar("T")

_PATIENCE = 60  # seconds to wait for a process at a time
# Bytes that each process sends at a time, for little and for much data: each size compiles a
# program, and every device holds the pieces of all processes.
_PIECES = (2**14, 2**20)
# Tolerance of logits, relative to their spread; products in bfloat16 or TF32 use half of it.
ROUNDING = 2e-3
_calls = itertools.count()


def _of_all(value: int) -> np.ndarray:
    return np.array([value]) if jax.process_count() == 1 else process_allgather(np.array(value))


def first(value: int) -> int:
    """Return the first host's value for all: others may see other or newer files."""
    return type(value)(_of_all(value)[0])


def total(count: int) -> int:
    """Sum the counts of all hosts."""
    return int(_of_all(count).sum())


def largest(value: int) -> int:
    """Return the largest value on any host."""
    return int(_of_all(value).max())


def share(images: np.ndarray) -> np.ndarray:
    """Return this process's part of `images`; the parts differ in size by at most one."""
    return images[jax.process_index() :: jax.process_count()]


def everyone(value: T) -> list[T]:
    """Return the values (anything that can be pickled) of all processes, in order.

    Waits for the others as long as they live: images that survive take far longer than others.
    """
    if jax.process_count() == 1:
        return [value]
    mine = np.frombuffer(pickle.dumps((jax.process_index(), value)), np.uint8)
    longest = max(_lengths(len(mine)))
    width = _PIECES[longest > _PIECES[0]]
    padded = np.zeros(-(-longest // width) * width, np.uint8)
    padded[: len(mine)] = mine
    pieces = [process_allgather(padded[i : i + width]) for i in range(0, len(padded), width)]
    values = dict(pickle.loads(row) for row in np.concatenate(pieces, axis=1))
    return [values[process] for process in range(jax.process_count())]


def _lengths(mine: int) -> list[int]:
    """Collect all lengths by the coordination service; Gloo's collectives time out after 30 s."""
    client = distributed.global_state.client
    if client is None:
        raise ValueError("call jax.distributed.initialize() first, in every process")
    call = f"{__name__}/{next(_calls)}"
    client.key_value_set(f"{call}/{jax.process_index()}", str(mine))

    def length(process: int) -> int:
        waiting = f"waiting for process {process}, which is still busy"
        with patience.lasting(waiting, here=jax.process_index() == 0):
            while True:
                try:
                    return int(client.blocking_key_value_get(f"{call}/{process}", 1000 * _PATIENCE))
                except jax.errors.JaxRuntimeError as error:
                    if "DEADLINE_EXCEEDED" not in str(error):
                        raise

    return [length(process) for process in range(jax.process_count())]


def together(function: Callable[[], T]) -> T:
    """Call `function`; if it raises ValueError in one process, all raise it."""
    if jax.process_count() == 1:
        return function()
    mistake = None
    try:
        result = function()
    except ValueError as error:
        mistake = str(error)
    if mistakes := [text for text in everyone(mistake) if text is not None]:
        raise ValueError(mistakes[0])
    return result


def agree(
    identity: dict[str, Any],
    *,
    problem: str = "evaluates something different",
    remedy: str = "Give all processes the same command, weights and data",
) -> None:
    """Raise ValueError in all processes unless they hold the same plain values."""
    plain = json.loads(json.dumps(identity))
    for process, other in enumerate(everyone(plain)):
        words = process != jax.process_index() and differences(other, plain)
        if words:
            raise ValueError(
                f"process {process} {problem} than process {jax.process_index()}: {words}. {remedy}"
            )


def differences(there: dict[str, Any], here: dict[str, Any]) -> str:
    """Describe how two evaluations differ; "" if they do not."""

    def short(value: Any) -> str:
        text = json.dumps(value)
        return text if len(text) <= 80 else text[:77] + "..."

    differing = [k for k in {**there, **here} if there.get(k) != here.get(k)]
    return "; ".join(
        f"{k} is {short(there.get(k))} there, {short(here.get(k))} here" for k in differing
    )
