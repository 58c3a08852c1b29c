"""Chips that are not there, for tests that compile for them."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any
from unittest import mock

import jax
from absl.testing import absltest
from jax.experimental.compilation_cache import compilation_cache

from jaxrobust.doctor.programs import topology


@contextlib.contextmanager
def confined() -> Iterator[None]:
    """Undo what `topology.devices` sets: the environment, and no cache on disk."""
    cached = jax.config.values["jax_enable_compilation_cache"]
    with mock.patch.dict(os.environ):
        yield
    jax.config.update("jax_enable_compilation_cache", cached)
    compilation_cache.reset_cache()


def chips(test: absltest.TestCase, name: str) -> list[Any]:
    """Return the chips of a slice, for the rest of a test."""
    test.enter_context(confined())
    return topology.devices(name)
