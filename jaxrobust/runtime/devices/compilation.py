"""Compiling: how long it took, whether the cache had it, and what it took the last time."""

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from jaxrobust.runtime.files import folders, jsonl
from jaxrobust.runtime.text import patience

_HITS = "/jax/compilation_cache/cache_hits"
_SHORT_S = 5.0  # a wait that nobody has to be told of
_UNKNOWN = "minutes for a large network"
_KEPT = 300  # programs whose times are remembered


def use_persistent_cache(shared: Path | None = None) -> str | None:
    """Turn on XLA's cache on disk, and return where it is.

    That is $JAX_COMPILATION_CACHE_DIR (also a gs:// address), else ~/.cache/jaxrobust/xla; for
    several processes `xla-cache` in `shared`, a folder that all of them see: JAX writes from the
    first process alone, so the others of a pod never find anything on disks of their own.

    Off, and None, for several processes on CPU: a program that XLA reads back from disk has lost
    the order of its collectives, and Gloo then matches those of one host with others of the next.
    """
    if jax.process_count() > 1 and jax.default_backend() == "cpu":
        jax.config.update("jax_enable_compilation_cache", False)
        compilation_cache.reset_cache()  # JAX may have looked at the setting already
        return None
    if chosen := jax.config.values["jax_compilation_cache_dir"]:
        return str(chosen)
    directory = folders.cache("xla")
    if shared is not None and jax.process_count() > 1:
        directory = shared.absolute() / "xla-cache"
    jax.config.update("jax_compilation_cache_dir", str(directory))
    return str(directory)


@contextlib.contextmanager
def cache_hits() -> Iterator[list[str]]:
    """Give a list that grows with each program that the cache has."""
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
    """Name a program by purpose, arrays, numbers and devices, to remember its time."""
    leaves = jax.tree.leaves(arguments)
    numbers = sum(math.prod(leaf.shape) for leaf in leaves)
    devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    return f"{purpose}, {len(leaves)} arrays, {numbers} numbers, {devices}"


def expected(name: str, unknown: str = _UNKNOWN) -> str:
    """Say how long compiling a `program` took last time on this machine; `unknown`: the first."""
    times = _remembered().get(name)
    if times is None:
        return unknown
    took = f"took {times['seconds']:.0f} s last time"
    if times["hit"] and times["cold"] is not None:
        return f"{took}, from the cache, and {times['cold']:.0f} s without it"
    return took


def remember(name: str, seconds: float, *, hit: bool) -> None:
    """Keep for `expected` how long a program took, unless the disk cannot be written."""
    times = _remembered()
    cold = times.pop(name, {"cold": None})["cold"] if hit else seconds
    times.pop(name, None)  # the newest is the last one
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
    """Announce a compilation, unless it was short last time, and keep its seconds for `name`."""
    times, took = _remembered().get(name), expected(name, unknown)
    if always or times is None or max(times["seconds"], times["cold"] or 0.0) >= _SHORT_S:
        say(f"{activity} ({took})")
    start = time.perf_counter()
    with cache_hits() as hits, patience.lasting(activity, last=took, here=jax.process_index() == 0):
        yield
    remember(name, time.perf_counter() - start, hit=bool(hits))


def _times() -> Path:
    return folders.cache("compile-seconds.json")


def _remembered() -> dict[str, dict[str, Any]]:
    """Read the times that are known of programs; of a damaged or older file there are none."""
    try:
        rows = json.loads(_times().read_text())
        return {
            str(name): {key: row[key] for key in ("seconds", "hit", "cold")}
            for name, row in rows.items()
        }
    except (OSError, ValueError, AttributeError, TypeError, KeyError):
        return {}
