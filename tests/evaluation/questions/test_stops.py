"""--against and --until_width: what they write, how the plain command continues, what they
refuse.
"""

import contextlib
import json
import re
import shutil
import tempfile
from pathlib import Path

import numpy as np
from absl.testing import absltest, parameterized

from jaxrobust.evaluation.questions import command, mistakes, stated, stops
from jaxrobust.evaluation.questions.flags import GivenFlags
from jaxrobust.evaluation.records import comparisons, records, sequences, verdicts
from jaxrobust.evaluation.records.record import AccuracyRecord
from jaxrobust.report.gathered import gather
from jaxrobust.report.page import page
from jaxrobust.report.parts import sentences
from jaxrobust.results.comparison import comparison_findings, comparison_markdown, evaluations
from tests.support import sweeps
from tests.support.evaluations import call
from tests.support.outcomes import ended, refused

N = 200
NETS = """
import numpy as np

WEIGHTS = np.random.default_rng(0).normal(size=(16, 4)).astype("f")
OTHERS = WEIGHTS + np.random.default_rng(1).normal(size=(16, 4)).astype("f")


def strong(x):
    return x.reshape(len(x), -1) @ WEIGHTS


def weak(x):
    return x.reshape(len(x), -1) @ OTHERS
"""
BALL = {"norm": "linf", "epsilon": "0.03", "attack": "apgd-ce", "steps": 2}


def given(net: str = "strong", **more) -> dict:
    whose = {"function": f"nets.py:{net}", "dataset": "npz:data.npz", "split": "all"}
    return whose | BALL | {"out": net, "batch": 16} | more


def written(folder: str = "strong") -> list[dict]:
    return [json.loads(line) for line in Path(folder, "results.jsonl").read_text().splitlines()]


class CommandTest(parameterized.TestCase):
    """Two networks, one of which is evaluated in full."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.folder = Path(cls.enterClassContext(tempfile.TemporaryDirectory()))
        cls.enterClassContext(contextlib.chdir(cls.folder))
        Path("nets.py").write_text(NETS)
        images = np.random.default_rng(2).random((N, 4, 4, 1)).astype("f")
        logits = images.reshape(N, -1) @ np.random.default_rng(0).normal(size=(16, 4))
        np.savez("data.npz", image=(255 * images).astype(np.uint8), label=logits.argmax(1))
        for net in ("weak", "strong"):
            code, _, said = call(**given(net))
            assert not code, said
        (cls.weak,), (cls.strong,) = written("weak"), written("strong")

    def test_against(self):
        told, _ = ended(call(**given(out="ahead", against="weak")))
        (record,) = written("ahead")
        stopped = record["stopped"]
        self.assertEqual((stopped["rule"], stopped["leads"]), ("ahead", "this"))
        self.assertEqual(stopped["against"]["evaluation"], self.weak["evaluation"])
        self.assertLess(stopped["stopped_after"], N)
        self.assertIsNone(record["interval"])
        self.assertEqual(record["method"], "apgd-ce, steps 2, stopped")
        self.assertIn(f"stopped after {stopped['stopped_after']} of 200 images: this net", told)
        self.assertIn(f"{stopped['stopped_after']} images in a random order\n", told)
        own = verdicts.read(Path("ahead", record["verdicts"]))
        order = sequences.order(0, range(N))
        self.assertEqual(own.image_ids.tolist(), sorted(order[: stopped["stopped_after"]]))
        self.assertEqual(record["image_ids"], records.ranges(own.image_ids.tolist()))
        self.assertEqual(record["robust"], own.robust.mean())
        with self.subTest("the same command again has the answer"):
            _, _, said = call(**given(out="ahead", against="weak"))
            self.assertIn("already done", said)
            self.assertLen(written("ahead"), 1)
        with self.subTest("the plain command continues, and attacks what was not met"):
            (ledger,) = Path("ahead").glob("ledger-*.jsonl")
            before = ledger.read_text()
            _, _, said = call(**given(out="ahead"))
            self.assertIn(f"apgd-ce: {own.clean.sum()} of ", said)
            record = written("ahead")[1]
            self.assertEqual(ledger.name, f"ledger-{record['evaluation']}.jsonl")
            self.assertStartsWith(ledger.read_text(), before)
            same = ("evaluation", "clean", "robust", "accuracy_after", "interval", "image_ids")
            self.assertEqual({k: record[k] for k in same}, {k: self.strong[k] for k in same})

    def test_the_weaker_one_is_behind_and_equal_ones_tie(self):
        told, _ = ended(call(**given("weak", out="behind", against="strong", alpha="0.1")))
        self.assertEqual(written("behind")[0]["stopped"]["leads"], "other")
        self.assertIn("90% confidence sequence", told)
        told, _ = ended(call(**given(out="tied", against="strong", tie="5")))
        stopped = written("tied")[0]["stopped"]
        self.assertEqual((stopped["rule"], stopped["tie"]), ("tie", 0.05))
        self.assertIn("they differ by less than 5 points", told)

    def test_until_width(self):
        told, _ = ended(call(**given(out="width", until_width="20")))
        (record,) = written("width")
        low, high = record["stopped"]["robust"]
        self.assertLess(high - low, 0.2)
        self.assertBetween(record["robust"], low, high)
        self.assertNotIn("95% interval", told)
        with self.subTest("another rule is another record of the same ledger"):
            call(**given(out="width", until_width="15"))
            self.assertLen(written("width"), 2)
            self.assertLen(list(Path("width").glob("ledger-*.jsonl")), 1)
        with self.subTest("it is a record to compare with, as far as it goes"):
            ended(call(**given("weak", out="short", against=f"width#{record['evaluation']}")))
            self.assertEqual(
                written("short")[0]["stopped"]["of"], record["stopped"]["stopped_after"]
            )

    def test_compared(self):
        call(**given(out="compared", until_width="20"))
        (record,) = written("compared")
        found = comparison_findings.find(evaluations.load(["weak", "compared"]))
        self.assertEqual(found.images, record["stopped"]["stopped_after"])
        text = comparison_markdown.document(found)
        self.assertRegex(
            text, r"B stopped after \d+ of its 200 images: the interval is narrower than 20"
        )
        self.assertIn("An evaluation was stopped by a rule", text)
        self.assertIn("95% sequence", text)
        for of_a_fixed_number in ("95% interval", "McNemar", "Tango"):
            self.assertNotIn(of_a_fixed_number, text)
        pair = found.pairs[0]
        self.assertTrue(comparison_findings.plain(found)["sequence"])
        order = sequences.order(0, found.evaluations[0].verdicts.image_ids.tolist())
        right = [one.verdicts.robust[order].astype(int) for one in found.evaluations]
        grown = sequences.evidence(*(np.cumsum(right[1] - right[0] == s) for s in (1, -1)))
        self.assertAlmostEqual(pair.robust.paired.p, np.exp(-grown.max()))
        plain = comparison_findings.find(evaluations.load(["weak", "strong"]))
        self.assertIn("McNemar", comparison_markdown.document(plain))
        self.assertNotIn("sequence", comparison_findings.plain(plain))
        fixed = comparisons.compare(*(r.astype(bool) for r in right))
        self.assertEqual(pair.robust.paired.gained, fixed.gained)
        self.assertLess(pair.robust.paired.low, fixed.low)
        self.assertGreater(pair.robust.paired.high, fixed.high)

    def test_orders_that_differ_are_not_compared(self):
        for seed in (0, 7):
            call(
                **given(
                    ("strong", "weak")[seed > 0], out=f"seed{seed}", until_width="20", seed=seed
                )
            )
        with self.assertRaisesRegex(ValueError, "seed of the image order is 0 there, 7 here"):
            evaluations.load(["seed0", "seed7"])

    def test_report(self):
        """The page shows the sequence's bounds, and no interval of a fixed number of images."""
        call(**given(out="page/own", until_width="20"))
        call(**given("weak", out="page/other", against="strong"))
        (record,), (other,) = written("page/own"), written("page/other")
        text = re.sub(r"\s+", " ", re.sub(r"<[^>]*>", "", page(gather([Path("page")]))))
        self.assertIn("95% sequence for all 200 images", text)
        self.assertNotIn("95% interval is", text)
        low, high = (f"{100 * end:.1f}" for end in record["stopped"]["robust"])
        self.assertIn(f"{low} to {high}% (sequence)", text)
        self.assertIn(f"stopped after {record['stopped']['stopped_after']} of 200 images", text)
        self.assertIn("--until_width 20", text)
        against = other["stopped"]["against"]["evaluation"]
        self.assertRegex(text, f"--against \\S*FOLDER#{against}")
        self.assertNotIn("exact 95% intervals", text)
        whole = gather([Path("weak")]).evaluations[0]
        self.assertEqual(sentences.interval_name(whole), "95% interval")

    @sweeps.rows(
        ("nothing", "--against=nothing has no evaluation; name a run, the folder"),
        ("weak#abc", "--against=weak#abc has no evaluation abc; name"),
        ("radius", "radius is .* there, .* here; give the same images, radius and attacks"),
        ("attack", 'attacks is "apgd-t" there, "apgd-ce" here'),
        ("images", "the images or labels with the same names differ"),
        ("labels", "the images or labels with the same names differ"),
        ("order", "it stopped in the image order of seed 7, but this one uses the order of seed 0"),
        ("both", r"holds 2 evaluations of this question; name one of them: both#"),
        ("neither", "none of the 2 evaluations of --against=neither can be compared with this one"),
        ("replayed", r"replayed points decided 1 of its images, .* again with --noreplay"),
        ("unnamed", "it has no per-image verdicts"),
    )
    def test_records_of_another_question(self, place, message):
        getattr(self, f"_{place.partition('#')[0]}", lambda: None)()
        said = refused(call(**given(out="refused", against=place)))
        self.assertRegex(said.replace("\n", " "), message)
        self.assertFalse(list(Path("refused").glob("results.jsonl")))

    def _changed(self, name: str, *changes) -> None:
        """A folder with copies of the weak network's record, each changed."""
        shutil.copytree("weak", name, dirs_exist_ok=True)
        rows = [json.dumps(self.weak | change) for change in changes]
        Path(name, "results.jsonl").write_text("\n".join(rows) + "\n")

    def _radius(self):
        call(**given("weak", out="radius", epsilon="0.02"))

    def _attack(self):
        call(**given("weak", out="attack", attack="apgd-t", targets=2))

    def _images(self):
        self._changed("images", {"fingerprint": self.weak["fingerprint"] | {"images": "others"}})

    def _labels(self):
        """As of a data set whose labels have changed: their hash is in that of the images."""
        data = dict(np.load("data.npz"))
        shutil.copy("data.npz", "kept.npz")
        np.savez("data.npz", image=data["image"], label=(data["label"] + 1) % 4)
        call(**given("weak", out="labels"))
        shutil.copy("kept.npz", "data.npz")

    def _order(self):
        call(**given("weak", out="order", until_width="20", seed=7))

    def _both(self):
        self._changed("both", {}, {"evaluation": "0123"})

    def _neither(self):
        attacks = [self.weak["attacks"][0] | {"epsilon": 0.01}]
        self._changed("neither", {"attacks": attacks}, {"attacks": attacks, "evaluation": "0123"})

    def _replayed(self):
        self._changed("replayed", {})
        path = Path("replayed", self.weak["verdicts"])
        own = verdicts.read(path)
        names = np.where(
            np.arange(N) == np.argmax(own.fooled_by == "apgd-ce"), "replay", own.fooled_by
        )
        verdicts.write(path, self.weak["evaluation"], own._replace(fooled_by=names))

    def _unnamed(self):
        self._changed("unnamed", {"verdicts": None})


class FlagsTest(parameterized.TestCase):
    @sweeps.rows(
        ({"alpha": 0.1}, "--alpha=0.1 has no effect without --against, --until_width or"),
        ({"tie": 1.0}, "--tie=1 has no effect without --against; leave it out"),
        ({"until_width": 2.0, "against": "a"}, "both set when to stop; give one of them"),
        ({"until_width": 2.0, "tie": 1.0}, "--tie=1 has no effect without --against"),
        ({"against": "a", "alpha": 1.0}, "--alpha=1 must be a probability of a false alarm"),
        ({"until_width": 0.0}, "--until_width=0 must be above 0"),
        ({"against": "a", "corruptions": "all"}, "leave --corruptions out"),
        ({"against": "a", "replay": ("b",)}, "leave --replay out, or leave --against out"),
        ({"until_width": 2.0, "alpha": 0.0}, "--alpha=0 must be .* between 0 and 1"),
        ({"against": "a", "tie": 0.0}, "--tie=0 must be above 0 and below 100 points"),
        ({"until_width": 100.0}, "--until_width=100 must be above 0 and below 100 points"),
        (
            {"against": "a", "attack": "pgd-20"},
            "needs attacks that work image by image.*pgd-20",
        ),
        ({"until_width": 2.0, "attack": "clean"}, "--until_width needs attacks.*leave clean out"),
        ({"against": "a", "version": "rand"}, "needs a deterministic network, not --version=rand"),
        ({"against": "a", "search_dtype": "bfloat16"}, "leave --search_dtype=bfloat16 out"),
        ({"until_width": 2.0, "bundle": "b"}, "leave --bundle out, or leave --until_width out"),
        ({"against": "a", "worst_case": True, "union_only": True}, "--worst_case and --union_only"),
    )
    def test_flags_that_contradict(self, changes, message):
        with self.assertRaisesRegex(ValueError, message):
            mistakes.check_stop(GivenFlags(**changes), [])

    def test_several_evaluations(self):
        with self.assertRaisesRegex(ValueError, "leave --threat and --ladder out"):
            mistakes.check_stop(GivenFlags(against="a"), ["--threat", "--ladder"])
        many = {"sizes": (8, 12)}, {"threats": ("linf:0.1", "l2:1")}, {"ladder": "linf:0:0.1:3"}
        flags = GivenFlags(function="nets.py:f", dataset="digits", until_width=2.0)
        for more, name in zip(many, ("image_size", "threat", "ladder"), strict=True):
            with self.assertRaisesRegex(ValueError, f"leave --{name} out, or leave --until_width"):
                command.evaluated(flags, **more)

    def test_flags_that_do_not(self):
        mistakes.check_stop(GivenFlags(), ["--threat"])
        mistakes.check_stop(GivenFlags(against="a", tie=1.0, alpha=0.1), [])
        mistakes.check_stop(GivenFlags(until_width=0.1, attack="apgd-ce", noreplay=True), [])
        self.assertEqual(stated.stop_of(GivenFlags(against="a")), "--against")
        self.assertIsNone(stated.stop_of(GivenFlags()))

    def test_a_width_that_images_cannot_give(self):
        stops.check_images(GivenFlags(until_width=2.0), 51)
        stops.check_images(GivenFlags(), 0)
        for question, images in (
            (GivenFlags(until_width=2.0), 50),
            (GivenFlags(until_width=1.0, n=99), 500),
        ):
            words = r"--until_width=\d: .* too narrow for \d+ images, .* evaluate more images"
            with self.assertRaisesRegex(ValueError, words):
                stops.check_images(question, images)


class DifferencesTest(absltest.TestCase):
    def test_a_record_without_verdicts_cannot_be_stopped_against(self):
        record = AccuracyRecord(verdicts="verdicts-1.json")
        self.assertEqual(stops.differences(record, record), "")
        bare = AccuracyRecord()
        self.assertEqual(stops.differences(bare, record), "it has no per-image verdicts")
