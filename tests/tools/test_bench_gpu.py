import contextlib
import io
import json
import os
import runpy
import subprocess
import sys
import types
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from absl.testing import absltest, parameterized

from jaxrobust.runtime.devices import hlo
from tests.support import paths
from tests.support.modules import hidden
from tools import bench_gpu, bench_step

try:
    import torch
except ImportError:
    torch = None

TOOLS = paths.ROOT / "tools"
XCIT = TOOLS.parent / "configs/xcit_s12.py"
TINY = """
from jaxrobust.config import base


def get_config():
    config = base().unlock()
    config.model.update(name="convnext_n", num_classes=10, image_size=8, dtype="float32")
    return config
"""
NETWORK = bench_gpu.Network("configs/quickstart.py", ("--steps=2",), {"A": "b"})
FIGURES = {
    "device": "1 x NVIDIA H200",
    "images_per_s": {"step": 3.0},
    "compile_s": {"step": 9.0},
    "mfu": {"step": 0.25},
    "peak_memory": {},
}
# What the compilers of GPUs and CPUs make of a depthwise convolution, a product and a loop.
MODULE = """HloModule jit_step, is_scheduled=true

%fused_dot (p: bf16[8,8], q: bf16[8,8]) -> bf16[8,8] {
  %p = bf16[8,8]{1,0} parameter(0)
  %q = bf16[8,8]{1,0} parameter(1)
  ROOT %dot.1 = bf16[8,8]{1,0} dot(%p, %q), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%body (b: bf16[8,8]) -> bf16[8,8] {
  %b = bf16[8,8]{1,0} parameter(0)
  ROOT %gemm_fusion = bf16[8,8]{1,0} fusion(%b, %b), kind=kCustom, calls=%fused_dot
}

%cond (c: bf16[8,8]) -> pred[] {
  %c = bf16[8,8]{1,0} parameter(0)
  ROOT %no = pred[] constant(false)
}

ENTRY %main (x: bf16[2,8,8,4], k: bf16[7,7,1,4], d: bf16[3,3,4,4], m: bf16[8,8]) -> bf16[8,8] {
  %x = bf16[2,8,8,4]{3,2,1,0} parameter(0)
  %k = bf16[7,7,1,4]{3,2,1,0} parameter(1)
  %d = bf16[3,3,4,4]{3,2,1,0} parameter(2)
  %m = bf16[8,8]{1,0} parameter(3)
  %conv.1 = (bf16[2,8,8,4]{3,2,1,0}, u8[0]{0}) custom-call(%x, %k), window={size=7x7 pad=3_3x3_3}, \
dim_labels=b01f_01io->b01f, feature_group_count=4, custom_call_target="__cudnn$convForward", \
metadata={op_name="jit(step)/attack/conv_general_dilated"}
  %conv.2 = bf16[2,8,8,4]{3,2,1,0} convolution(%x, %d), window={size=3x3 pad=1_1x1_1}, \
dim_labels=b01f_01io->b01f
  %product = (bf16[8,8]{1,0}, s8[64]{0}) custom-call(%m, %m), custom_call_target="__cublas$gemm"
  ROOT %while = bf16[8,8]{1,0} while(%m), condition=%cond, body=%body
}
"""


def said(tool, *arguments):
    """(exit code, what is on stderr) of a tool run in this process."""
    err = io.StringIO()
    kept = mock.patch.dict(os.environ, JAXROBUST_ALLOCATOR="system")
    argv = mock.patch.object(sys, "argv", [tool, *map(str, arguments)])
    with kept, argv, contextlib.redirect_stderr(err):
        try:
            runpy.run_path(str(TOOLS / tool), run_name="__main__")
        except SystemExit as end:
            return end.code, err.getvalue()
    return 0, err.getvalue()


def machine(fits, calls, *, device=("gpu", "gpu"), peak=None):
    """In place of `attempt`: a side fits up to its batch; its speed is 100 x batch, ours double."""
    devices = dict(zip(bench_gpu.SIDES, device, strict=True))

    def run(side, batch):
        calls.append((side, batch))
        if batch > fits[side]:
            return None
        first = calls.count((side, batch)) == 1
        return {
            "batch": batch,
            "device": devices[side],
            "images_per_s": 100.0 * batch * (2 if side == "jaxrobust" else 1) + len(calls),
            "compile_s": 50.0 if first else 1.0,
            "mfu": None,
            "peak_memory": peak,
        }

    return run


class CompareTest(parameterized.TestCase):
    def test_halves_until_it_fits_then_takes_turns(self):
        calls = []
        run = machine({"jaxrobust": 20, "PyTorch": 8}, calls)
        found = bench_gpu.compare(run, start=64, rounds=2)
        self.assertEqual(
            calls[:7],
            [("jaxrobust", b) for b in (64, 32, 16)] + [("PyTorch", b) for b in (64, 32, 16, 8)],
        )
        turn = [("jaxrobust", 8), ("PyTorch", 8), ("jaxrobust", 16)]
        self.assertEqual(calls[7:], 2 * turn)
        rows = {(r["side"], r["batch"]): r for r in found["rows"]}
        self.assertSameElements(rows, turn)
        # The first process of a batch compiles: the search, or the first turn.
        self.assertEqual({r["compile_s"] for r in found["rows"]}, {50.0})
        np.testing.assert_allclose(rows["PyTorch", 8]["rounds"], [809, 812])
        self.assertEqual(rows["PyTorch", 8]["images_per_s"], 810.5)
        self.assertAlmostEqual(found["ratio_same_batch"], 1609.5 / 810.5)
        self.assertAlmostEqual(found["ratio_largest"], 3211.5 / 810.5)

    def test_equal_batches_run_once_a_turn(self):
        calls = []
        found = bench_gpu.compare(machine({"jaxrobust": 9, "PyTorch": 9}, calls), start=8, rounds=3)
        self.assertLen(calls, 2 + 2 * 3)
        self.assertEqual(found["ratio_same_batch"], found["ratio_largest"])

    def test_other_devices(self):
        run = machine({"jaxrobust": 8, "PyTorch": 8}, [], device=("1 x NVIDIA H200", "1 x cpu"))
        with self.assertRaisesRegex(
            ValueError, "^jaxrobust on 1 x NVIDIA H200, PyTorch on 1 x cpu: no comparison; install"
        ):
            bench_gpu.compare(run, start=8, rounds=1)

    def test_nothing_fits(self):
        run = machine({"jaxrobust": 8, "PyTorch": 0}, [])
        with self.assertRaisesRegex(ValueError, "^PyTorch: not even one image fits; take a small"):
            bench_gpu.compare(run, start=8, rounds=1)

    def test_fits_no_more(self):
        fits = {"jaxrobust": 8, "PyTorch": 8}
        run = machine(fits, [])

        def shared(side, batch):
            found = run(side, batch)
            fits["jaxrobust"] = 4
            return found

        with self.assertRaisesRegex(RuntimeError, "batch 8 fitted before; is the GPU shared"):
            bench_gpu.compare(shared, start=8, rounds=1)


class AttemptTest(parameterized.TestCase):
    def attempt(self, code, stdout="", stderr=""):
        done = subprocess.CompletedProcess([], code, stdout, stderr)
        quiet = contextlib.redirect_stderr(io.StringIO())
        with mock.patch.object(subprocess, "run", return_value=done) as run, quiet:
            found = bench_gpu.attempt(NETWORK, "jaxrobust", 16)
        self.assertEqual(run.call_args.kwargs["env"], NETWORK.environment)
        self.assertContainsSubset(
            ["--program", "step", "--batch=16", "--steps=2", "--dtype=bfloat16"],
            run.call_args.args[0],
        )
        return found

    def test_reads_the_last_line(self):
        found = self.attempt(0, "words\n" + json.dumps(FIGURES) + "\n")
        self.assertEqual(
            found,
            {
                "batch": 16,
                "device": "1 x NVIDIA H200",
                "images_per_s": 3.0,
                "compile_s": 9.0,
                "mfu": 0.25,
                "peak_memory": None,
            },
        )

    @parameterized.parameters((4, ""), (-6, "CUDA_ERROR_OUT_OF_MEMORY: out of memory\nAborted"))
    def test_out_of_memory(self, code, stderr):
        self.assertIsNone(self.attempt(code, stderr=stderr))

    def test_refused(self):
        with self.assertRaisesRegex(ValueError, "^no such option; take another$"):
            self.attempt(2, stderr="a warning\nbench_step: no such option; take another\n")

    @parameterized.parameters((1, "Traceback: out of memory"), (-11, "Segmentation fault"))
    def test_failed(self, code, stderr):
        with self.assertRaisesRegex(
            RuntimeError, rf"quickstart, jaxrobust, batch 16: exit code {code}"
        ):
            self.attempt(code, stderr=stderr)

    def test_environment(self):
        with mock.patch.dict(os.environ, {"CUDA_VISIBLE_DEVICES": "3"}):
            found = bench_gpu.environment(Path("caches"))
        self.assertEqual(found["CUDA_VISIBLE_DEVICES"], "3")
        self.assertEqual(found["XLA_PYTHON_CLIENT_MEM_FRACTION"], ".95")
        self.assertEqual(found["JAX_COMPILATION_CACHE_DIR"], "caches/jax")


class SharesTest(absltest.TestCase):
    def test_of_a_gpu(self):
        module = hlo.parse(MODULE)
        gpu = "/device:GPU:0"
        kinds, operations = bench_gpu.shares(
            [
                (gpu, "conv.1", 3.0),
                (gpu, "conv.1", 1.0),
                (gpu, "conv.2", 2.0),
                (gpu, "product", 1.0),
                (gpu, "gemm_fusion", 2.0),
                (gpu, "MemcpyD2D", 1.0),
                (gpu, "while", 100.0),  # its body is counted
                ("/host:CPU", "conv.2", 100.0),
            ],
            module,
        )
        self.assertEqual(
            kinds,
            {
                "depthwise convolution": 0.4,
                "matrix product": 0.3,
                "convolution": 0.2,
                "other": 0.1,
            },
        )
        self.assertEqual(
            operations[0],
            ("conv.1 (depthwise convolution) jit(step)/attack/conv_general_dilated", 0.4),
        )

    def test_of_a_cpu(self):
        kinds, _ = bench_gpu.shares([("/host:CPU", "conv.2", 2.0)], hlo.parse(MODULE))
        self.assertEqual(kinds, {"convolution": 1.0})


class MessagesTest(parameterized.TestCase):
    def refused(self, code_and_message, pattern):
        code, message = code_and_message
        self.assertEqual(code, 2)
        self.assertRegex(message.splitlines()[-1], pattern)

    def test_bench_gpu(self):
        self.refused(said("bench_gpu.py", "none.py"), "^bench_gpu: none.py: no such file; ")
        self.refused(said("bench_gpu.py", "--rounds=0"), "^bench_gpu: --rounds=0 must be at least")

    @parameterized.parameters("torch", "timm")
    def test_missing(self, name):
        with hidden(name), mock.patch.dict(sys.modules):
            if name == "timm":  # is looked for after torch
                sys.modules["torch"] = types.ModuleType("torch")
                sys.modules["torch"].__spec__ = mock.Mock()
            self.refused(
                said("bench_gpu.py"),
                rf"^bench_gpu: needs {name}; pip install -e '\.\[test,parity\]'$",
            )

    @absltest.skipIf(torch is None, paths.PARITY)
    def test_no_gpu(self):
        with mock.patch.object(torch.cuda, "is_available", return_value=False):
            self.refused(said("bench_gpu.py"), "^bench_gpu: PyTorch sees no GPU; install its CUDA")

    def test_bench_step(self):
        self.refused(
            said("bench_step.py", XCIT, "--program", "torch"), "--program torch needs --against t"
        )
        self.refused(
            said("bench_step.py", XCIT, "--trace", "here"), "--trace needs a program of JAX; write"
        )
        for option in ("--program=step", "--trace=here", "--against=torch"):
            name = option.split("=")[0]
            self.refused(
                said("bench_step.py", XCIT, "--topology=v5e:4x4", option), f"leave {name} out"
            )
        self.refused(
            said("bench_step.py", XCIT, "--against=torch", "--attack_steps=10"),
            "attacks with up to 9 steps of APGD, not 10; give --attack_steps 9",
        )
        quickstart = TOOLS.parent / "configs/quickstart.py"
        self.refused(
            said("bench_step.py", quickstart, "--against=torch"),
            "--against torch has no counterpart of model.options .*dims.*; leave it out, or take",
        )

    @absltest.skipIf(torch is None, paths.PARITY)
    def test_types(self):
        self.refused(
            said("bench_step.py", XCIT, "--against=torch", "--program=torch", "--dtype=float16"),
            "--against torch knows --dtype float32 and bfloat16, not float16",
        )

    @parameterized.parameters(
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes."), True),
        (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (RuntimeError("INTERNAL: CUDA_ERROR_OUT_OF_MEMORY"), True),
        (MemoryError(), True),
        (RuntimeError("INVALID_ARGUMENT: shapes"), False),
    )
    def test_out_of_memory(self, error, expected):
        self.assertEqual(bench_step.out_of_memory(error), expected)

    def test_exit_code(self):
        with mock.patch(
            "jaxrobust.training.build.phase", side_effect=RuntimeError("RESOURCE_EXHAUSTED: x")
        ):
            code, message = said("bench_step.py", XCIT, "--program=step")
        self.assertEqual(code, bench_step.OUT_OF_MEMORY)
        self.assertEqual(message, "bench_step: out of memory; take a smaller --batch\n")


class LoadTest(absltest.TestCase):
    def test_the_same_step_on_both_sides(self):
        argv = ["bench_step.py", str(XCIT), "--against=torch"]
        with mock.patch.object(sys, "argv", argv):
            config = bench_step.load(bench_step.parse())
        attack = (config.attack.name, config.attack.start, config.attack.statistics)
        self.assertEqual(attack, ("apgd", "image", "running"))
        self.assertEmpty(dict(config.model.options))  # no drop path, one batch norm
        self.assertIsNone(config.label_smoothing)
        self.assertEqual(config.data.augmentation, "basic")


@pytest.mark.matrix
@absltest.skipIf(torch is None, paths.PARITY)
class WholeRunTest(absltest.TestCase):
    def test_on_cpu(self):
        folder = Path(self.create_tempdir().full_path)
        config = folder / "tiny.py"
        config.write_text(TINY)
        command = [sys.executable, TOOLS / "bench_gpu.py", config, "--largest=2", "--steps=1"]
        command += ["--json", f"--profile={folder}", "--attack-steps=3"]
        kept = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(command, env=kept, capture_output=True, text=True)
        self.assertEqual(done.returncode, 0, done.stderr)
        (found,) = json.loads(done.stdout.splitlines()[-1])
        self.assertEqual(
            [(r["side"], r["batch"], len(r["rounds"])) for r in found["rows"]],
            [("jaxrobust", 2, 2), ("PyTorch", 2, 2)],
        )
        self.assertEqual(found["options"], ["--attack-steps=3"])
        self.assertGreater(min(min(r["rounds"]) for r in found["rows"]), 0)
        self.assertAlmostEqual(sum(found["profile"]["kinds"].values()), 1)
        self.assertGreater(found["profile"]["kinds"]["matrix product"], 0)
        self.assertLen(found["profile"]["costliest"], 10)
        self.assertLen(list((folder / "tiny").rglob("*.xplane.pb")), 1)
        self.assertRegex(done.stdout, r"ratio at the largest batches \d+\.\d\d, at the same batch")


if __name__ == "__main__":
    absltest.main()
