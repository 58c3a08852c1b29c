"""Choosing weights, piece by piece: which candidates, on which images, in which order, and why."""

import contextlib
import io
import json
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
from absl.testing import absltest, parameterized

from jaxrobust.results.selection import candidates as measuring
from jaxrobust.results.selection import choice
from jaxrobust.results.selection.candidates import Size
from jaxrobust.results.selection.choice import SelectionSettings
from tests.support.runs import tiny

ONE_CLASS = {"proven": True, "words": "one class"}


def row(step=4, weights="raw", size=8, robust=0.5, clean=0.9, **more):
    known = {"step": step, "weights": weights, "image_size": size, "robust": robust}
    return known | {"clean": clean, "images": 1000, "collapse": None} | more


def quietly(function, *given, **how):
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        found = function(*given, **how)
    return found, said.getvalue()


class ChooseTest(parameterized.TestCase):
    def test_what_decides_comes_in_this_order(self):
        """Each row beats all before it, whichever stands first."""
        rows = [
            row(99, "ema", 4, 0.9, collapse=ONE_CLASS),
            row(4, "raw", 16, 0.50),
            row(4, "raw", 8, 0.50),
            row(4, "ema", 16, 0.50),
            row(8, "raw", 32, 0.50),
            row(4, "raw", 32, 0.51),
        ]
        for at, best in enumerate(rows):
            for given in (rows[: at + 1], rows[at::-1]):
                self.assertEqual(choice.choose(given, "robust")[0], best)

    def test_the_reason_counts_who_is_aside_equal_and_bounded(self):
        rows = [row(1), row(2), row(3), row(4, robust=0.4), row(5, robust=0.3, exact=False)]
        rows += [row(6, robust=0.5, collapse=ONE_CLASS), row(7, robust=0.7, collapse=ONE_CLASS)]
        rows += [row(8, robust=0.2, exact=True)]
        best, reason = choice.choose(rows, "robust")
        self.assertEqual(best["step"], 3)
        self.assertEqual(
            reason,
            "the highest robust accuracy of 8 candidates, 50.00% of 1,000 images; 2 that predict a "
            "single class left out, at most 70.00%; 1 cannot do better after APGD-CE alone; 2 "
            f"others reach as much: {choice.RULE}",
        )
        clean = [row(1, clean=0.8), row(2, clean=0.7)]
        best, reason = choice.choose(clean, "clean")
        self.assertEqual(best["step"], 1)
        self.assertEqual(
            reason, "the highest clean accuracy of 2 candidates, 80.00% of 1,000 images"
        )
        alone = [row(1, robust=0.1, collapse=ONE_CLASS), row(2, robust=0.1, collapse=ONE_CLASS)]
        best, reason = choice.choose(alone, "robust")
        self.assertEqual(best["step"], 2)
        self.assertIn("; another reaches as much: ", reason)
        self.assertNotIn("left out", reason)

    def test_warnings(self):
        old = {key: value for key, value in row().items() if key != "collapse"}
        fine = row()
        self.assertEmpty([*choice.warnings_of(fine, [fine, fine])])
        said = [*choice.warnings_of(row(collapse=ONE_CLASS), [old, old, fine])]
        self.assertEqual(said[0], "one class")
        self.assertStartsWith(said[1], "2 of 3 candidates were measured by an older version")


class QuestionTest(parameterized.TestCase):
    def config_of(self, config, phase="train", **changes):
        given = SelectionSettings(Path("run"), **changes)
        with mock.patch.object(choice.runs, "run_config", return_value=config) as read:
            found, said = quietly(choice._config, given, phase)
        read.assert_called_once_with(Path("run"), phase)
        return found, said

    def test_the_test_split_is_refused(self):
        for split, words in (
            ("test[:80]", "is the test split of run"),
            ("test[79:90]", r"may overlap with test\[:80\], the test split of run"),
        ):
            with (
                self.subTest(row=(split, words)),
                self.assertRaisesRegex(ValueError, f"{words}.*give another --split"),
            ):
                self.config_of(tiny(), split=split)

    def test_what_is_trained_on_is_said(self):
        for split, warned in (("test[80:]", False), ("train[256:]", False), ("train[255:]", True)):
            with self.subTest(row=(split, warned)):
                _, said = self.config_of(tiny(), split=split)
                words = "shares images with train[:256], which train is trained on"
                self.assertEqual(words in said, warned, said)

    def test_phase(self):
        for named, steps, expected in (
            (None, {"pretrain": [1], "train": [2]}, "train"),
            (None, {"pretrain": [1], "train": []}, "pretrain"),
            ("pretrain", {"pretrain": [1], "train": [2]}, "pretrain"),
            ("train", {"pretrain": [1], "train": []}, "the phase train of run has no saved"),
            (
                None,
                {"pretrain": [], "train": []},
                "^run has no saved weights to choose from; train",
            ),
        ):
            with self.subTest(row=(named, steps, expected)):
                config = SimpleNamespace(phases=("pretrain", "train"))
                with (
                    mock.patch.object(choice.runs, "run_config", return_value=config),
                    mock.patch.object(
                        choice.kept, "steps_of", lambda run, phase, s=steps: s[phase]
                    ),
                ):
                    given = SelectionSettings(Path("run"), phase=named)
                    if "saved" in expected:
                        with self.assertRaisesRegex(ValueError, expected):
                            choice._phase(given)
                    else:
                        self.assertEqual(choice._phase(given), expected)


class MeasuredTest(parameterized.TestCase):
    """Weights are words here, and what measures them a table."""

    def setUp(self):
        super().setUp()
        self.read, self.measured = [], []
        both = lambda step: SimpleNamespace(of=lambda which: f"{which} {step}")  # noqa: E731

        def read(run, phase, step):
            self.read.append(step)
            return step / 4, both(step)

        for place, name, own in (
            (choice.kept, "steps_of", lambda run, phase: [4, 10]),
            (choice.kept, "read", read),
            (choice.kept, "at_size", lambda run, phase, weights, size: (weights, size)),
            (choice.hashes, "weights_sha256", lambda *weights: f"hash of {weights}"),
        ):
            self.enter_context(mock.patch.object(place, name, own))

    def sizes(self, *sides, robust=0.5, **more):
        def measure(weights, full):
            self.measured.append((*weights, full))
            return {"clean": 0.75, "robust": robust, "images": 64} | more

        return {side: Size(f"crop {side}", measure, None, None) for side in sides}

    def test_in_full(self):
        """What the first attack left bounds what all leave; both cost."""
        for before, passes, together in ((0.4, 5, 12), (0.6, None, 7)):
            with self.subTest(row=(before, passes, together)):
                self.measured.clear()
                given = SelectionSettings(Path("run"))
                own = row(10, "ema", 16, before, passes=passes, exact=False, epoch=2.5)
                sizes = self.sizes(8, 16, passes=7)
                found, said = quietly(choice._in_full, given, "train", sizes, own)
                robust = min(before, 0.5)
                expected = own | {"robust": robust, "exact": True, "passes": together}
                self.assertEqual(found, expected)
                self.assertEqual(self.measured, [("ema 10", 16, True)])
                self.assertIn(f"train, epoch 2.5, ema, 16 px, in full: robust {robust:.2%}", said)
                with self.assertRaisesRegex(
                    ValueError, "16 px may be the best size.*--image_size 16 too"
                ):
                    choice._in_full(given, "train", self.sizes(8), own)


class BegunTest(parameterized.TestCase):
    """What is there is continued only if it is of the same question, network and images."""

    QUESTION = {"phase": "train", "seed": 1}  # noqa: RUF012
    OWN = {"program": "p", "gradient": "g", "images": "i"}  # noqa: RUF012
    BY = {"jaxrobust": "1", "jax": "0.9"}  # noqa: RUF012

    def begun(self, there=None, sizes=("8",), by=None, **changes):
        file = {**self.QUESTION, "candidates": ["row"], "by": by or self.BY}
        file |= {"computed": {"8": self.OWN | (there or {})}} | changes
        now = {"computed": {size: dict(self.OWN) for size in sizes}, "by": self.BY}
        path = Path(self.create_tempfile("selection.json").full_path)
        with mock.patch.object(measuring.kept, "read_selection", return_value=file):
            return measuring.candidates(path, self.QUESTION, now)

    def test_nothing_is_there(self):
        now = {"computed": {"8": self.OWN}, "by": self.BY}
        nowhere = Path(self.create_tempdir().full_path, "selection.json")
        self.assertEqual(measuring.candidates(nowhere, self.QUESTION, now), ([], now))

    def test_the_same(self):
        rows, computed = self.begun()
        self.assertEqual((rows, computed["by"]), (["row"], self.BY))
        _, computed = self.begun(sizes=("16",))  # what another size was of is kept
        self.assertEqual(computed["computed"], {"8": self.OWN, "16": self.OWN})

    def test_another(self):
        for changes, words in (
            ({"phase": "pretrain"}, 'phase is "pretrain" there, "train" here. Use the same flags'),
            ({"seed": 2}, "seed is 2 there, 1 here"),
            ({"there": {"images": "?"}}, "at 8 px in its images. Move the file away"),
            ({"there": {"program": "?"}}, "in its program. Move the file away"),
            ({"there": {"gradient": "?"}}, "in its gradient. Move the file away"),
            ({"there": {"program": "?", "gradient": "?"}}, "in its program and gradient."),
            ({"there": {"program": "?"}, "by": {"jax": "0.8"}}, "program (begun by jaxrobust ?, j"),
            ({"there": {"images": "?"}, "by": {"jax": "0.8"}}, "in its images. Move the file away"),
        ):
            with self.subTest(row=(changes, words)):
                with self.assertRaises(ValueError) as caught:
                    self.begun(**changes)
                self.assertIn(words, str(caught.exception))

    def test_other_versions_of_the_same_network(self):
        self.assertEqual(self.begun(by={"jax": "0.8"})[0], ["row"])


class OneSizeTest(parameterized.TestCase):
    def test_changed_is_a_copy(self):
        config = tiny()
        found = measuring.changed(config, {"data": {"preprocessing": "none", "name": None},
                                             "test": {"steps": 0}})  # fmt: skip
        self.assertEqual((found.data.preprocessing, found.data.name), ("none", "digits"))
        self.assertEqual((found.test.steps, config.test.steps), (0, 3))
        found.data["name"] = "else"
        self.assertEqual(config.data.name, "digits")

    def test_what_autoattack_is_asked(self):
        for full, attacks in ((False, ("apgd-ce",)), (True, None)):
            with self.subTest(row=(full, attacks)):
                config = tiny(seed=5, evaluation__batch_size=16, attack__norm="l2")
                costs = [
                    SimpleNamespace(forward=5, backward=2),
                    SimpleNamespace(forward=1, backward=0),
                ]
                result = SimpleNamespace(
                    clean=np.array([True, True, True, False]),
                    robust=np.array([True, False, False, False]),
                    answers=np.array([0, 1, 2, 3]),
                    verdicts=SimpleNamespace(labels=np.array([0, 1, 2, 0])),
                    costs=costs,
                )
                shown = mock.MagicMock(__len__=lambda own: 4)
                folder = Path("folder")
                with mock.patch.object(
                    measuring.evaluation, "autoattack", return_value=result
                ) as asked:
                    measure = measuring._autoattack(config, sum, shown, folder)
                    found = measure(("params", "stats"), full)
                self.assertEqual(found, {"clean": 0.75, "robust": 0.25, "images": 4, "passes": 10})
                network, *given = asked.call_args.args
                self.assertEqual((network.func, network.args), (sum, ("params", "stats")))
                self.assertEqual(given, [shown, shown.labels()])
                expected = {
                    "norm": "l2",
                    "epsilon": 0.1,
                    "attacks": attacks,
                    "seed": 5,
                    "batch_size": 16,
                }
                expected |= {"image_ids": shown.ids.tolist()}
                expected |= {"ledger": folder / "ledger-8-0.jsonl", "replay": []}
                self.assertEqual(asked.call_args.kwargs, expected)

    def test_a_collapsed_network_is_noted(self):
        n = 100
        labels = np.arange(n) % 10
        right = labels == 3
        result = SimpleNamespace(clean=right, robust=right, answers=np.full(n, 3), costs=[],
                                 verdicts=SimpleNamespace(labels=labels))  # fmt: skip
        shown = mock.MagicMock(__len__=lambda own: n)
        with mock.patch.object(measuring.evaluation, "autoattack", return_value=result):
            found = measuring._autoattack(tiny(), sum, shown, Path())((), True)
        self.assertTrue(found["collapse"]["proven"])


class PictureTest(absltest.TestCase):
    def test_what_is_written(self):
        path = Path(self.create_tempdir().full_path, "selection.json")
        how = {"chosen": {"step": 1}, "reason": "the best"}
        given = choice._write(path, {"phase": "train"}, [row()], {"commit": "c"}, **how)
        self.assertEqual(json.loads(path.read_text()), given)
        known = {"schema": 1, "phase": "train", "candidates": [row()], "commit": "c"} | how
        self.assertEqual({key: given[key] for key in known}, known)
        self.assertIn(choice.RULE, given["rule"])
        path.unlink()
        with mock.patch.object(choice.jax, "process_index", return_value=1):
            choice._write(path, {"phase": "train"}, [], {})
        self.assertFalse(path.exists())
