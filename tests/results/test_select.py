"""The choice among kept weights: what is evaluated, what is chosen, what the test then takes."""

import contextlib
import io
import json
import types
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from jaxrobust import data
from jaxrobust.commands import select
from jaxrobust.config import VERSION, network_of
from jaxrobust.evaluation.engine import accuracy
from jaxrobust.results.selection import candidates as measuring
from jaxrobust.results.selection import choice
from jaxrobust.runtime.files import jsonl
from jaxrobust.training import build
from jaxrobust.types import Threat
from jaxrobust.weights.store import hashes
from jaxrobust.weights.trained import kept
from tests.support import runs as training

STEPS = 4  # of an epoch


def call(*words, code=0) -> str:
    """What the tool prints, or says where it stops with this code."""
    out, said, ended = io.StringIO(), io.StringIO(), 0
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(said),
        jax.numpy_dtype_promotion("standard"),
    ):
        try:
            select.main([str(word) for word in words])
        except SystemExit as stopped:
            ended = stopped.code
    assert ended == code, (ended, said.getvalue())
    return said.getvalue() if code else out.getvalue()


def candidate(step, weights, image_size, robust, clean=0.9):
    return {
        "step": step, "weights": weights, "image_size": image_size, "robust": robust,
        "clean": clean, "images": 64,
    }  # fmt: skip


class ChooseTest(absltest.TestCase):
    def test_one_class_only_where_all_answer_one(self):
        one = {"collapse": {"proven": True, "words": "has collapsed"}}
        few = {"collapse": {"proven": False, "words": "too few"}}
        rows = [candidate(4, "raw", 8, 0.08) | few, candidate(8, "raw", 8, 0.121) | one]
        best, reason = choice.choose(rows, "robust")
        self.assertEqual(best, rows[0])
        self.assertIn("; one that predicts a single class left out, at most 12.10%", reason)
        self.assertEqual(list(choice.warnings_of(best, rows)), ["too few"])
        best, reason = choice.choose(rows[1:], "robust")
        self.assertEqual(best, rows[1])
        self.assertNotIn("left out", reason)
        self.assertEqual(list(choice.warnings_of(best, rows)), ["has collapsed"])


class ReplayedTest(absltest.TestCase):
    def test_the_last_four_candidates_are_replayed_and_keep_their_images(self):
        folder, replayed = Path(self.create_tempdir()), []
        robust = np.array([True, False, False, False])

        def autoattack(*given, ledger, replay, **how):
            replayed.append([path.name for path in replay])
            for path in replay:
                self.assertTrue(path.with_suffix(".images").exists(), path)
            ledger.touch()
            ledger.with_suffix(".images").touch()
            answers, verdicts = np.arange(4), types.SimpleNamespace(labels=np.arange(4))
            how = {"clean": np.ones(4, bool), "robust": robust, "costs": []}
            return types.SimpleNamespace(answers=answers, verdicts=verdicts, **how)

        shown = mock.MagicMock(__len__=lambda own: 4)
        with mock.patch.object(measuring.evaluation, "autoattack", autoattack):
            measure = measuring._autoattack(training.tiny(), lambda *a: None, shown, folder)
            for _ in range(7):
                self.assertEqual(measure((), False)["robust"], 0.25)
        names = [f"ledger-8-{number}.jsonl" for number in range(7)]
        self.assertEqual(replayed, [names[max(0, n - 4) : n] for n in range(7)])
        there = sorted(path.stem for path in folder.glob("*.images"))
        self.assertEqual(there, [Path(name).stem for name in names[-4:]])

    def test_an_image_withstands_all_norms(self):
        """Each has ledgers for itself, and the passes are those of all."""
        own = {"attack__norm": ("linf", "l1"), "attack__epsilon": (0.1, 12.0)}
        config, asked = training.tiny(**own, attack__mix="worst"), []
        stands = {"linf": [1, 1, 0, 0], "l1": [1, 0, 1, 0]}

        def autoattack(*given, norm, epsilon, ledger, replay, **how):
            asked.append((norm, epsilon, ledger.name, [path.name for path in replay]))
            cost = types.SimpleNamespace(forward=3, backward=2)
            how = {"clean": np.ones(4, bool), "robust": np.array(stands[norm], bool)}
            verdicts = types.SimpleNamespace(labels=np.arange(4))
            return types.SimpleNamespace(
                answers=np.arange(4), verdicts=verdicts, costs=[cost], **how
            )

        shown = mock.MagicMock(__len__=lambda own: 4)
        with mock.patch.object(measuring.evaluation, "autoattack", autoattack):
            folder = Path(self.create_tempdir())
            measure = measuring._autoattack(config, lambda *a: None, shown, folder)
            first, _ = measure((), False), measure((), True)
        self.assertEqual((first["clean"], first["robust"], first["passes"]), (1.0, 0.25, 14))
        self.assertEqual(asked[0], ("linf", 0.1, "ledger-8-0-linf.jsonl", []))
        self.assertEqual(asked[3], ("l1", 12.0, "ledger-8-1-l1.jsonl", ["ledger-8-0-l1.jsonl"]))

    def test_the_question_of_several_norms(self):
        balls = [Threat("linf", 0.1), Threat("l1", 12.0)]
        self.assertEqual(choice._settings(balls[:1]), {"norm": "linf", "epsilon": 0.1})
        expected = {"norm": ["linf", "l1"], "epsilon": [0.1, 12.0]}
        self.assertEqual(choice._settings(balls), expected)


class Case(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.folder = Path(self.create_tempdir())
        self.workdir = self.folder / "run"
        self.file = self.workdir / kept.SELECTION

    def made(self, **changes):
        """A run whose config is there, and no weights."""
        config = training.tiny(pretrain__epochs=0, **changes)
        self.workdir.mkdir()
        own = {"version": VERSION} | json.loads(config.to_json())
        (self.workdir / "config.json").write_text(json.dumps(own))
        return config


class FlowTest(Case):
    """What weights reach is told by one of their numbers."""

    def setUp(self):
        super().setUp()
        config = self.made()
        params, stats = jax.jit(network_of(config).init)(jax.random.key(0))
        self.arrays = {}
        for step, reach in ((4, (0.1, 0.3)), (8, (0.6, 0.5))):
            raw, ema = ({**params, "head.fc.bias": np.full(10, r, np.float32)} for r in reach)
            self.arrays[step] = kept.Kept(*jax.device_put((raw, stats, ema, stats)))
            kept.keep(self.workdir, "train", step, self.arrays[step], steps_per_epoch=STEPS)
        self.asked: list[tuple[float, int]] = []
        self.stop_after = 99
        self.enter_context(mock.patch.object(build, "evaluation", wraps=build.evaluation))
        self.enter_context(mock.patch.object(accuracy, "count", self.count))

    def count(self, evaluate, weights, images, mesh, *, bar):
        del evaluate, mesh, bar
        if len(self.asked) == self.stop_after:
            raise KeyboardInterrupt
        robust = round(float(weights.params["head.fc.bias"][0]), 6)
        self.asked.append((robust, images.image_size))
        return {"clean": 0.8, "robust": robust, "images": len(images)}

    def test_what_autoattack_leaves_counts(self):
        self.goes_on({0.6: 0.55}, [0.6], (0.55, "raw"), 3)
        self.goes_on({0.6: 0.4, 0.5: 0.45}, [0.6, 0.5], (0.45, "ema"), 2)

    @pytest.mark.slow
    def test_autoattack_goes_on_only_where_the_best_may_be(self):
        leaves = {0.6: 0.1, 0.5: 0.2, 0.3: 0.25, 0.1: 0.1}
        self.goes_on(leaves, [0.6, 0.5, 0.3], (0.25, "ema"), 1)

    def goes_on(self, leaves, in_full, best, bounded):
        """What a candidate reaches after the first attack, and what others leave of it."""
        asked = []

        def measure(weights, full):
            bound = round(float(weights.params["head.fc.bias"][0]), 6)
            if len(asked) == self.stop_after:
                raise KeyboardInterrupt
            asked.extend([bound] if full else [])
            robust = leaves[bound] if full else bound
            return {"clean": 0.8, "robust": robust, "images": 64}

        self.file.unlink(missing_ok=True)
        with mock.patch.object(measuring, "_autoattack", lambda *given: measure):
            self.stop_after = 1  # while the second one is attacked in full
            if len(in_full) > 1:
                call(self.workdir, "--attack=autoattack", code=130)
                self.assertIsNone(json.loads(self.file.read_text())["chosen"])
            self.stop_after = 99
            printed = call(self.workdir, "--attack=autoattack")
        self.assertEqual(asked, in_full)
        said = json.loads(self.file.read_text())
        self.assertEqual((said["chosen"]["robust"], said["chosen"]["weights"]), best)
        self.assertIn(f"{best[0]:.2%} of 64 images; {bounded} cannot do better after APGD", printed)
        self.assertEqual(sum(not row["exact"] for row in said["candidates"]), bounded)

    def selected(self, **how):
        with jax.numpy_dtype_promotion("standard"):
            return kept.selected_weights(self.workdir, kept.selected(self.workdir), **how)

    def test_all_candidates_the_choice_and_what_is_tested(self):
        lock = choice.locks.held(self.workdir / "selection.lock", resource="it", otherwise="wait")
        with lock:
            self.assertIn("copy the run", call(self.workdir, code=2))
        printed = call(self.workdir)
        self.assertIn("train, epoch 2, raw, 8 px: the highest", printed)
        once = f"test it once: jaxrobust evaluate --workdir {self.workdir} --selected"
        self.assertIn(once, printed)
        self.assertIn(f"{self.file}\n", printed)
        self.assertEqual(self.asked, [(0.1, 8), (0.3, 8), (0.6, 8), (0.5, 8)])
        self.assertEqual(build.evaluation.call_args.kwargs, {"steps": 10})
        said = json.loads(self.file.read_text())
        chosen = said["chosen"]
        self.assertEqual((chosen["epoch"], chosen["step"], chosen["weights"]), (2, 8, "raw"))
        self.assertEqual(said["split"], "train[256:320]")
        found = {key: said["attack"][key] for key in ("name", "steps", "norm", "epsilon")}
        expected = {"name": "apgd-ce", "steps": 10, "norm": "linf", "epsilon": 0.1}
        self.assertEqual(found, expected)
        self.assertLen(said["candidates"], 4)
        for row in said["candidates"]:
            self.assertEqual((row["images"], row["clean"], row["preprocessing"]), (64, 0.8, "none"))
        words, weights = self.selected()
        self.assertEqual(words, "train, epoch 2, raw")
        theirs = self.arrays[8].of("raw")
        jax.tree.map(np.testing.assert_array_equal, weights, theirs)
        self.assertEqual(hashes.weights_sha256(*theirs), chosen["weights_sha256"])
        jax.tree.map(np.testing.assert_array_equal, self.selected(image_size=16)[1], theirs)

    @pytest.mark.slow
    def test_again(self):
        self.enter_context(mock.patch.object(choice, "draw", return_value=""))
        call(self.workdir)
        with self.subTest("nothing is computed but another size"):
            call(self.workdir, "--image-size", 8, 16)
            self.assertEqual(self.asked[4:], [(0.1, 16), (0.3, 16), (0.6, 16), (0.5, 16)])
            self.assertEqual(kept.selected(self.workdir).image_size, 8)

    def test_other_images_another_network_other_weights(self):
        """Under the same names; the first candidates would be those of what was there before."""
        self.enter_context(mock.patch.object(choice, "draw", return_value=""))
        call(self.workdir)
        said = json.loads(self.file.read_text())
        at, other = "under the same name, at 8 px, its", "0" * 64
        own = said["computed"]["8"]
        mine = [row | {"weights_sha256": other} for row in said["candidates"]]
        for changes, words in (
            (
                {"computed": {"8": own | {"images": other}}},
                f"{at} images are others. Move the file",
            ),
            (
                {"computed": {"8": own | {"gradient": other}}, "by": said["by"] | {"jax": "0.9"}},
                rf"{at} gradient is another \(begun by jaxrobust .*, jax 0.9, .*\). Move the file",
            ),
            ({"candidates": mine}, "the weights of train, step 4, .* differ from those in"),
        ):
            self.file.write_text(json.dumps(said | changes))
            self.assertRegex(call(self.workdir, code=2), words)
        self.file.write_text(json.dumps({k: v for k, v in said.items() if k != "computed"}))
        self.assertIn("by an older version that fingerprinted neither", call(self.workdir, code=2))

    @pytest.mark.slow
    def test_again_while_the_training_goes_on(self):
        self.enter_context(mock.patch.object(choice, "draw", return_value=""))
        call(self.workdir)
        with self.subTest("a copy that came later is added, with the same flags"):
            more = self.arrays[8]._replace(ema_params=self.arrays[8].params)
            kept.keep(self.workdir, "train", 12, more, steps_per_epoch=STEPS)
            call(self.workdir)
            self.assertEqual(self.asked[4:], [(0.6, 8), (0.6, 8)])
            self.assertEqual(kept.selected(self.workdir).words, "train, epoch 3, ema")

        with self.subTest("another question overwrites nothing"):
            before = self.file.read_text()
            said = call(self.workdir, "--steps", 1, code=2)
            self.assertRegex(said, r"holds a different choice: attack is .*Use the same flags, or")
            self.assertEqual(self.file.read_text(), before)

    @pytest.mark.slow
    def test_interrupted_and_continued(self):
        self.stop_after = 3
        self.assertIn("interrupted; run the same command to continue", call(self.workdir, code=130))
        self.assertLen(json.loads(self.file.read_text())["candidates"], 3)
        with self.assertRaisesRegex(ValueError, "^--selected: .* is not finished; to continue"):
            kept.selected(self.workdir)
        self.stop_after = 99
        call(self.workdir)
        self.assertEqual(self.asked[3:], [(0.5, 8)])

    @pytest.mark.slow
    def test_weights_that_are_not_those_that_were_chosen(self):
        call(self.workdir)
        said = json.loads(self.file.read_text())
        said["chosen"]["weights_sha256"] = "0" * 64
        self.file.write_text(json.dumps(said))
        with self.assertRaisesRegex(ValueError, "epoch 2, raw are not the selected ones"):
            self.selected()
        for text, message in (
            ("{", "is damaged .*; remove it and select again: jaxrobust select"),
            ('{"schema": 1}', "is damaged"),
            (json.dumps(said | {"chosen": {"phase": "train"}}), "is damaged"),
            (json.dumps(said | {"schema": 2}), "has schema 2, but this code reads 1; use the"),
        ):
            self.file.write_text(text)
            with self.assertRaisesRegex(ValueError, message):
                self.selected()


class MistakesTest(Case):
    def test_flags(self):
        self.made()
        for words, message in (
            (("--steps", 0), "--steps=0 must be at least 1"),
            (("--image_size", 8, 0), "--image_size=0 must be at least 1"),
            (("--n", -1), "--n=-1 is not a number of images; give 1 or more, or all"),
            (("--batch", 0), "--batch=0 must be at least 1"),
            (("--attack", "autoattack", "--steps", 10), "--steps only applies to APGD-CE; leave"),
            (("--attack", "pgd"), "invalid choice: 'pgd'"),
            (("--phase", "trian"), "--phase=trian is unknown; choose one of pretrain, train"),
            ((), "has no saved weights to choose from; train with --config.checkpoint.keep_every"),
        ):
            with self.subTest(row=(words, message)):
                said = call(self.workdir, *words, code=2)
                self.assertIn(message, said)
                self.assertEqual(said.count("\n"), 1, said)
                self.assertEqual([path.name for path in self.workdir.iterdir()], ["config.json"])

    def test_no_run(self):
        said = call(self.folder / "none", code=2)
        self.assertIn("is not a run", said)
        self.assertNotIn("--", said)  # neither --workdir nor --model is a flag of select

    def test_nothing_was_chosen(self):
        self.made()
        with self.assertRaisesRegex(
            ValueError,
            f"^--selected: no weights are selected in {self.workdir} yet; run "
            f"jaxrobust select {self.workdir}$",
        ):
            kept.selected(self.workdir)


class RunTest(Case):
    @pytest.mark.slow
    def test_the_figures_are_those_that_training_saw(self):
        """And AutoAttack's are not higher than those of APGD-CE."""
        config = training.one_phase(checkpoint__keep_every_epochs=1)
        training.quiet_run(config, self.workdir)
        call(self.workdir, "--steps", config.evaluation.steps, "--image-size", 8, 10)
        said = json.loads(self.file.read_text())
        self.assertLen(said["candidates"], 3 * 2 * 2)
        seen = {row["step"]: row for row in jsonl.read(self.workdir / "train" / "selection.jsonl")}
        for row in said["candidates"]:
            if row["weights"] == "ema" and row["image_size"] == 8:
                figures = {key: row[key] for key in ("clean", "robust", "images")}
                self.assertEqual(figures | {"step": row["step"]}, seen[row["step"]])
        self.assertTrue((self.workdir / "selection.png").is_file() or not _plot())

        source = data.open_source("digits", "train[256:320]")
        (batch,) = data.evaluation_batches(source, batch_size=64, image_size=8)
        with jax.numpy_dtype_promotion("standard"):
            chosen = kept.selected(self.workdir)
            _, weights = kept.selected_weights(self.workdir, chosen, image_size=8)
            logits, _ = jax.jit(network_of(config).apply)(*weights, batch.images / np.float32(255))
        clean = float((np.argmax(logits, -1) == batch.labels).mean())
        key = (chosen.step, chosen.weights, 8)
        (own,) = (r for r in said["candidates"] if choice.key_of(r) == key)
        self.assertEqual(own["clean"], clean)

        self.file.unlink()
        call(self.workdir, "--attack", "autoattack", "--n", 16)
        strong = json.loads(self.file.read_text())["candidates"]
        self.file.unlink()
        call(self.workdir, "--n", 16)
        for row, other in zip(strong, json.loads(self.file.read_text())["candidates"], strict=True):
            self.assertEqual((row["clean"], row["images"]), (other["clean"], 16))
            self.assertLessEqual(row["robust"], other["robust"])


def _plot() -> bool:
    import importlib.util

    return importlib.util.find_spec("matplotlib") is not None
