"""Pallas kernels for TPUs; a layer imports their modules at its first use."""

import importlib
from typing import Any

import jax

# Whether JAX's interpreter runs kernels traced in this context, on any platform. Defined here, as
# a context defined during a trace invalidates it: JAX would compile the function again.
interpreted = jax.make_user_context(default_value=False)


def __getattr__(name: str) -> Any:
    if name.startswith("_"):
        raise AttributeError(name)
    return importlib.import_module(f"{__name__}.{name}")
