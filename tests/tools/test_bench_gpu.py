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

import pytest
from absl.testing import absltest, parameterized

from jaxrobust.doctor.programs import hlo
from tests.support import paths
from tests.support.modules import hidden
from tools import OUT_OF_MEMORY, bench_step, out_of_memory
from tools.gpu import trace

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


class SharesTest(absltest.TestCase):
    def test_of_a_gpu(self):
        module = hlo.parse(MODULE)
        gpu = "/device:GPU:0"
        kinds, operations = trace.shares(
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


class MessagesTest(parameterized.TestCase):
    def refused(self, code_and_message, pattern):
        code, message = code_and_message
        self.assertEqual(code, 2)
        self.assertRegex(message.splitlines()[-1], pattern)

    def test_flags(self):
        for words, pattern in (
            (("--minutes=0",), "--minutes=0 must be more than 0, such as 9"),
            (("--minutes=-1", "--resume=x"), "--minutes=-1 must be more than 0"),
            (("--minutes=nan", "--resume=x"), "--minutes=nan must be more than 0"),
            (
                ("--minutes=9",),
                "--minutes needs --resume FILE, from which the next command continues",
            ),
            (("--stages=steps,step",), "--stages=steps,step: no 'step'; choose from steps, varian"),
            (
                ("--report=none.jsonl",),
                "--report=none.jsonl is not a file; pass one that --resume wr",
            ),
        ):
            with self.subTest(row=(words, pattern)):
                self.refused(said("bench_gpu.py", *words), f"^bench_gpu: {pattern}")

    def test_missing(self):
        for name in ("torch", "timm"):
            with self.subTest(name=name), hidden(name), mock.patch.dict(sys.modules):
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

    @absltest.skipIf(torch is None, paths.PARITY)
    def test_resume_of_a_folder(self):
        folder = self.create_tempdir().full_path
        self.refused(
            said("bench_gpu.py", "--largest=1", f"--resume={folder}"),
            f"^bench_gpu: --resume={folder} is a folder; name a file, such as {folder}/gpu.jsonl",
        )

    def test_bench_step(self):
        self.refused(
            said("bench_step.py", XCIT, "--program", "torch"), "--program torch needs --against t"
        )
        self.refused(
            said("bench_step.py", XCIT, "--trace", "here"), "--trace needs a JAX program; write"
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
            "--against torch has no counterpart for model.options .*dims.*; leave it out, or use",
        )

    def test_out_of_memory(self):
        for error, expected in (
            (
                RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes."),
                True,
            ),
            (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
            (RuntimeError("INTERNAL: CUDA_ERROR_OUT_OF_MEMORY"), True),
            (MemoryError(), True),
            (RuntimeError("INVALID_ARGUMENT: shapes"), False),
        ):
            with self.subTest(row=(error, expected)):
                self.assertEqual(out_of_memory(error), expected)

    def test_exit_code(self):
        with mock.patch(
            "jaxrobust.training.build.phase", side_effect=RuntimeError("RESOURCE_EXHAUSTED: x")
        ):
            code, message = said("bench_step.py", XCIT, "--program=step")
        self.assertEqual(code, OUT_OF_MEMORY)
        self.assertEqual(message, "bench_step: out of memory; use a smaller batch\n")


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
        file = folder / "gpu.jsonl"
        command = [sys.executable, TOOLS / "bench_gpu.py", config, "--largest=2", "--steps=1"]
        command += ["--json", f"--profile={folder}", "--attack-steps=3", "--images=2"]
        command += ["--stages=steps,variants", f"--resume={file}"]
        kept = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(command, env=kept, capture_output=True, text=True)
        self.assertEqual(done.returncode, 0, done.stderr)
        (sums,) = json.loads(done.stdout.splitlines()[-1])
        self.assertEqual(
            [(r["side"], r["batch"], len(r["rounds"])) for r in sums["rows"]],
            [("jaxrobust", 2, 2), ("PyTorch", 2, 2)],
        )
        self.assertEqual(sums["options"], ["--attack-steps=3"])
        self.assertGreater(min(min(r["rounds"]) for r in sums["rows"]), 0)
        self.assertAlmostEqual(sum(sums["profile"]["kinds"].values()), 1)
        self.assertGreater(sums["profile"]["kinds"]["matrix product"], 0)
        self.assertLen(sums["profile"]["costliest"], 10)
        self.assertLen(list((folder / "tiny").rglob("*.xplane.pb")), 1)
        self.assertRegex(done.stdout, r"\| tiny --attack-steps=3 \| \d+\.\d\d \| \d+\.\d\d \|")
        before = file.read_bytes()
        again = subprocess.run(command, env=kept, capture_output=True, text=True)
        self.assertEqual((again.returncode, again.stdout), (0, done.stdout), again.stderr)
        self.assertEqual(file.read_bytes(), before)  # nothing is measured twice
