"""Steps that update nothing: how many may follow each other, and what going back writes down."""

import types
from pathlib import Path
from unittest import mock

import numpy as np
from absl.testing import absltest

from jaxrobust.runtime.files import jsonl
from jaxrobust.training.run import loop, stopping

ROW = {"loss": float("nan"), "gradient_norm": float("nan"), "step": 9}


class TroubleTest(absltest.TestCase):
    def setUp(self):
        super().setUp()
        self.folder = Path(self.create_tempdir())
        self.enter_context(mock.patch.object(stopping, "say"))

    def run_of(self, rollbacks=1, *, lr=0.5, skips=2, last=4):
        settings = types.SimpleNamespace(rollbacks=rollbacks, lr=lr, skips=skips)
        return mock.Mock(
            file=lambda name: self.folder / name,
            config=types.SimpleNamespace(trouble=settings),
            latest=mock.Mock(**{"latest_step.return_value": last}, directory=self.folder),
        )

    def ahead(self, skipped):
        return types.SimpleNamespace(skipped=skipped, last=ROW)

    def roll_back(self, found):
        found.roll_back(9, found.skipped(self.ahead(3)))

    def test_how_many_may_be_skipped(self):
        found = stopping.Trouble(self.run_of())
        self.assertEqual(found.skipped(self.ahead(2)), "")
        self.assertIn("3 steps in a row updated no weights", found.skipped(self.ahead(3)))

    def test_each_rollback_lowers_the_rate(self):
        for number, scale in enumerate((1.0, 0.5, 0.25)):
            found = stopping.Trouble(self.run_of(2))
            self.assertEqual((found.rollbacks, found.lr_scale), (number, scale))
            if number < 2:
                self.roll_back(found)
        rows = jsonl.read(self.folder / "rollbacks.jsonl")
        self.assertEqual([row["lr_scale"] for row in rows], [0.5, 0.25])
        self.assertEqual([(row["step"], row["back_to"]) for row in rows], [(9, 4)] * 2)

    def test_the_last_one_is_noted_and_refused(self):
        run = self.run_of(0)
        message = r"(?s)loss is nan at step 9.*3 steps in a row.* step 4 .*trouble.rollbacks=1"
        with self.assertRaisesRegex(stopping.Diverged, message):
            self.roll_back(stopping.Trouble(run))
        run.stopped.clear.assert_called_once()
        self.assertLen(jsonl.read(self.folder / "rollbacks.jsonl"), 1)
        with self.assertRaisesRegex(stopping.Diverged, "loss is nan at step 9"):
            stopping.Trouble(run)  # the same command again says it at once
        self.assertEqual(stopping.Trouble(self.run_of(1)).rollbacks, 1)

    def test_before_any_checkpoint(self):
        message = (
            r"No checkpoint was written yet\. Set trouble\.rollbacks=1 to start over at step 0 "
            "with 0.5 times the learning rate, or start again"
        )
        with self.assertRaisesRegex(stopping.Diverged, message):
            self.roll_back(stopping.Trouble(self.run_of(0, last=None)))

    def test_goes_back_from_norms_that_no_evaluation_can_use(self):
        """At a step where something would be kept or evaluated; of dead channels it warns, once."""
        stats = {"bn1.var": np.float32([1, 0]), "bn1.mean": np.float32([0, 0])}
        self.enter_context(mock.patch.object(loop, "say"))
        its = types.SimpleNamespace(
            trouble=stopping.Trouble(self.run_of()), ahead=self.ahead(0), step=7, dead="",
            run=types.SimpleNamespace(name="train"), state=types.SimpleNamespace(stats=stats),
        )  # fmt: skip
        due = {"saves": False, "keeps": False, "evaluates": False}
        for what in due:
            self.assertIsNone(
                loop._Loop.troubled(its, types.SimpleNamespace(**(due | {what: True})))
            )
        loop.say.assert_called_once()
        self.assertRegex(loop.say.call_args[0][0], "train: WARNING at step 7: 1 of 2 in bn1 chan")
        stats["bn1.var"] = np.float32([1, -2e-5])
        self.assertIsNone(loop._Loop.troubled(its, types.SimpleNamespace(**due)))
        for what in due:
            now = types.SimpleNamespace(**(due | {what: True}))
            step, why = loop._Loop.troubled(its, now)
            self.assertEqual(step, 7)
            self.assertRegex(why, r"^at step 7 the running variance of bn1 is negative in 1 of 2 ")
        its.ahead = self.ahead(3)  # which comes first, with its own step
        step, why = loop._Loop.troubled(its, now)
        self.assertEqual(step, 9)
        self.assertRegex(why, "^the loss is nan at step 9.*3 steps in a row updated no weights$")

    def test_refuses_to_begin_with_such(self):
        run = types.SimpleNamespace(name="train")
        stats = {"bn1.var": np.float32([1, np.nan]), "bn1.mean": np.float32([0, 0])}
        for step, words in ((0, "weights it starts from.*from other w"), (5, "at step 5.*--workd")):
            state = types.SimpleNamespace(stats=stats, step=step)
            with self.assertRaisesRegex(ValueError, f"^train: in .*{words}"):
                loop.evaluates(run, state)
        stats["bn1.var"][1] = 0
        loop.evaluates(run, state)
