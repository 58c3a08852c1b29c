"""What is said of programs for chips that are not here, from figures that are written by hand."""

import importlib.util
import types
from unittest import mock

import jax
import jax.numpy as jnp
from absl.testing import parameterized
from jax.errors import JaxRuntimeError
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache

from jaxrobust.doctor.programs import gpus, hlo, topology
from tests.support import sweeps
from tests.support.programs import CHIP, COSTS

# As libtpu 0.0.42 sends a share of a sum to the other slice.
TWO_SLICES = """\
HloModule jit_f, is_scheduled=true, num_partitions=32

ENTRY %main (x: f32[64,8,128]) -> f32[64,8,128] {
  %x = f32[64,8,128]{2,1,0:T(8,128)} parameter(0)
  %after-all = token[] after-all()
  %send = (f32[64,8,128]{2,1,0:T(8,128)}, u32[], token[]) send(%x, %after-all), channel_id=2, \
is_host_transfer=true, frontend_attributes={_xla_megascale_target="{1,2}x{0:15}",\
_xla_megascale_transfer_type="ALL_REDUCE"}
  %recv = (f32[64,8,128]{2,1,0:T(8,128)}, u32[], token[]) recv(%after-all), channel_id=1, \
is_host_transfer=true, frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}
  %recv-done = (f32[64,8,128]{2,1,0:T(8,128)}, token[]) recv-done(%recv), channel_id=1
  ROOT %sum = f32[64,8,128]{2,1,0:T(8,128)} get-tuple-element(%recv-done), index=0
}
"""


class RooflineTest(parameterized.TestCase):
    def test_each_bound(self):
        found = topology.roofline(COSTS, CHIP, flops=2e9, images=8)
        expected = {"flops_s": 2e-3, "hbm_s": 1e-2, "cycles_s": 7e-3, "ici_s": 5e-3}
        for key, value in expected.items():
            self.assertAlmostEqual(found[key], value, delta=1e-12, msg=key)
        self.assertEqual((found["bound_by"], found["roofline_step_s"]), ("hbm", found["hbm_s"]))
        self.assertAlmostEqual(found["roofline_images_per_s_per_chip"], 800)

    def test_between_slices(self):
        chip, costs = CHIP._replace(network=1e9), COSTS | {"network_bytes": 2e9}
        found = topology.roofline(costs, chip, flops=2e9, images=8)
        self.assertEqual((found["bound_by"], found["network_s"]), ("network", 2.0))
        module = hlo.parse(TWO_SLICES)
        self.assertEqual(topology.between_slices(module), [4 * 64 * 1024])
        self.assertEqual(topology.costs(module, slices=2)["network_bytes"], 4 * 64 * 1024)
        self.assertEqual(topology.network_bytes(100, 4), 150)

    def test_without_a_clock(self):
        found = topology.roofline(COSTS, CHIP._replace(clock=None), flops=2e10, images=8)
        self.assertEqual(found["bound_by"], "flops")
        self.assertNotIn("cycles_s", found)

    def test_memory(self):
        self.assertEqual(topology.memory_of(COSTS), 2**30 + 2**29 + 2**31 + 2**20)
        analysis = types.SimpleNamespace(
            argument_size_in_bytes=5,
            output_size_in_bytes=9,
            alias_size_in_bytes=2,
            temp_size_in_bytes=11,
            generated_code_size_in_bytes=13,
        )
        executable = mock.Mock(memory_analysis=lambda: analysis)
        sizes = {"argument_bytes": 5, "output_bytes": 7, "temporary_bytes": 11, "code_bytes": 13}
        self.assertEqual(topology.sizes(executable), sizes)


class RefusedTest(parameterized.TestCase):
    def test_too_large(self):
        error = "RESOURCE_EXHAUSTED: Used 25.31G of 15.75G hbm. Exceeded by 9.56G.\n pages"
        expected = (
            "the program needs 25.31G of memory on each chip, which has 15.75G available; try less"
        )
        self.assertEqual(topology.too_large(error, "less"), expected)
        self.assertIn(
            "needs more of memory on each chip, which has less", topology.too_large("", "x")
        )

    @sweeps.rows(
        ("v5e:4x4", None, ImportError, "--on v5e:4x4 needs the TPU compiler"),
        ("v5e:0x4", "there", ValueError, "--on v5e:0x4: a side has no chips; give a topology"),
        ("p100:8", "there", ValueError, "no compiler for such a chip; give a topology .*, h100:1"),
        ("h100:9", "there", ValueError, "--on h100:9: request 1 to 8 GPUs, such as h100:1 or"),
        (
            "h200:1",
            None,
            ImportError,
            "--on h200:1 needs the GPU compiler; run python3.13 "
            "tools/gpu/make_environment.py FOLDER in a checkout, then this command with FOLDER/bin",
        ),
    )
    def test_names(self, name, spec, error, message):
        with (
            mock.patch.object(importlib.util, "find_spec", return_value=spec),
            self.assertRaisesRegex(error, message),
        ):
            topology.devices(name, flag="--on")

    @sweeps.rows(
        ("v5e:4x4", {}), ("v4:2x2x4", {"chip_config_name": "megacore"}),
        ("h100:8", {"topology": "1x1x8", "target_config": gpus.target_config("h100")}),
        ("v5e:4x4", {"num_slices": 2}),
    )  # fmt: skip
    def test_which_chips_are_asked_for(self, name, more):
        gpu = name.startswith("h")
        platform, compiler = ("cuda", "jax_cuda12_plugin") if gpu else ("tpu", "libtpu")
        self.enter_context(mock.patch.dict(topology.os.environ, {"XLA_FLAGS": "--a"}))
        find, update, reset, asked = (
            self.enter_context(mock.patch.object(*place))
            for place in (
                (importlib.util, "find_spec"),
                (jax.config, "update"),
                (compilation_cache, "reset_cache"),
                (topologies, "get_topology_desc"),
            )
        )
        self.enter_context(mock.patch.object(gpus, "answer_for_cudnn"))
        asked.return_value.devices = ["a chip"]
        self.assertEqual(topology.devices(name, slices=more.get("num_slices", 1)), ["a chip"])
        environment = {"XLA_FLAGS": "--a --xla_gpu_autotune_level=0", "JAX_PLATFORMS": "cpu"}
        wanted = environment if gpu else topology.ENVIRONMENT
        self.assertLessEqual(wanted.items(), dict(topology.os.environ).items())
        asked.assert_called_once_with(platform=platform, topology_name=name, **more)
        update.assert_called_once_with("jax_enable_compilation_cache", False)
        reset.assert_called_once_with()
        find.assert_called_once_with(compiler)


class CompiledTest(parameterized.TestCase):
    def test_figures(self):
        x = jax.ShapeDtypeStruct((8, 16), jnp.float32)
        found = topology.compiled(jax.jit(lambda a, b: a @ b.T), x, x)
        figures = found.figures
        for key in ("trace_s", "compile_s"):
            self.assertBetween(figures[key], 1e-6, 60)
        sizes = (figures["argument_bytes"], figures["output_bytes"])
        self.assertEqual(sizes, (2 * 8 * 16 * 4, 8 * 8 * 4))
        self.assertEqual(figures["flops_loops_once"], 2 * 8 * 8 * 16)
        self.assertLessEqual(topology.costs(found.module).items(), figures.items())

    @sweeps.rows(
        ("RESOURCE_EXHAUSTED: Used 25.31G of 15.75G hbm. Exceeded by 9.56G.", ValueError,
         "25.31G of memory on each chip, .*; try less$"),
        ("INTERNAL: x", JaxRuntimeError, "INTERNAL"),
    )  # fmt: skip
    def test_what_does_not_fit_is_a_sentence_and_other_errors_stay(self, text, error, message):
        failing = mock.Mock(**{"lower.return_value.compile.side_effect": JaxRuntimeError(text)})
        with self.assertRaisesRegex(error, message):
            topology.compiled(failing, 1, remedy="less")
