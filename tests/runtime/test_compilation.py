"""Where compiled programs are kept, and that a second compilation finds them."""

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from absl.testing import absltest, parameterized
from jax.experimental.compilation_cache import compilation_cache

from jaxrobust.runtime import compilation


class CacheTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        names = ("compilation_cache_dir", "persistent_cache_min_compile_time_secs")
        names = [f"jax_{name}" for name in (*names, "enable_compilation_cache")]
        before = {name: jax.config.values[name] for name in names}
        jax.config.update("jax_compilation_cache_dir", None)
        compilation_cache.reset_cache()
        self.addCleanup(compilation_cache.reset_cache)
        self.addCleanup(lambda: [jax.config.update(k, v) for k, v in before.items()])

    def place(self, *, processes=1, backend="tpu", shared=None, **environment):
        patch = absltest.mock.patch
        with (
            patch.object(jax, "process_count", lambda: processes),
            patch.object(jax, "default_backend", lambda: backend),
            patch.dict(os.environ, {"XDG_CACHE_HOME": "/caches"} | environment),
        ):
            where = compilation.use_persistent_cache(shared)
        if where:
            self.assertEqual(jax.config.values["jax_compilation_cache_dir"], where)
        return where

    def test_one_process_keeps_them_at_home(self):
        self.assertEqual(self.place(shared=Path("runs")), "/caches/jaxrobust/xla")

    def test_a_pod_beside_its_runs(self):
        """Only the first process writes: on disks of their own, the others would never hit."""
        for backend in ("tpu", "gpu"):
            jax.config.update("jax_compilation_cache_dir", None)
            where = self.place(processes=4, backend=backend, shared=Path("runs"))
            self.assertEqual(where, str(Path("runs/xla-cache").absolute()))

    @parameterized.parameters("/elsewhere", "gs://bucket/cache")
    def test_a_place_that_was_chosen(self, chosen):
        jax.config.update("jax_compilation_cache_dir", chosen)  # $JAX_COMPILATION_CACHE_DIR
        for processes in (1, 4):
            self.assertEqual(self.place(processes=processes, shared=Path("runs/c")), chosen)

    def test_none_for_several_processes_on_cpu(self):
        self.assertIsNone(self.place(processes=2, backend="cpu", shared=Path("/runs/c")))
        self.assertFalse(jax.config.values["jax_enable_compilation_cache"])

    @pytest.mark.slow
    def test_a_second_compilation_hits(self):
        jax.config.update("jax_compilation_cache_dir", self.create_tempdir().full_path)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        self.assertIsNotNone(self.place(backend="cpu"))
        hits = []
        for _ in range(2):
            executable, seconds, hit = compilation.compiled(
                jax.jit(lambda x: jnp.sin(x) @ x), jnp.ones((4, 4))
            )
            self.assertGreater(seconds, 0)
            self.assertEqual(executable(jnp.zeros((4, 4))).sum(), 0)
            hits.append(hit)
            jax.clear_caches()
        self.assertEqual(hits, [False, True])


if __name__ == "__main__":
    absltest.main()
