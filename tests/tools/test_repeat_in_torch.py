"""Training repeated in PyTorch: the same start, batches and draws give the same losses."""

import contextlib
import io
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from absl.testing import absltest

from jaxrobust.runtime.files import jsonl
from jaxrobust.weights import load
from jaxrobust.weights.trained import runs
from tests.support import parity
from tests.support.runs import quiet_run, tiny
from tools import repeat_in_torch


class RepeatTest(absltest.TestCase):
    def repeated(self, workdir, *words) -> str:
        said = io.StringIO()
        argv = ["repeat_in_torch.py", "--workdir", str(workdir), *words]
        with mock.patch("sys.argv", argv), contextlib.redirect_stdout(said):
            repeat_in_torch.main()
        return said.getvalue()

    @pytest.mark.slow
    def test_losses_and_weights_are_those_of_the_run(self):
        parity.torch_or_skip(self)
        workdir = Path(self.create_tempdir()) / "run"
        config = tiny(mixup__mixup=0.8, mixup__cutmix=1.0, label_smoothing=0.1, log__every_steps=1)
        quiet_run(config, workdir)
        said = self.repeated(workdir)
        ours = repeat_in_torch.losses(workdir, "train")
        self.assertLen(ours, 12)
        theirs = [row["loss"] for row in jsonl.read(workdir / "torch/train.jsonl")]
        # A float32 has 7 digits; draws of another key move the fourth.
        np.testing.assert_allclose(ours[:, 1], theirs, rtol=1e-6)
        self.assertIn("PyTorch, float32: relative difference of the losses", said)
        self.assertGreater((workdir / "torch/train.png").stat().st_size, 10_000)
        average = load.load(workdir / "torch/train.safetensors", image_size=8)
        best = runs.run_weights(workdir, "train")[1].params
        start = runs.run_weights(workdir, "pretrain")[1].params
        for key, value in best.items():
            moved = np.abs(np.asarray(value) - start[key]).mean()
            apart = np.abs(np.asarray(average.params[key]) - value).mean()
            self.assertLessEqual(apart, 0.02 * moved + 1e-9, key)

    @pytest.mark.slow
    def test_says_what_pytorch_does_not_know(self):
        workdir = Path(self.create_tempdir()) / "run"
        quiet_run(tiny(train__clip_norm=1.0), workdir)
        for words, sentence in (
            (["--phase=other"], "has no phase other; give --phase one of .*pretrain"),
            ([], "PyTorch's side only supports train.clip_norm=None, not 1.0"),
        ):
            said = io.StringIO()
            with self.assertRaises(SystemExit) as left, contextlib.redirect_stderr(said):
                self.repeated(workdir, *words)
            self.assertEqual(left.exception.code, 2)
            self.assertRegex(said.getvalue(), sentence)
