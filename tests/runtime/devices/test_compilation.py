"""Where compiled programs are kept, and that a second compilation finds them."""

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from absl.testing import absltest, parameterized
from jax.experimental.compilation_cache import compilation_cache

from jaxrobust.runtime.devices import compilation, tpus
from tests.support import sweeps


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

    @sweeps.rows("/elsewhere", "gs://bucket/cache")
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
            executable, seconds, hit = tpus.compile_timed(
                jax.jit(lambda x: jnp.sin(x) @ x), jnp.ones((4, 4))
            )
            self.assertGreater(seconds, 0)
            self.assertEqual(executable(jnp.zeros((4, 4))).sum(), 0)
            hits.append(hit)
            jax.clear_caches()
        self.assertEqual(hits, [False, True])


class LastTimeTest(absltest.TestCase):
    """What compiling a program took the last time on this machine."""

    def setUp(self):
        super().setUp()
        self.cache = Path(self.create_tempdir())
        self.enterContext(absltest.mock.patch.dict(os.environ, {"XDG_CACHE_HOME": str(self.cache)}))

    def test_is_told(self):
        self.assertEqual(compilation.expected("step"), "seconds to minutes")
        compilation.remember("step", 41.2, hit=False)
        self.assertEqual(compilation.expected("step"), "took 41 s last time")
        compilation.remember("step", 1.3, hit=True)
        told = "took 1 s last time, from the cache, and 41 s without it"
        self.assertEqual(compilation.expected("step"), told)
        self.assertEqual(compilation.expected("other"), "seconds to minutes")

    def test_the_latest_are_remembered(self):
        with absltest.mock.patch.object(compilation, "_KEPT", 2):
            for name in ("first", "second", "first", "third"):
                compilation.remember(name, 41.2, hit=False)
        self.assertEqual(list(compilation._remembered()), ["first", "third"])

    def test_what_the_cache_gave_is_announced_if_it_was_long_without(self):
        for name, cold in (("long", 41.2), ("short", 4.9)):
            compilation.remember(name, cold, hit=False)
            compilation.remember(name, 0.3, hit=True)
        said = []
        for name in ("long", "short"):
            with compilation.waiting(name, name, said.append):
                pass
        self.assertEqual(said, ["long (took 0 s last time, from the cache, and 41 s without it)"])

    def test_a_file_that_is_damaged_or_cannot_be_written(self):
        file = self.cache / "jaxrobust" / "compile-seconds.json"
        for text in ("{", "[1]", '{"step": {"seconds": 3}}', '{"step": 3}'):
            compilation.remember("step", 41.2, hit=False)
            file.write_text(text)
            self.assertEqual(compilation.expected("step"), "seconds to minutes")
        os.environ["XDG_CACHE_HOME"] = str(self.create_tempfile("a_file").full_path)
        compilation.remember("step", 41.2, hit=False)

    def test_a_program_is_what_it_does_and_on_what(self):
        one, two = (jnp.zeros((size, 3)) for size in (2, 4))
        self.assertEqual(compilation.program("a", one), compilation.program("a", one + 1))
        names = {compilation.program(w, x) for w in ("a", "b") for x in (one, two, [one, one])}
        self.assertLen(names, 6)

    def test_waiting(self):
        said = []

        def wait(seconds):
            clock = iter((0.0, seconds))
            timed = absltest.mock.patch.object(
                compilation.time, "perf_counter", lambda: next(clock)
            )
            with timed, compilation.waiting("compiling", "draw", said.append):
                pass

        wait(157.0)  # nobody knows how long
        wait(0.1)  # what took long is said
        wait(0.1)  # and what did not is not
        wait(0.1)
        self.assertEqual(
            said,
            ["compiling (seconds to minutes)", "compiling (took 157 s last time)"],
        )


class OneProcessTest(absltest.TestCase):
    def test_one_process_on_cpu_has_one(self):
        chosen = jax.config.values["jax_compilation_cache_dir"]
        self.assertEqual(compilation.use_persistent_cache(), str(chosen))
        self.assertTrue(jax.config.values["jax_enable_compilation_cache"])
