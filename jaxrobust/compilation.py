"""Compiling ahead of the first step: how long it took, and whether the cache had it."""

import os
import time
from pathlib import Path
from typing import Any

import jax

_HITS = "/jax/compilation_cache/cache_hits"


def use_persistent_cache() -> Path:
    """Turns XLA's cache on disk on, in $JAX_COMPILATION_CACHE_DIR or ~/.cache/jaxrobust/xla."""
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
