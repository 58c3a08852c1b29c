"""What `bench_gpu.py` measures of a network, without the processes."""

import contextlib
import io
import json
import os
import subprocess
from pathlib import Path
from unittest import mock

import numpy as np
from absl.testing import absltest, parameterized

from tools.gpu import figures, measuring
from tools.gpu.figures import SIDES, NoTime

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
OF = {"network": "vit_b_cvst", "options": [], "what": "step", "side": "jaxrobust"}
SEARCHED = [  # 32 images do not fit, 16 do
    {"of": OF | {"batch": batch, "turn": 0}, "kind": "jaxrobust first", "figure": figure}
    for batch, figure in ((32, None), (16, {"images_per_s": 99.0}))
]
STEPS = [*SEARCHED, {"of": OF | {"batch": 16, "turn": 1}, "kind": "jaxrobust turn", "figure": {}}]


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
    def test_halves_until_it_fits_then_takes_turns(self):
        calls = []
        compared(machine({"jaxrobust": 20, "PyTorch": 8}, calls), limit=64, rounds=2)
        self.assertEqual(
            calls[:7],
            [("jaxrobust", b, 0) for b in (64, 32, 16)]
            + [("PyTorch", b, 0) for b in (64, 32, 16, 8)],
        )
        turn = [("jaxrobust", 8), ("PyTorch", 8), ("jaxrobust", 16)]
        self.assertEqual(calls[7:], [(*what, number) for number in (1, 2) for what in turn])

    def test_equal_batches_run_once_a_turn(self):
        calls = []
        compared(machine({"jaxrobust": 9, "PyTorch": 9}, calls), limit=8, rounds=3)
        self.assertLen(calls, 2 + 2 * 3)

    def test_begins_with_the_estimate(self):
        calls = []
        memory = {"fixed": 20.0, "per_image": 0.9, "has": 200.0}  # 0.92 x 200 - 20 = 164 bytes
        run = machine({"jaxrobust": 999, "PyTorch": 999}, calls)
        compared(run, limit=2048, memories=(memory, None))
        self.assertEqual(calls[:2], [("jaxrobust", 176, 0), ("PyTorch", 2048, 0)])

    @parameterized.parameters((184.0, 88), (95.0, 192))
    def test_a_batch_that_leaves_memory_is_enlarged(self, peak, batch):
        calls = []
        memory = {"fixed": 20.0, "per_image": 1.85, "has": 200.0}
        run = machine({"jaxrobust": 999, "PyTorch": 999}, calls, peak=peak)
        compared(run, limit=2048, memories=(memory, memory))
        ours = [b for side, b, number in calls if (side, number) == ("jaxrobust", 0)]
        self.assertEqual(ours, [88] if batch == 88 else [88, batch])

    @parameterized.parameters((None, 4, 4), ({"per_image": -1.0}, 300, 288), (None, 2048, 2048))
    def test_without_an_estimate(self, memory, limit, batch):
        self.assertEqual(measuring.estimated(memory, limit), batch)

    def test_other_devices(self):
        run = machine({"jaxrobust": 8, "PyTorch": 8}, [], device=("1 x NVIDIA H200", "1 x cpu"))
        with self.assertRaisesRegex(
            ValueError, "^jaxrobust on 1 x NVIDIA H200, PyTorch on 1 x cpu: no comparison; install"
        ):
            compared(run, limit=8)

    def test_nothing_fits(self):
        with self.assertRaisesRegex(ValueError, "^PyTorch: not even one image fits; take a small"):
            compared(machine({"jaxrobust": 8, "PyTorch": 0}, []), limit=8)


class LogitsTest(parameterized.TestCase):
    @parameterized.parameters((0.011, 0.007, 0.0105), (0.05, 0.02, 0.04), (0.0, 0.0, 0.0))
    def test_rounding(self, *errors):
        keys = (*SIDES, "between")
        self.assertIsNone(measuring.unlike(dict(zip(keys, errors, strict=True))))

    @parameterized.parameters((0.01, 1.4, 1.4), (0.03, 0.005, 0.03), (np.nan, 0.01, np.nan))
    def test_no_rounding(self, *errors):
        reason = measuring.unlike(dict(zip((*SIDES, "between"), errors, strict=True)))
        self.assertRegex(reason, "that is no rounding, and no speed is measured; compare the two")


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

    @parameterized.parameters((4, ""), (-6, "CUDA_ERROR_OUT_OF_MEMORY: out of memory\nAborted"))
    def test_out_of_memory(self, code, stderr):
        self.assertIsNone(self.attempt(code, stderr=stderr))

    def test_refused(self):
        with self.assertRaisesRegex(ValueError, "^no such option; take another$"):
            self.attempt(2, stderr="a warning\nbench_step: no such option; take another\n")

    @parameterized.parameters(
        (1, "Traceback: out of memory", "Traceback: out of memory"),
        (-11, "Segmentation fault", "Segmentation fault"),
        (1, "a\nRuntimeError: x of [2] y\n----\nFor simplicity, JAX", "RuntimeError: x of [2] y"),
        (
            -6,
            "F1 a.cc:4] Unknown flag in XLA_FLAGS: --a\n--b=1 bool",
            "Unknown flag in XLA_FLAGS: --a",
        ),
    )
    def test_failed(self, code, stderr, reason):
        with self.assertRaisesRegex(
            measuring.Failed, rf"quickstart, jaxrobust, batch 16: exit code {code}"
        ) as caught:
            self.attempt(code, stderr=stderr)
        self.assertEqual(caught.exception.reason, reason)

    def test_too_late(self):
        late = mock.patch.object(
            subprocess, "run", side_effect=subprocess.TimeoutExpired("bench_step.py", 9)
        )
        kept = mock.Mock(limit=lambda: 9.0)
        with late, self.assertRaisesRegex(NoTime, r"batch 16 \(was ended after 9 s\)"):
            measuring.attempt(NETWORK._replace(kept=kept), "jaxrobust", 16)

    def test_environment(self):
        with mock.patch.dict(os.environ, {"CUDA_VISIBLE_DEVICES": "3"}):
            found = measuring.environment(Path("/caches"))
        self.assertEqual(found["CUDA_VISIBLE_DEVICES"], "3")
        self.assertEqual(found["XLA_PYTHON_CLIENT_MEM_FRACTION"], ".95")
        self.assertEqual(found["JAX_COMPILATION_CACHE_DIR"], "/caches/jax")


class NetworkTest(absltest.TestCase):
    def network(self, rows=STEPS):
        kept = figures.Figures(Path(self.create_tempdir().full_path) / "gpu.jsonl", {})
        kept.rows = list(rows)
        return measuring.Network("vit_b_cvst", (), {"XLA_FLAGS": "--a"}, kept)

    def test_a_variant_that_does_not_run(self):
        network, variant = self.network(), measuring.VARIANTS[1]
        failed = measuring.Failed("vit_b_cvst", -6, "F1 a.cc:2] Unknown flag in XLA_FLAGS: --b")
        with mock.patch.object(measuring, "attempt", side_effect=failed) as attempt:
            measuring.varied(network, variant)
            measuring.varied(network, variant)
        attempt.assert_called_once()
        changed, side, batch = attempt.call_args.args
        self.assertEqual((side, batch), ("jaxrobust", 16))
        self.assertEqual(changed.environment["XLA_FLAGS"], f"--a {variant.flags}")
        (row,) = network.rows("variant")
        self.assertEqual(row["figure"], {"refused": "Unknown flag in XLA_FLAGS: --b"})

    def test_variants_wait_for_the_step(self):
        for rows in ([], SEARCHED):
            with self.assertRaisesRegex(figures.NoTime, "^no Triton products, after its steps$"):
                measuring.varied(self.network(rows), measuring.VARIANTS[1])

    def test_other_attention_is_compared_first(self):
        network, variant = self.network(), measuring.VARIANTS[0]
        errors = {"jaxrobust": 0.9, "PyTorch": 0.01, "between": 0.9}
        with mock.patch.object(measuring, "program", return_value=errors) as program:
            measuring.varied(network, variant)
        self.assertEqual(program.call_args.args[1:], ("logits", "--attention=plain"))
        (row,) = network.rows("variant")
        self.assertRegex(row["figure"]["refused"], "that is no rounding")

    def test_a_standard_attack_waits_for_the_time_that_a_short_one_lets_expect(self):
        network = self.network()
        short, _, _, standard = measuring.ATTACKS
        short = short._replace(search=standard.search)
        figure = {"wall_s": 20.0, "compile_s": 30.0, "robust": 9, "forward": 9, "backward": 9}
        with mock.patch.object(measuring, "program", return_value=figure):
            measuring.attacked(network, 9, short)
        with mock.patch.object(network.kept, "of") as of:
            measuring.attacked(network, 9, standard)
        self.assertEqual(of.call_args.args[3], measuring.LONGER * 20 + 30)


if __name__ == "__main__":
    absltest.main()
