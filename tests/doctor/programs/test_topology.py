"""What is said of programs for chips that are not here, from figures that are written by hand."""

import importlib.util
import types
from unittest import mock

from absl.testing import absltest, parameterized

from jaxrobust.doctor.programs import topology
from tests.support.programs import CHIP, COSTS


class RooflineTest(parameterized.TestCase):
    def test_each_bound(self):
        found = topology.roofline(COSTS, CHIP, flops=2e9, images=8)
        expected = {"flops_s": 2e-3, "hbm_s": 1e-2, "cycles_s": 7e-3, "ici_s": 5e-3}
        for key, value in expected.items():
            self.assertAlmostEqual(found[key], value, delta=1e-12, msg=key)
        self.assertEqual((found["bound_by"], found["roofline_step_s"]), ("hbm", found["hbm_s"]))
        self.assertAlmostEqual(found["roofline_images_per_s_per_chip"], 800)

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


class RefusedTest(absltest.TestCase):
    def test_too_large(self):
        error = "RESOURCE_EXHAUSTED: Used 25.31G of 15.75G hbm. Exceeded by 9.56G.\n pages"
        expected = (
            "the program needs 25.31G of memory on each chip, which has 15.75G for it; try less"
        )
        self.assertEqual(topology.too_large(error, "less"), expected)
        self.assertIn(
            "needs more of memory on each chip, which has less", topology.too_large("", "x")
        )

    def test_names(self):
        with (
            mock.patch.object(importlib.util, "find_spec", lambda name: None),
            self.assertRaisesRegex(ImportError, "--on v5e:4x4 needs the TPU compiler"),
        ):
            topology.devices("v5e:4x4", flag="--on")
        with (
            mock.patch.object(importlib.util, "find_spec", lambda name: "there"),
            self.assertRaisesRegex(
                ValueError, "--topology v5e:0x4: a side has no chips; write one"
            ),
        ):
            topology.devices("v5e:0x4")

    def test_which_chips_are_asked_for(self):
        import jax
        from jax.experimental import topologies
        from jax.experimental.compilation_cache import compilation_cache

        for name, more in (("v5e:4x4", {}), ("v4:2x2x4", {"chip_config_name": "megacore"})):
            with (
                mock.patch.object(importlib.util, "find_spec", lambda name: "there"),
                mock.patch.dict(topology.os.environ),
                mock.patch.object(jax.config, "update") as update,
                mock.patch.object(compilation_cache, "reset_cache") as reset,
                mock.patch.object(topologies, "get_topology_desc") as asked,
            ):
                asked.return_value.devices = ["a chip"]
                self.assertEqual(topology.devices(name), ["a chip"])
                set_for = {key: topology.os.environ[key] for key in topology.ENVIRONMENT}
            self.assertEqual(set_for, topology.ENVIRONMENT)
            asked.assert_called_once_with(platform="tpu", topology_name=name, **more)
            update.assert_called_once_with("jax_enable_compilation_cache", False)
            reset.assert_called_once_with()


class CompiledTest(absltest.TestCase):
    """Figures of a program; the compiler is made up."""

    def compiled(self, **how):
        function, clock = mock.Mock(), iter([10.0, 12.5, 20.0])
        self.executable = mock.Mock(**{"as_text.return_value": "the text"})
        self.executable.cost_analysis.return_value = {"flops": 7.0}
        how = {"return_value": self.executable} | how
        with (
            mock.patch("jaxrobust.runtime.devices.tpus.compiled", **how) as compiled,
            mock.patch.object(topology.time, "perf_counter", lambda: next(clock)),
            mock.patch.object(topology, "sizes", return_value={"argument_bytes": 3}) as sizes,
            mock.patch.object(topology.hlo, "parse", lambda text: text),
            mock.patch.object(topology, "costs", lambda module: {"costs of": module}),
        ):
            found = topology.compiled(function, 1, "x", remedy="less")
            function.lower.assert_called_once_with(1, "x")
            compiled.assert_called_once_with(function.lower.return_value)
            sizes.assert_called_once_with(self.executable)
        return found

    def test_figures(self):
        expected = {"trace_s": 2.5, "compile_s": 7.5, "argument_bytes": 3, "flops_loops_once": 7.0}
        self.assertEqual(self.compiled(), (expected | {"costs of": "the text"}, "the text"))

    def test_what_does_not_fit_is_a_sentence_and_other_errors_stay(self):
        from jax.errors import JaxRuntimeError

        used = "RESOURCE_EXHAUSTED: Used 25.31G of 15.75G hbm. Exceeded by 9.56G."
        with self.assertRaisesRegex(ValueError, "25.31G of memory on each chip, .*; try less$"):
            self.compiled(side_effect=JaxRuntimeError(used))
        with self.assertRaisesRegex(JaxRuntimeError, "INTERNAL"):
            self.compiled(side_effect=JaxRuntimeError("INTERNAL: x"))
