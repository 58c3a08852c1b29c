"""A run whose learning rate leaves one class: whoever looks at it says so."""

import contextlib
import io
import json

import jax
import pytest
from absl.testing import absltest

from jaxrobust.commands import select
from jaxrobust.doctor import command
from jaxrobust.evaluation.questions.flags import GivenFlags
from tests.support import runs

ONE = "has collapsed to one class"


@pytest.mark.slow
class CollapsingRunTest(absltest.TestCase):
    """One run of three epochs for all of them: it takes longer than all that looks at it."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        changes = {
            "pretrain__epochs": 0,
            "train__lr": 1.0,  # a hundred times what trains this network
            "checkpoint__keep_every_epochs": 1,
            "data__selection_split": "train[256:512]",
            "data__test_split": "test[:200]",
        }
        cls.workdir, cls.said = runs.run_of_class(cls, runs.tiny(**changes))

    def test_training_warns_after_each_evaluation_and_at_its_end(self):
        steps, end = self.said.split("testing step")
        self.assertRegex(steps, f"train: WARNING at step 12: 256 of 256 .*{ONE}")
        self.assertRegex(end, f"WARNING: train, step .*{ONE}")

    def test_the_record_is_flagged(self):
        record = json.loads((self.workdir / "results.jsonl").read_text().splitlines()[-1])
        self.assertIn(ONE, record["flags"]["collapsed"])
        self.assertEqual(record["clean"], record["robust"])  # which looks like robustness

    def test_the_choice_says_so(self):
        out = io.StringIO()
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(out),
            jax.numpy_dtype_promotion("standard"),
        ):
            select.main([str(self.workdir)])
        self.assertIn(ONE, out.getvalue().replace("\n", " "))

    def test_the_doctor_says_so(self):
        with jax.numpy_dtype_promotion("standard"):
            given = command.given_of(str(self.workdir), norm=None, seed=0)
            self.assertIsInstance(given, GivenFlags)
            examined = command.of_network(given, images=200, tell=lambda told: None)
        found = {f.check.name: f.result for f in examined.findings}
        self.assertEqual(found["one-class"].level, "red", found["one-class"])
