"""Which row of the table a machine is, and that programs are compiled with it."""

import os
from unittest import mock

import jax
from absl.testing import parameterized

from jaxrobust.runtime.devices import cpus
from jaxrobust.training import build
from tests.support import sweeps
from tests.support.steps import small_config

ZEN3 = "sse4_2 avx f16c avx2 fma"
ZEN4 = f"{ZEN3} avx512f avx512dq avx512_bf16"
XEON = f"{ZEN4} amx_bf16 amx_tile amx_int8"


class KindTest(parameterized.TestCase):
    def kind(self, flags, xla_flags=""):
        text = f"processor\t: 0\nflags\t\t: {flags}\nprocessor\t: 1\nflags\t\t: {flags}\n"
        file = self.create_tempfile(content=text).full_path
        with mock.patch.dict(os.environ, XLA_FLAGS=xla_flags):
            return cpus.kind(cpus.Path(file)).name

    @sweeps.rows(
        (XEON, "amx"), (ZEN4, "avx512"), (ZEN3, "avx2"), ("sse4_2 avx", "other"), ("", "other")
    )
    def test_of_flags(self, flags, expected):
        self.assertEqual(self.kind(flags), expected)

    @sweeps.rows(
        ("AVX2", "avx2"), ("AVX512", "avx512"), ("AVX512_BF16", "avx512"), ("AMX", "amx"),
        ("AMX_FP16", "amx"), ("AVX", "other"), ("SSE4_2", "other"),
    )  # fmt: skip
    def test_of_what_xla_is_allowed(self, limit, expected):
        self.assertEqual(self.kind(XEON, f"--a=1 --xla_cpu_max_isa={limit} --b=2"), expected)

    def test_the_last_limit_counts(self):
        flags = "--xla_cpu_max_isa=AVX512 --xla_cpu_max_isa=AVX2"
        self.assertEqual(self.kind(XEON, flags), "avx2")

    def test_a_limit_adds_nothing(self):
        self.assertEqual(self.kind(ZEN3, "--xla_cpu_max_isa=AVX512"), "avx2")

    def test_where_no_file_says(self):
        self.assertEqual(cpus.kind(cpus.Path("/nowhere/cpuinfo")).name, "other")


class OptionsTest(parameterized.TestCase):
    def test_other_platforms_have_none(self):
        self.assertIsNone(cpus.search_options("tpu"))
        self.assertIsNone(cpus.step_options("gpu"))

    @sweeps.rows(*(row.name for row in cpus.KINDS))
    def test_of_a_step(self, name):
        row = next(row for row in cpus.KINDS if row.name == name)
        with (
            mock.patch.object(cpus, "kind", return_value=row),
            mock.patch.object(jax, "jit", wraps=jax.jit) as jit,
        ):
            build.phase(small_config(), "train", 1000)
        given = [
            c.kwargs["compiler_options"] for c in jit.mock_calls if "donate_argnums" in c.kwargs
        ]
        self.assertEqual(given, [dict(row.step) or None])

    def test_xla_knows_them(self):
        for row in cpus.KINDS:
            for options in (row.step, row.search):
                one = jax.jit(lambda x: x + 1, compiler_options=dict(options)).lower(1.0)
                self.assertIsNotNone(one.compile())
