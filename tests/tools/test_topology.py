"""Programs compiled for TPUs that are not here; needs `pip install -e '.[tpu-aot]'`."""

import contextlib
import importlib.util
import io
import json
import os
import runpy
import subprocess
import sys
from unittest import mock

import jax
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from jaxrobust.attacks import ensembles
from jaxrobust.doctor.programs import hlo, hlo_costs, topology
from jaxrobust.evaluation.engine import slots
from jaxrobust.runtime.devices import hardware
from tests.support import paths, tpu
from tests.support.modules import hidden
from tools.bench import slice_programs

TOOLS = paths.ROOT / "tools"
NEEDS = "needs the TPU compiler: pip install -e '.[test,tpu-aot]'"
there = importlib.util.find_spec("libtpu") is not None
STEP = ("bench_step.py", str(TOOLS.parent / "configs/vit_s_cvst.py"))
# Two matrices of the block are as large as what is split over the chips.
SMALL = """
from jaxrobust.config import base


def get_config():
    config = base().unlock()
    config.model.update(name="convnext_n", num_classes=10, image_size=8, dtype="bfloat16")
    config.model.options = {"stem_strides": (1,), "depths": (1,), "dims": (64,)}
    config.train.batch_size = 64
    config.mesh.fsdp = 0
    return config
"""
# A kernel takes 16 images on a chip, and its branch with gathers loops over them.
WINDOWS = SMALL.replace("convnext_n", "internimage_t").replace("image_size=8", "image_size=32")
WINDOWS = WINDOWS.replace('"stem_strides": (1,), "depths": (1,)', '"groups": (4,), "depths": (2,)')


def said(tool, *arguments):
    """(exit code, what is on stderr) of a tool of this very process."""
    argv, err = [tool, *arguments], io.StringIO()
    kept = mock.patch.dict(os.environ, JAXROBUST_ALLOCATOR="system")  # no second process
    with (
        kept,
        tpu.confined(),
        mock.patch.object(sys, "argv", argv),
        contextlib.redirect_stderr(err),
    ):
        try:
            runpy.run_path(str(TOOLS / tool), run_name="__main__")
        except SystemExit as end:
            return end.code, err.getvalue()
    return 0, err.getvalue()


class MessagesTest(parameterized.TestCase):
    def test_without_the_compiler(self):
        tpu = "v5e:4x4 needs the TPU compiler; pip install -e '.[tpu-aot]'\n"
        gpu = (
            "h100:1 needs the GPU compiler; run python3.13 tools/gpu/make_environment.py FOLDER in "
            "a checkout, then this command with FOLDER/bin/python\n"
        )
        bundles = (*STEP, "--bundles")
        commands = (STEP, tpu), (("bench_autoattack.py",), tpu), (bundles, tpu), (STEP, gpu)
        for command, expected in commands:
            with self.subTest(command=command, expected=expected):
                with hidden("libtpu", "jax_cuda12_plugin"):
                    code, message = said(*command, "--topology", expected.split()[0])
                tool = command[0].removesuffix(".py")
                self.assertEqual((code, message), (2, f"{tool}: --topology {expected}"))

    @absltest.skipUnless(there, NEEDS)
    @parameterized.product(
        command=(STEP, ("bench_autoattack.py",)), name=("v5e:3x3", "v5e-16", "p100:8", "v5e:0x4")
    )
    def test_unknown_slice(self, command, name):
        code, message = said(*command, "--topology", name)
        self.assertEqual(code, 2)
        tool = command[0].removesuffix(".py")
        self.assertRegex(
            message, rf"^{tool}: --topology {name}: .*; give a topology such as v5e:4x4, "
        )
        self.assertEqual(message.count("\n"), 1)

    @absltest.skipUnless(there, NEEDS)
    @parameterized.parameters(
        ("vit_s_cvst", "12", "--block 12: vit_s_cvst has a stem, and blocks 0 to 11"),
        ("vit_s_cvst", "-1", "--block -1: vit_s_cvst has a stem, and blocks 0 to 11"),
        ("cifar_aligned:cifar_vgg16", "0", "--block: cifar_vgg16 is not divided into blocks; "
         "choose another network, such as vit_s, convnext_t, xcit_s12 or swin_b"),
    )  # fmt: skip
    def test_unknown_block(self, config, number, expected):
        name, _, argument = config.partition(":")
        path = f"{TOOLS.parent}/configs/{name}.py" + f":{argument}" * bool(argument)
        command = ("bench_step.py", path, "--topology", "v5e:2x2", f"--block={number}")
        code, message = said(*command, "--batch", "4")
        self.assertEqual((code, message), (2, f"bench_step: {expected}\n"))

    @parameterized.parameters(
        *((STEP, "--traffic"), (STEP, "--bundles"), (STEP, "--block", "0")),
        (("bench_autoattack.py",), "--traffic"),
    )
    def test_an_executable_needs_a_slice(self, command, *flag):
        code, message = said(*command, *flag)
        self.assertEqual(code, 2)
        wanted = f"{flag[0]} reads an executable; add a slice, such as --topology v5e:4x4"
        self.assertRegex(message, wanted)

    @absltest.skipUnless(there, NEEDS)
    def test_batch_far_from_what_the_chips_divide(self):
        config = self.create_tempfile("small.py", SMALL.replace("= 64\n", "= 6\n")).full_path
        code, message = said(STEP[0], config, "--topology", "v5e:4x4")
        self.assertEqual(code, 2)
        self.assertRegex(message, "train.batch_size=6 cannot be split over 16 devices; use 16 or ")

    def test_bundles_of_a_gpu(self):
        code, message = said(*STEP, "--topology", "h100:1", "--bundles")
        wanted = "--bundles reads schedules for TPUs; for h100:1, give --traffic instead"
        self.assertEqual((code, message), (2, f"bench_step: {wanted}\n"))

    def test_topology_and_pytorch(self):
        code, message = said(*STEP, "--topology", "v5e:4x4", "--against", "torch")
        self.assertEqual(code, 2)
        self.assertRegex(message, "--topology only compiles and runs nothing; leave --against out")

    def test_program_that_does_not_fit(self):
        for error, needed in (
            (
                "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
                "temporaries (32.00G) exceeds available HBM (15.75G).",
                "32.00G",
            ),
            (
                "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory "
                "space hbm. Used 18.21G of 15.75G hbm. Exceeded hbm capacity by 2.46G.\n\nTotal",
                "18.21G",
            ),
        ):
            with self.subTest(row=(error, needed)):
                self.assertEqual(
                    topology.too_large(error, "--batch 8"),
                    f"the program needs {needed} of memory on each chip, which has 15.75G "
                    "available; try --batch 8",
                )


@absltest.skipUnless(there, NEEDS)
class DevicesTest(parameterized.TestCase):
    def test_one_device_for_each_chip(self):
        for name, count, kind in (
            ("v5e:4x4", 16, "TPU v5 lite"), ("v4:2x2x4", 16, "TPU v4"), 
            ("v6e:2x2", 4, "TPU v6 lite"),
            ("v7x:2x2x1", 8, "TPU7x"),  # two of each chip
        ):  # fmt: skip
            with self.subTest(row=(name, count, kind)):
                devices = tpu.chips(self, name)
                self.assertLen(devices, count)
                self.assertEqual({device.device_kind for device in devices}, {kind})
                self.assertIsNotNone(hardware.chip(kind))


class EngineTest(parameterized.TestCase):
    """The programs that bench_autoattack.py compiles, here for 8 CPU devices."""

    @parameterized.parameters(("apgd-ce", 2), ("apgd-t", 2), ("fab-t", 3), ("square", 1))
    def test_no_step_sends_anything(self, name, passes):
        mesh = jax.sharding.Mesh(np.array(jax.devices()[:8]), ("slots",))
        (setting,) = ensembles.plan("linf", "standard", [name], None)
        weights = jax.ShapeDtypeStruct((48, 5), np.float32)
        logits_fn = jax.tree_util.Partial(lambda w, x: x.reshape(len(x), -1) @ w, weights)
        step, arguments, found = slice_programs.abstract_step(
            mesh, slots.program_of(setting), logits_fn, slots=16, image=(4, 4, 3)
        )
        self.assertEqual(found, passes)
        module = hlo.parse(step.lower(*arguments).compile().as_text())
        self.assertEqual(hlo.collectives(module), [])
        # Two slots of a device; a pass with its backward pass multiplies twice.
        self.assertGreaterEqual(hlo_costs.flops(module), 2 * 2 * 48 * 5 * passes)


@pytest.mark.slow
@absltest.skipUnless(there, NEEDS)
class CompiledTest(parameterized.TestCase):
    def run_tool(self, *arguments, text=SMALL):
        config = self.create_tempfile("small.py", text).full_path
        command = [sys.executable, TOOLS / STEP[0], config, "--topology", "v5e:2x2", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    def figures(self, *arguments, **how):
        done = self.run_tool("--json", *arguments, **how)
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        return json.loads(done.stdout.splitlines()[-1])

    def test_a_step_that_does_not_fit(self):
        done = self.run_tool("--batch", "4000000")
        self.assertEqual((done.returncode, done.stdout), (2, ""))
        self.assertRegex(
            done.stderr,
            r"^bench_step: the program needs \d+\.\d+G of memory on each chip, which has 15\.75G "
            r"for it; try --batch 2000000 or --microbatches 2\n$",
        )

    def test_a_step_for_four_chips(self):
        result = self.figures("--attack-steps", "2")
        self.assertEqual((result["device"], result["batch_per_chip"]), ("4 x TPU v5 lite", 16))
        self.assertEqual(result["collectives_in_attack_loop"], 0)
        self.assertEqual(result["parameters_gathered_more_than_once"], [])
        self.assertGreaterEqual(result["parameters_gathered"], 2)
        kinds = {c["kind"] for c in result["collectives"]}
        self.assertContainsSubset({"all-gather"}, kinds)
        self.assertNotEmpty({"reduce-scatter", "all-reduce"} & kinds)
        self.assertLess(result["memory_bytes"], result["chip_memory_bytes"])
        # Counted in the executable's text and from the model. Three calls of gradients compute the
        # block's depthwise convolution and first product again, of 16 images of 8 x 8 pixels; what
        # kernels declare has their norms and GELUs too.
        calls = {
            name: sum(k["calls"] for k in result["kernels"] if k["name"] == name)
            for name in ("convnext_block", "convnext_block_gradient", "convnext_block_sums")
        }
        self.assertEqual(list(calls.values()), [4, 2, 1])
        again = (2 + 1) * 2 * 16 * 8 * 8 * 64 * (7 * 7 + 4 * 64)
        self.assertBetween((result["flops_executable"] - again) / result["flops"], 1, 1.1)
        self.assertEqual(result["roofline_step_s"], max(result[key] for key in topology.SECONDS))
        self.assertContainsSubset({"attack forward", "attack backward"}, result["by_part"])
        cycles = sum(s["cycles"] for kinds in result["by_part"].values() for s in kinds.values())
        declared = sum(kernel["calls"] * kernel["cycles"] for kernel in result["kernels"])
        self.assertEqual(cycles, result["cycles"] + declared)

        longer = self.figures("--attack-steps", "10")
        self.assertEqual(longer["collectives"], result["collectives"])
        ratio = longer["instructions"] / result["instructions"]
        self.assertBetween(ratio, 0.95, 1.05)  # steps of an attack are rounds of one loop
        self.assertGreater(longer["flops_executable"], 2 * result["flops_executable"])

    def test_bundles_of_a_block(self):
        result = self.figures("--block", "0", "--bundles")
        for program, kernel in (
            ("forward", "convnext_block"),
            ("input_gradient", "convnext_block_gradient"),
            ("gradients", "convnext_block_sums"),
        ):
            works = result[program]["schedules"]
            self.assertLessEqual(len(works), 10)
            self.assertContainsSubset({kernel}, {work["work"].split(".")[0] for work in works[:2]})
            cycles = [work["runs"] * work["bundles"] for work in works]
            self.assertEqual(cycles, sorted(cycles, reverse=True))
            shares = [share for work in works for share in work["units"].values()]
            self.assertBetween(min(shares), 0, 1)
            self.assertBetween(max(shares), 0.3, 1)

    def test_a_step_of_deformable_convolutions(self):
        """Loops over images in every block, and none of them waits for another chip."""
        result = self.figures("--attack-steps", "2", "--scan", text=WINDOWS)
        self.assertEqual(result["collectives_in_attack_loop"], 0)
        self.assertEqual(result["parameters_gathered_more_than_once"], [])
        sums = [c for c in result["collectives"] if c["kind"] != "all-gather"]
        parts = {"all-reduce": 1, "reduce-scatter": 4}  # of which a chip has one
        added = sum(parts[c["kind"]] * c["bytes"] for c in sums)
        self.assertGreaterEqual(added, 4 * 176_994, sums)  # the gradients of all weights
