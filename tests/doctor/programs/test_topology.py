"""What is said of programs for chips that are not here, from figures that are written by hand."""

import contextlib
import importlib.util
import io
import types
from unittest import mock

from absl.testing import absltest, parameterized

from jaxrobust.doctor.programs import topology
from jaxrobust.runtime.devices.hardware import Chip

CHIP = Chip(flops=1e12, memory=16 * 2**30, bandwidth=1e11, interconnect=1e10, clock=1e9)
FIGURES = {
    "trace_s": 1.25,
    "compile_s": 12.5,
    "instructions": 12345,
    "argument_bytes": 2**30,
    "output_bytes": 2**29,
    "temporary_bytes": 2**31,
    "code_bytes": 2**20,
    "flops_executable": 3e9,
    "hbm_bytes": 1e9,
    "cycles": 1_000_000,
    "kernels": [{"name": "k", "calls": 3, "cycles": 2_000_000, "bytes": 5e6, "flops": 7e9}],
    "sent_bytes": 4e7,
    "row_bytes": 1e7,
    "in_flight": [
        {"kind": "all-gather", "sent": 1e7, "cycles": 500_000.0, "row": False},
        {"kind": "all-reduce", "sent": 2e7, "cycles": 1e9, "row": True},
    ],
    "collectives": [
        {"kind": "all-gather", "in_attack_loop": False, "count": 2, "arrays": 5, "bytes": 3e6},
        {"kind": "all-reduce", "in_attack_loop": True, "count": 1, "arrays": 1, "bytes": 1e6},
    ],
    "collectives_in_attack_loop": 1,
    "parameters_gathered_more_than_once": ["a", "b", "c", "d", "e", "f"],
}


class ReadTest(absltest.TestCase):
    """The messages of a program, summed up."""

    def collective(self, kind="all-gather", times=1, inside=False, row=False, parameters=()):
        more = {"op_name": "", "parameters": tuple(parameters), "key": "", "row": row}
        known = {"kind": kind, "bytes": 100, "sent": 10.0, "arrays": 2, "times": times}
        return topology.hlo.Collective(**known, inside=inside, **more)

    def read(self, *collectives) -> dict:
        nothing = {"flops": 0, "traffic": 0, "cycles": 0, "kernels": []}
        costs = {name: mock.Mock(return_value=value) for name, value in nothing.items()}
        with (
            mock.patch.object(topology.hlo, "parse", return_value=mock.Mock(computations={})),
            mock.patch.object(topology.hlo, "collectives", return_value=list(collectives)),
            mock.patch.multiple(topology.hlo_costs, **costs),
            mock.patch.object(topology.hlo_parts, "figures", return_value={}),
            mock.patch.object(topology.hlo_overlap, "in_flight", return_value=[]),
        ):
            return topology.read("text")

    def test_a_loop_of_unknown_length_counts_once(self):
        found = self.read(self.collective(times=3), self.collective(times=None, row=True))
        self.assertEqual((found["sent_bytes"], found["row_bytes"]), (40, 10))
        (row,) = found["collectives"]
        self.assertEqual((row["count"], row["arrays"], row["bytes"]), (2, 4, 400))

    def test_kinds_inside_and_outside_of_the_attack(self):
        inside = self.collective("all-reduce", inside=True)
        found = self.read(inside, self.collective(), self.collective("all-reduce"), inside)
        rows = [(r["kind"], r["in_attack_loop"], r["count"]) for r in found["collectives"]]
        expected = [("all-gather", False, 1), ("all-reduce", False, 1), ("all-reduce", True, 2)]
        self.assertEqual(rows, expected)
        self.assertEqual(found["collectives_in_attack_loop"], 2)

    def test_parameters_that_are_gathered_again(self):
        found = self.read(
            self.collective(parameters=["once", "twice"]),
            self.collective(parameters=["twice"]),
            self.collective(parameters=["again and again"], times=None),
            self.collective(parameters=["in a loop"], times=5),
            self.collective(parameters=["never"], times=0),
        )
        more = ["again and again", "in a loop", "twice"]
        self.assertEqual(found["parameters_gathered_more_than_once"], more)
        self.assertEqual(found["parameters_gathered"], 5)


class RooflineTest(parameterized.TestCase):
    def test_each_bound(self):
        found = topology.roofline(FIGURES, CHIP, flops=2e9, images=8)
        expected = {"flops_s": 2e-3, "hbm_s": 1e-2, "cycles_s": 7e-3, "ici_s": 5e-3}
        for key, value in expected.items():
            self.assertAlmostEqual(found[key], value, delta=1e-12, msg=key)
        self.assertEqual((found["bound_by"], found["roofline_step_s"]), ("hbm", found["hbm_s"]))
        self.assertAlmostEqual(found["roofline_images_per_s_per_chip"], 800)
        # The first lasts for half of its bytes; the second, at half of the links, for all.
        self.assertAlmostEqual(found["hidden_bytes"], 5e6 + 2e7)
        self.assertAlmostEqual(found["hidden_share"], 2.5e7 / 4e7)

    def test_without_a_clock_or_messages(self):
        found = topology.roofline(FIGURES, CHIP._replace(clock=None), flops=2e10, images=8)
        self.assertEqual(found["bound_by"], "flops")
        self.assertNoCommonElements(found, ("cycles_s", "hidden_share", "hidden_bytes"))
        silent = topology.roofline(FIGURES | {"sent_bytes": 0}, CHIP, flops=1, images=1)
        self.assertNotIn("hidden_share", silent)

    def test_memory(self):
        self.assertEqual(topology.memory_of(FIGURES), 2**30 + 2**29 + 2**31 + 2**20)
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

    def shown(self, chip, figures=FIGURES):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            found = topology.show(figures, chip, flops=2e9, images=8)
        return found, printed.getvalue()

    def test_for_people(self):
        found, text = self.shown(CHIP)
        self.assertEqual(found["memory_bytes"], topology.memory_of(FIGURES))
        self.assertEqual(found["chip_memory_bytes"], CHIP.memory)
        self.assertEqual(found["bound_by"], "hbm")
        for line in (
            "  traced in 1.2 s, compiled in 12.5 s; 12,345 instructions\n",
            "  memory per chip: 3.50 of 16 GiB (1.00 argument, 0.50 output, 2.00 temporary, 0.00",
            "  2 all-gather of 5 arrays, 3.0 MB\n",
            "  1 all-reduce of 1 arrays, 1.0 MB, IN THE ATTACK LOOP\n",
            "  collectives in the attack loop: 1\n",
            "  GATHERED MORE THAN ONCE: a, b, c, d, e, ...\n",
            "  0.002 TFLOP per chip and step of the model, 1.50 of that in the executable\n",
            "  kernel k: 3 calls of 2,000,000 cycles, 5.0 MB, 7.0 GFLOP, as its file says\n",
            "  40.0 MB sent by a chip, 30.0 MB of that beside other work, 62% hidden behind it\n",
            "  roofline, not measured: 10.0 ms per step, 800 images/s per chip, bound by hbm "
            "(flops 2.0 ms, hbm 10.0 ms, cycles 7.0 ms, ici 5.0 ms)\n",
        ):
            self.assertIn(line, text)

    def test_of_an_unknown_chip(self):
        found, text = self.shown(None, FIGURES | {"parameters_gathered_more_than_once": ["a"]})
        memory = topology.memory_of(FIGURES)
        self.assertEqual(found, {"memory_bytes": memory, "chip_memory_bytes": None})
        self.assertIn("memory per chip: 3.50 GiB (", text)
        self.assertIn("MORE THAN ONCE: a\n", text)
        self.assertNotIn("roofline", text)


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
            mock.patch.object(topology, "read", lambda text: {"read": text}),
        ):
            found = topology.compiled(function, 1, "x", remedy="less")
            function.lower.assert_called_once_with(1, "x")
            compiled.assert_called_once_with(function.lower.return_value)
            sizes.assert_called_once_with(self.executable)
        return found

    def test_figures(self):
        expected = {"trace_s": 2.5, "compile_s": 7.5, "argument_bytes": 3, "flops_loops_once": 7.0}
        self.assertEqual(self.compiled(), expected | {"read": "the text"})

    def test_what_does_not_fit_is_a_sentence_and_other_errors_stay(self):
        from jax.errors import JaxRuntimeError

        used = "RESOURCE_EXHAUSTED: Used 25.31G of 15.75G hbm. Exceeded by 9.56G."
        with self.assertRaisesRegex(ValueError, "25.31G of memory on each chip, .*; try less$"):
            self.compiled(side_effect=JaxRuntimeError(used))
        with self.assertRaisesRegex(JaxRuntimeError, "INTERNAL"):
            self.compiled(side_effect=JaxRuntimeError("INTERNAL: x"))
