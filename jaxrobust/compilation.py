"""Compiling ahead of the first step: how long it took, and whether the cache had it."""

import os
import time
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

_HITS = "/jax/compilation_cache/cache_hits"


def use_persistent_cache() -> Path | None:
    """Turns XLA's cache on disk on, in $JAX_COMPILATION_CACHE_DIR or ~/.cache/jaxrobust/xla.

    Off, and None, for several processes on CPU: a program that XLA reads back from disk has lost
    the order of its collectives, and Gloo then matches those of one host with others of the next.
    """
    if jax.process_count() > 1 and jax.default_backend() == "cpu":
        jax.config.update("jax_enable_compilation_cache", False)
        compilation_cache.reset_cache()  # JAX may have looked at the setting already
        return None
    chosen = jax.config.values["jax_compilation_cache_dir"]
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    directory = Path(chosen) if chosen else caches / "jaxrobust" / "xla"
    jax.config.update("jax_compilation_cache_dir", str(directory))
    return directory


def compiled(function: Any, *arguments: Any) -> tuple[Any, float, bool]:
    """(executable, seconds, cache hit) of a jitted function for these arguments."""
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
