"""--version=fast and --finish: what they write, who refuses the record, what they refuse."""

import contextlib
import html
import json
import re
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
from absl.testing import parameterized

from jaxrobust.attacks import ensembles
from jaxrobust.evaluation.bundles import bundle
from jaxrobust.evaluation.engine import turns
from jaxrobust.evaluation.questions import command, mistakes
from jaxrobust.evaluation.questions.flags import GivenFlags
from jaxrobust.evaluation.records import stopping, verdicts
from jaxrobust.evaluation.records.record import AccuracyRecord
from jaxrobust.papers.figures import figure_records, latex
from jaxrobust.publish import robustbench_entry
from jaxrobust.report.gathered import gather
from jaxrobust.report.page import page
from jaxrobust.report.parts import sentences
from jaxrobust.results.comparison import evaluations
from tests.support import sweeps
from tests.support.evaluations import call
from tests.support.outcomes import ended, refused

N = 100
NETS = """
import jax
import jax.numpy as jnp
import numpy as np

WEIGHTS = np.random.default_rng(0).normal(size=(16, 10)).astype("f")


def net(x):
    logits = x.reshape(len(x), -1) @ WEIGHTS
    return jnp.where(x[:, :1, 0, 0] < 0.8, jax.lax.stop_gradient(logits), logits)
"""
STEPS = {"apgd-ce": 4, "apgd-t": 4, "fab-t": 3, "square": 60}
_BASE = ensembles.base


def short(name: str, norm: str):
    """Few steps, and with them the same versions."""
    return _BASE(name, norm)._replace(steps=STEPS[name])


def given(**more) -> dict:
    whose = {"function": "nets.py:net", "dataset": "npz:data.npz", "split": "all"}
    return whose | {"norm": "linf", "epsilon": "0.08", "out": "own", "batch": 16, "seed": 4} | more


def written(folder: str = "own") -> list[dict]:
    return [json.loads(line) for line in Path(folder, "results.jsonl").read_text().splitlines()]


class CommandTest(parameterized.TestCase):
    """One network: by the standard version, by the fast one, and by that finished."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.folder = Path(cls.enterClassContext(tempfile.TemporaryDirectory()))
        cls.enterClassContext(contextlib.chdir(cls.folder))
        cls.enterClassContext(mock.patch.object(ensembles, "base", short))
        cls.enterClassContext(mock.patch.object(turns, "SHARE", 0.6))
        Path("nets.py").write_text(NETS)
        images = np.random.default_rng(2).random((N, 4, 4, 1)).astype("f")
        logits = images.reshape(N, -1) @ np.random.default_rng(0).normal(size=(16, 10))
        np.savez("data.npz", image=(255 * images).astype(np.uint8), label=logits.argmax(1))
        code, _, said = call(**given(out="whole"))
        assert not code, said
        code, cls.told, said = call(**given(version="fast"))
        assert not code, said
        (cls.whole,), (cls.fast,) = written("whole"), written()
        cls.ledger = next(Path("own").glob("ledger-*.jsonl")).read_text()
        cls.finishing = call(**given(finish=True))

    def test_the_record(self):
        fast = self.fast["fast"]
        self.assertEqual(self.fast["method"], "fast version")
        self.assertNotIn("autoattack", json.dumps(self.fast["method"]).lower())
        self.assertEqual(self.fast["flags"]["fast"], stopping.fast_line(fast))
        self.assertIn("attack: fast version, linf 0.08\n", self.told)
        self.assertIn("flag fast: these verdicts come from the fast version", self.told)
        own = verdicts.read(Path("own", self.fast["verdicts"]))
        self.assertEqual(self.fast["robust"], own.robust.mean())
        self.assertGreaterEqual(self.fast["robust"], self.whole["robust"])
        self.assertLess(fast["robust_at_least"], self.whole["robust"])
        self.assertGreater(fast["fooled"], 0)

    def test_finish_makes_the_standard_evaluation_in_the_same_ledger(self):
        code, _, said = self.finishing
        self.assertEqual(code, 0, said)
        record = written()[1]
        same = ("evaluation", "method", "clean", "robust", "accuracy_after", "interval", "attacks")
        self.assertEqual({k: record[k] for k in same}, {k: self.whole[k] for k in same})
        self.assertEqual(record["flags"], self.whole["flags"])
        self.assertNotIn("fast", record)
        (ledger,) = Path("own").glob("ledger-*.jsonl")
        self.assertEqual(ledger.name, f"ledger-{record['evaluation']}.jsonl")
        self.assertStartsWith(ledger.read_text(), self.ledger)
        one, other = (
            verdicts.read(Path(place, self.whole["verdicts"])) for place in ("own", "whole")
        )
        np.testing.assert_array_equal(one.fooled_by, other.fooled_by)
        rows = [json.loads(line) for line in ledger.read_text().splitlines()[1:]]
        self.assertLen({(row["image"], row["attack"]) for row in rows}, len(rows))

    def test_the_same_commands_again_have_the_answers(self):
        for more in ({"version": "fast"}, {"finish": True}, {"finish": True, "version": "fast"}):
            _, said = ended(call(**given(**more)))
            self.assertIn("already done", said)
        self.assertLen(written(), 2)

    @sweeps.rows({"out": "none"}, {"epsilon": "0.07"}, {"seed": 1}, {"n": "50"})
    def test_finish_without_a_fast_evaluation(self, **more):
        said = refused(call(**given(finish=True, **more)))
        self.assertRegex(
            said.replace("\n", " "),
            "--finish completes an evaluation by --version=fast, but .* has none for "
            "this network with these images, norm, radius and seed; run --version=fast first",
        )

    def test_no_record_to_stop_against(self):
        number = self.fast["evaluation"]
        said = refused(call(**given(out="against", against=f"own#{number}")))
        self.assertRegex(said.replace("\n", " "), 'version is "fast" there, "standard" here')

    def test_no_bundle_of_the_record(self):
        record = AccuracyRecord.from_json(self.fast)
        with self.assertRaisesRegex(ValueError, "from the fast version, whose verdicts are not"):
            bundle.of_record(Path("bundle"), record, Path("own"), np.zeros((1, 4, 4, 1)), None)

    def test_compared(self):
        number = self.fast["evaluation"]
        with self.assertRaisesRegex(ValueError, 'version is "fast" there, "standard" here'):
            evaluations.load([f"own#{number}", "whole"])
        ended(call(**given(out="other", version="fast", seed=0)))
        (other,) = written("other")
        found = evaluations.load([f"own#{number}", "other"])
        for one, record in zip(found, (self.fast, other), strict=True):
            stood = np.isin(one.verdicts.image_ids, record["fast"]["fallen"])
            self.assertTrue(one.verdicts.robust[stood].all())
            after = one.verdicts.robust.mean()
            self.assertAlmostEqual(after, record["robust"] + record["fast"]["fooled"] / N)
        fooled = self.fast["fast"]["fooled"]
        self.assertIn(
            f"A is of the fast version: {fooled} images fooled only by the attacks on its sample "
            "count as robust here, because other images did not face these attacks.",
            evaluations.remarks(found),
        )

    def test_report(self):
        text = html.unescape(re.sub(r"<[^>]*>", "", page(gather([Path("own")]))))
        text = re.sub(r"\s+", " ", text)
        fast = self.fast["fast"]
        least = stopping.fast_bound(fast)
        self.assertIn(
            "under attack by the fast version within L∞ 0.08: AutoAttack's standard "
            f"version would leave at least {least}, with 95% confidence.",
            text,
        )
        self.assertIn(f"(fast; standard at least {least})", text)
        words = f"run on {fast['sampled']} of {fast['survivors']} surviving images, chosen"
        self.assertIn(words, text)
        self.assertIn(
            "The attack was the fast version, not the standard version of AutoAttack", text
        )
        self.assertIn("--attack autoattack --version fast", text)

    def test_the_standard_record_is_the_headline(self):
        (one,) = sentences.chosen(gather([Path("own")]))
        self.assertEqual(one.record.method, "autoattack standard")

    def test_no_page_of_a_record_whose_sample_is_broken(self):
        Path("broken").mkdir(exist_ok=True)
        row = self.fast | {"fast": self.fast["fast"] | {"sampled": "all"}}
        Path("broken", "results.jsonl").write_text(json.dumps(row) + "\n")
        with self.assertRaisesRegex(ValueError, "fields of the wrong type; restore the original"):
            gather([Path("broken")])

    def test_captions_say_it(self):
        record = AccuracyRecord.from_json(self.fast)
        self.assertEqual(latex.attack_words(record), "the fast version")
        said = [*figure_records.doubts("A", record)]
        self.assertIn(f"Doubt about A, fast: {stopping.fast_line(record.fast)}.", said)

    def test_no_entry_of_robustbench(self):
        record = AccuracyRecord.from_json(self.fast)
        self.assertIn(
            "its attack is fast version, not autoattack standard", robustbench_entry.lacks(record)
        )


class FlagsTest(parameterized.TestCase):
    @sweeps.rows(
        ({"attack": "apgd-ce"}, "leave --attack=apgd-ce out, or leave --version=fast out"),
        ({"attack": "pgd-20"}, "leave --attack=pgd-20 out"),
        ({"attack": "clean"}, "leave --attack=clean out"),
        ({"until_width": 2.0}, "leave --until_width out"),
        ({"corruptions": "all", "attack": "clean"}, "leave --corruptions out"),
        ({"against": "a"}, "leave --against out, or leave --version=fast out"),
        ({"search_dtype": "bfloat16"}, "leave --search_dtype=bfloat16 out"),
        ({"worst_case": True, "union_only": True}, "leave --worst_case and --union_only out"),
        ({"certify": 0.25, "attack": "clean"}, "leave --certify out"),
        (
            {"bundle": "b"},
            "needs all of AutoAttack, not --version=fast; leave it out now, and give it",
        ),
    )
    def test_flags_that_contradict_the_version(self, changes, message):
        with self.assertRaisesRegex(ValueError, message):
            mistakes.check_fast(GivenFlags(version="fast", **changes), [])

    @sweeps.rows(
        ({"version": "plus"}, "--finish completes a standard evaluation; leave --ver"),
        ({"version": "rand"}, "leave --version=rand out"),
        ({"against": "a"}, "leave --against out, or leave --finish out"),
        (
            {"attack": "apgd-ce"},
            "--finish completes one evaluation.*leave --attack=apgd-ce out",
        ),
        ({"again": True}, "leave --again out, or leave --finish out"),
        ({"certify": 0.25, "attack": "clean"}, "leave --certify out"),
    )
    def test_flags_that_contradict_finish(self, changes, message):
        with self.assertRaisesRegex(ValueError, message):
            mistakes.check_fast(GivenFlags(finish=True, **changes), [])

    def test_several_evaluations(self):
        for own in ({"version": "fast"}, {"finish": True}):
            given_flags = GivenFlags(function="nets.py:f", dataset="digits", **own)
            many = {"sizes": (8, 12)}, {"threats": ("linf:0.1", "l2:1")}, {"ladder": "linf:0:0.1:3"}
            for more, name in zip(many, ("image_size", "threat", "ladder"), strict=True):
                with self.assertRaisesRegex(ValueError, f"leave --{name} out, or leave --"):
                    command.evaluated(given_flags, **more)

    def test_settings_of_an_attack_have_no_effect(self):
        with self.assertRaisesRegex(ValueError, "--steps=5 has no effect with --attack=autoattack"):
            mistakes.check_attack(GivenFlags(version="fast", steps=5))

    def test_flags_that_do_not(self):
        mistakes.check_fast(GivenFlags(attack="pgd-20", bundle="b"), ["--ladder"])
        mistakes.check_fast(GivenFlags(version="fast", replay=("a",), again=True, seed=3), [])
        mistakes.check_fast(GivenFlags(finish=True, version="fast", bundle="b", noreplay=True), [])
        self.assertEqual(GivenFlags(version="fast").method, stopping.FAST_METHOD)
