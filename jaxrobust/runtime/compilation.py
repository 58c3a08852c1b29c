"""Compiling ahead of the first step: how long it took, and whether the cache had it."""

import time
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from jaxrobust.runtime import folders

_HITS = "/jax/compilation_cache/cache_hits"


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


def compiled(function: Any, *arguments: Any) -> tuple[Any, float, bool]:
    """Return (executable, seconds, cache hit) of a jitted function for these arguments."""
    hits = []

    def listen(event: str, **unused: object) -> None:
        if event == _HITS:
            hits.append(event)

    jax.monitoring.register_event_listener(listen)
    start = time.perf_counter()
    try:
        executable = function.lower(*arguments).compile()
    finally:
        jax.monitoring.unregister_event_listener(listen)
    return executable, time.perf_counter() - start, bool(hits)
