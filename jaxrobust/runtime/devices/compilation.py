"""Compilation: its duration, cache hits, and how long it took last time."""

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from jaxrobust.runtime.files import caches, jsonl
from jaxrobust.runtime.text import patience

_HITS = "/jax/compilation_cache/cache_hits"
_SHORT_S = 5.0  # shorter waits are not announced
_UNKNOWN = "seconds to minutes"
_KEPT = 300  # number of programs whose times are stored
_spent: list[float] = []  # by this process, on each program


def use_persistent_cache(shared: Path | None = None) -> str | None:
    """Turn on XLA's cache on disk, and return its location.

    This is $JAX_COMPILATION_CACHE_DIR (possibly gs://), else ~/.cache/jaxrobust/xla. For several
    processes it is `xla-cache` in `shared`, a folder that all of them see: only the first process
    writes, so the others would never find anything on their own disks.

    Returns None, with the cache off, for several processes on CPU. A program read back from disk
    loses the order of its collectives, and Gloo then pairs the wrong ones between hosts.
    """
    if jax.process_count() > 1 and jax.default_backend() == "cpu":
        jax.config.update("jax_enable_compilation_cache", False)
        compilation_cache.reset_cache()  # JAX may already have read the setting
        return None
    if chosen := jax.config.values["jax_compilation_cache_dir"]:
        return str(chosen)
    directory = caches.folder("xla")
    if shared is not None and jax.process_count() > 1:
        directory = shared.absolute() / "xla-cache"
    jax.config.update("jax_compilation_cache_dir", str(directory))
    return str(directory)


@contextlib.contextmanager
def cache_hits() -> Iterator[list[str]]:
    """Yield a list that grows with each program found in the cache."""
    hits: list[str] = []

    def listen(event: str, **unused: object) -> None:
        if event == _HITS:
            hits.append(event)

    jax.monitoring.register_event_listener(listen)
    try:
        yield hits
    finally:
        jax.monitoring.unregister_event_listener(listen)


def program(purpose: str, *arguments: Any) -> str:
    """Return a program's key for stored times: purpose, arrays, numbers and devices."""
    leaves = jax.tree.leaves(arguments)
    numbers = sum(math.prod(leaf.shape) for leaf in leaves)
    devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    return f"{purpose}, {len(leaves)} arrays, {numbers} numbers, {devices}"


def expected(name: str, unknown: str = _UNKNOWN) -> str:
    """Say how long compiling a `program` took last time on this machine; `unknown` if it is new."""
    times = _remembered().get(name)
    if times is None:
        return unknown
    took = f"took {times['seconds']:.0f} s last time"
    if times["hit"] and times["cold"] is not None:
        return f"{took}, from the cache, and {times['cold']:.0f} s without it"
    return took


def remember(name: str, seconds: float, *, hit: bool) -> None:
    """Store how long a program took, for `expected`, unless the disk is read-only or full."""
    times = _remembered()
    cold = times.pop(name, {"cold": None})["cold"] if hit else seconds
    times.pop(name, None)  # keeps the newest last
    times[name] = {"seconds": round(seconds, 1), "hit": hit, "cold": cold and round(cold, 1)}
    path = _times()
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        jsonl.replace(path, json.dumps(dict(list(times.items())[-_KEPT:]), indent=0) + "\n")


@contextlib.contextmanager
def waiting(
    activity: str,
    name: str,
    say: Callable[[str], None],
    *,
    always: bool = False,
    unknown: str = _UNKNOWN,
) -> Iterator[None]:
    """Announce a compilation, unless it was short last time, and store its seconds under `name`."""
    times, took = _remembered().get(name), expected(name, unknown)
    if always or times is None or max(times["seconds"], times["cold"] or 0.0) >= _SHORT_S:
        say(f"{activity} ({took})")
    start = time.perf_counter()
    with cache_hits() as hits, patience.lasting(activity, last=took, here=jax.process_index() == 0):
        yield
    _spent.append(time.perf_counter() - start)
    remember(name, _spent[-1], hit=bool(hits))


def seconds() -> float:
    """Return the time that this process has spent on announced compilations."""
    return sum(_spent)


def _times() -> Path:
    return caches.folder("compile-seconds.json")


def _remembered() -> dict[str, dict[str, Any]]:
    """Read the stored times of programs; empty if the file is damaged or older."""
    try:
        rows = json.loads(_times().read_text())
        return {
            str(name): {key: row[key] for key in ("seconds", "hit", "cold")}
            for name, row in rows.items()
        }
    except (OSError, ValueError, AttributeError, TypeError, KeyError):
        return {}
