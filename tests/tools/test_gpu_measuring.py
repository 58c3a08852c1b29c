"""What `bench_gpu.py` measures of a network, without the processes."""

import contextlib
import io
import json
import subprocess
from unittest import mock

import numpy as np
from absl.testing import parameterized

from tools.gpu import measuring
from tools.gpu.figures import SIDES

NETWORK = measuring.Network(
    "configs/quickstart.py", ("--image-size=8",), {"A": "b"}, mock.Mock(), steps=2
)
FIGURES = {
    "device": "1 x NVIDIA H200",
    "images_per_s": {"step": 3.0},
    "compile_s": {"step": 9.0},
    "mfu": {"step": 0.25},
    "peak_memory": {},
}


def machine(fits, calls, *, device=("gpu", "gpu"), peak=None):
    """In place of `turn`: a side fits up to its batch."""
    devices = dict(zip(SIDES, device, strict=True))

    def run(side, batch, number):
        calls.append((side, batch, number))
        if batch > fits[side]:
            return None
        return {"batch": batch, "device": devices[side], "peak_memory": peak}

    return run


def compared(run, *, limit, rounds=1, memories=(None, None)):
    memories = dict(zip(SIDES, memories, strict=True))
    measuring.compare(run, memories, limit=limit, rounds=rounds)


class CompareTest(parameterized.TestCase):
    def test_other_devices(self):
        run = machine({"jaxrobust": 8, "PyTorch": 8}, [], device=("1 x NVIDIA H200", "1 x cpu"))
        with self.assertRaisesRegex(
            ValueError, "^jaxrobust on 1 x NVIDIA H200, PyTorch on 1 x cpu: no comparison; install"
        ):
            compared(run, limit=8)

    def test_nothing_fits(self):
        with self.assertRaisesRegex(ValueError, "^PyTorch: not even one image fits; use a small"):
            compared(machine({"jaxrobust": 8, "PyTorch": 0}, []), limit=8)


class LogitsTest(parameterized.TestCase):
    @parameterized.parameters((0.01, 1.4, 1.4), (0.03, 0.005, 0.03), (np.nan, 0.01, np.nan))
    def test_no_rounding(self, *errors):
        reason = measuring.unlike(dict(zip((*SIDES, "between"), errors, strict=True)))
        self.assertRegex(reason, "more than rounding, so no speed is measured; compare the two")


class AttemptTest(parameterized.TestCase):
    def attempt(self, code, stdout="", stderr=""):
        done = subprocess.CompletedProcess([], code, stdout, stderr)
        quiet = contextlib.redirect_stderr(io.StringIO())
        with mock.patch.object(subprocess, "run", return_value=done) as run, quiet:
            figure = measuring.attempt(NETWORK, "jaxrobust", 16)
        self.assertEqual(run.call_args.kwargs["env"], NETWORK.environment)
        self.assertContainsSubset(
            ["--program", "step", "--batch=16", "--steps=2", "--image-size=8"],
            run.call_args.args[0],
        )
        return figure

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

    def test_failed(self):
        for code, stderr, reason in (
            (1, "Traceback: out of memory", "Traceback: out of memory"),
            (-11, "Segmentation fault", "Segmentation fault"),
            (
                1,
                "a\nRuntimeError: x of [2] y\n----\nFor simplicity, JAX",
                "RuntimeError: x of [2] y",
            ),
            (
                -6,
                "F1 a.cc:4] Unknown flag in XLA_FLAGS: --a\n--b=1 bool",
                "Unknown flag in XLA_FLAGS: --a",
            ),
        ):
            with self.subTest(row=(code, stderr, reason)):
                with self.assertRaisesRegex(
                    measuring.Failed, rf"quickstart, jaxrobust, batch 16: exit code {code}"
                ) as caught:
                    self.attempt(code, stderr=stderr)
                self.assertEqual(caught.exception.reason, reason)
