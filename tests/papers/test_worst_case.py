"""The worst case over three norms: in the command, in a program, and whoever reads its record."""

import json
import os
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import pytest
from absl.testing import parameterized

from jaxrobust import evaluation
from jaxrobust.evaluation.records import records, verdicts
from jaxrobust.evaluation.records.record import AccuracyRecord
from jaxrobust.papers import three_norms
from jaxrobust.publish import network_account
from jaxrobust.report import gathered
from jaxrobust.report.parts import commands, sentences
from jaxrobust.report.parts import evaluation as evaluation_part
from jaxrobust.types import Threat
from tests.support import result_lines
from tests.support.evaluations import call, run_for

RADII = {"linf": 0.012, "l2": 0.06, "l1": 0.5 + 0.7}
THREATS = [f"{norm}:{epsilon}" for norm, epsilon in RADII.items()]
NAMES = ["linf 0.012 pgd-20", "linf 0.012 apgd-ce", "l2 0.06 pgd-20", "l1 1.2 pgd-20"]
L1_STEP = 0.1  # of the whole way: from 1 on, no radius in L1 leaves an image of this network
# AutoAttack in a moment, by the first of its attacks, and short steps in L1.
SHORT = tuple(
    part._replace(attack="apgd-ce", settings={"steps": 5})
    if part.attack == "autoattack"
    else part._replace(settings={**part.settings, "relative_step": L1_STEP})
    if part.norm == "l1"
    else part
    for part in three_norms.PARTS
)


def passes(record) -> int:
    return sum(cost["forward"] for cost in record["costs"])


class TableTest(parameterized.TestCase):
    def test_what_the_study_asks(self):
        """Its radii and steps, 3/40 of the radius, foolbox's starts and ART's rule."""
        asked = three_norms.questions(evaluation_question(), skips=False)
        said = [(norm, question.method) for norm, question in asked]
        pgd = "pgd-20, relative_step 1.5, start "
        self.assertEqual(
            said,
            [
                ("linf", f"{pgd}uniform-boxed"),
                ("linf", "autoattack standard"),
                ("l2", f"{pgd}uniform-boxed"),
                ("l1", f"{pgd}random, l1_rule art"),
            ],
        )
        self.assertEqual(self.radii(32), {"linf": 8 / 255, "l2": 1.5, "l1": 40})
        self.assertEqual(self.radii(224), {"linf": 8 / 255, "l2": 8, "l1": 1600})
        self.assertEqual(self.radii(32, Threat("l1", 12.0))["l1"], 12)
        order = [question.attack for _, question in three_norms.questions(asked[0][1], skips=True)]
        self.assertEqual(order, ["pgd-20", "pgd-20", "pgd-20", "autoattack"])

    def radii(self, size, *given):
        return {norm: ball.epsilon for norm, ball in three_norms.radii(size, given).items()}

    def test_what_only_autoattack_is_told(self):
        asked = evaluation_question(replay=("a",), noreplay=True, search_dtype="bfloat16")
        found = three_norms.questions(asked._replace(union_only=True), skips=False)
        told = [(q.replay, q.noreplay, q.search_dtype, q.union_only) for _, q in found]
        none = ((), False, "float32", False)
        self.assertEqual(told, [none, (("a",), True, "bfloat16", False), none, none])


def evaluation_question(**more):
    from jaxrobust.evaluation.questions.questions import GivenFlags

    return GivenFlags(**more)


@pytest.mark.computes
@pytest.mark.slow
class CommandTest(parameterized.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.workdir = run_for(cls, pretrained=False)

    def asked(self, out, **more):
        """The records and the answer of the command."""
        with mock.patch.object(three_norms, "PARTS", SHORT):
            code, printed, said = call(workdir=str(self.workdir), out=os.fspath(out), **more)
        self.assertEqual(code, 0, said)
        return result_lines.read(Path(out)), printed

    def refused(self, message, **more):
        out = Path(self.create_tempdir()) / "out"
        given = {"workdir": str(self.workdir), "out": str(out), "worst_case": True, "n": 8}
        code, _, said = call(**given | more)
        self.assertEqual(code, 2, said)
        self.assertRegex(said, message)
        self.assertFalse(out.exists())

    def test_each_on_all_images_and_the_worst_case(self):
        out, few = Path(self.create_tempdir()), {"threat": THREATS, "n": 40}
        (*each, whole), printed = self.asked(out, worst_case=True, **few)
        self.assertLen(each, 4)
        survives, norms = np.ones(40, bool), []
        for part, record in zip(whole["worst_case"], each, strict=True):
            found = verdicts.read(out / record["verdicts"])
            self.assertLen(found.robust, 40)
            self.assertEqual(part["robust"], found.robust.mean())
            self.assertEqual(part["interval"], record["interval"]["robust"])
            self.assertEqual((part["images"], part["evaluation"]), (40, record["evaluation"]))
            self.assertEqual(part["method"], record["method"])
            self.assertEqual(RADII[part["norm"]], part["epsilon"])
            survives &= found.robust
            norms.append(part["norm"])
        self.assertEqual(norms, ["linf", "linf", "l2", "l1"])
        self.assertEqual(whole["robust"], survives.mean())
        self.assertLess(0, whole["robust"])
        self.assertLess(whole["robust"], min(record["robust"] for record in each))
        own = verdicts.read(out / whole["verdicts"])
        np.testing.assert_array_equal(own.robust, survives)
        self.assertContainsSubset({"", "clean"}, set(own.fooled_by.tolist()))
        self.assertEqual(list(whole["accuracy_after"]), NAMES)
        self.assertEqual(whole["accuracy_after"][NAMES[-1]], whole["robust"])
        self.assertEqual(whole["clean"], each[0]["clean"])
        self.assertEqual([a["name"] for a in whole["attacks"]], ["pgd", "apgd-ce", "pgd", "pgd"])
        self.assertEqual([a.get("l1_rule") for a in whole["attacks"]], [None, None, None, "art"])
        for record in each:
            self.assertRegex(printed, rf"{record['clean']:.1%} +{record['robust']:.1%}")
        self.assertRegex(printed, f"worst case of {', '.join(NAMES)} +8 +.*{whole['robust']:.1%}")
        with self.subTest("the same command finds it"):
            self.assertEqual(self.asked(out, worst_case=True, **few), ([*each, whole], printed))
        with self.subTest("an attack alone is the same evaluation"):
            alone = {"attack": "pgd-20", "relative_step": str(L1_STEP), "start": "random"}
            alone |= {"l1_rule": "art", "norm": "l1", "epsilon": "1.2", "n": 40}
            self.assertLen(self.asked(out, **alone)[0], 5)
        with self.subTest("readers"):
            self.read(out, whole, printed)
        with self.subTest("the worst case alone"):
            self.only(whole, own, few)

    def only(self, whole, own, few):
        """What has fallen is skipped: the same verdicts for fewer passes, no figure of each."""
        out = Path(self.create_tempdir())
        (record,), printed = self.asked(out, worst_case=True, union_only=True, **few)
        self.assertEqual(record["robust"], whole["robust"])
        found = verdicts.read(out / record["verdicts"])
        np.testing.assert_array_equal(found.robust, own.robust)
        np.testing.assert_array_equal(found.clean, own.clean)
        order = [NAMES[0], *NAMES[2:], NAMES[1]]
        self.assertEqual(list(record["accuracy_after"]), order)
        after = list(record["accuracy_after"].values())
        parts = record["worst_case"]
        # The first sees all images, each of the others what stands before it.
        self.assertEqual([p["images"] for p in parts], [40, *(round(40 * a) for a in after[:-1])])
        self.assertEqual(parts[0]["robust"], after[0])
        self.assertEqual([p["robust"] for p in parts[1:]], 3 * [None])
        self.assertEqual([p["evaluation"] for p in parts], 4 * [None])
        self.assertLess(passes(record), passes(whole))
        for name, value in record["accuracy_after"].items():
            self.assertRegex(printed, f"after {name} +{value:.1%}")
        self.assertNotEqual(record["evaluation"], whole["evaluation"])
        (one,) = gathered.gather([out]).evaluations
        self.assertIn("--union_only", commands.evaluate(one, None))
        self.assertEqual(
            [name for name, _ in evaluation_part.accuracies(one)][1], f"after {order[0]}"
        )

    def read(self, out, whole, printed):
        """The report, what is handed on, and the command that it names."""
        found = {e.record.evaluation: e for e in gathered.gather([out]).evaluations}
        one = found[whole["evaluation"]]
        names = [name for name, _ in evaluation_part.accuracies(one)]
        self.assertEqual(names, ["clean", *(f"under {name}" for name in NAMES), "under all"])
        self.assertEqual(
            [value for _, value in evaluation_part.accuracies(one)][1:-1],
            [part["robust"] for part in whole["worst_case"]],
        )
        self.assertIn("worst case", sentences.headline(one))
        self.assertRegex(" ".join(sentences.doubts(one, [])), "The attack was worst case, not the")
        self.assertIn(
            "--worst_case --threat linf:0.012 --threat l2:0.06 --threat l1:1.2 --seed 0",
            commands.evaluate(one, None),
        )
        row = network_account.row(AccuracyRecord.from_json(whole))
        self.assertEqual(row[1], f"worst case of {', '.join(NAMES)}")

    def test_refuses(self):
        for more, message in (
            ({}, r"no radii for images of 8 px \(32 px: linf 0.03137, l2 1.5, l1 40; 224 px: linf.*"
             "give --threat=linf:RADIUS --threat=l2:RADIUS --threat=l1:RADIUS"),
            ({"threat": THREATS[:2]}, "give --threat=l1:RADIUS$"),
            (
                {"threat": [*THREATS[:2], "l1:8/255"]},
                "an l1 radius of 0.03137 .* is probably meant for linf; use norm linf, or",
            ),
            ({"threat": [*THREATS, "l1:2"]}, "takes one radius per norm, and l1 already has one"),
            ({"threat": ["l1:8/255"]}, "an l1 radius of 0.03137 changes less than one pixel"),
            ({"threat": ["l3:1"]}, "the norm 'l3' is unknown; choose one of linf, l2, l1"),
            ({"threat": [*THREATS[:2], "l1:99"]}, "an l1 ball of radius 99 contains all 8x8"),
            ({"norm": "linf"}, "covers three norms, so leave --norm out; give --threat NORM:RADIU"),
            ({"norm": "l1", "epsilon": "8/255"}, "so leave --norm and --epsilon out; give"),
            ({"attack": "pgd-20"}, "--worst_case fixes the attacks; leave --attack out, or"),
            ({"attack": "apgd-ce", "steps": 5}, "leave --attack, --steps out"),
            ({"version": "plus"}, "--worst_case fixes the attacks; leave --version out"),
            ({"l1_rule": "art"}, "leave --l1_rule out"),
            ({"step": "1/255"}, "leave --step out"),
            ({"start": "image"}, "leave --start out"),
            ({"ladder": "linf:0:0.1:3"}, "cannot be combined with --ladder; give only one"),
            ({"corruptions": "fog"}, "cannot be combined with --corruptions; give only one"),
            ({"bundle": "there"}, "--bundle covers one attack under one threat, not --worst_c"),
            ({"replay": ["a"], "noreplay": True, "threat": THREATS}, "--noreplay contradicts"),
            ({"n": -1, "threat": THREATS}, "--n=-1 is not a number of images; give 1 or more"),
        ):  # fmt: skip
            with self.subTest(row=(more, message)):
                self.refused(message, **more)


WEIGHTS = np.random.default_rng(0).standard_normal((48, 5)).astype(np.float32)


def linear(weights, x):
    return x.reshape(len(x), -1) @ weights


@pytest.mark.computes
class ProgramTest(parameterized.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.net = staticmethod(jax.tree_util.Partial(linear, WEIGHTS))  # no method of this class
        cls.images = np.random.default_rng(1).random((24, 4, 4, 3), np.float32)
        cls.labels = np.asarray(cls.net(cls.images)).argmax(1)
        cls.labels[3] += 1
        cls.labels %= 5

    def found(self, **more):
        radii = {"linf": 0.03, "l2": 0.2, "l1": 1.5}
        with mock.patch.object(three_norms, "PARTS", SHORT):
            return evaluation.worst_case(
                self.net, self.images, self.labels, radii=radii, verbose=False, **more
            )

    def test_a_function(self):
        whole = self.found()
        self.assertFalse(whole.clean[3])
        self.assertEqual(whole.clean.sum(), 23)
        alone = [part["robust"] for part in whole.parts]
        self.assertLessEqual(whole.robust.mean(), min(alone))
        self.assertTrue(0 < whole.robust.mean() < whole.clean.mean())
        self.assertEqual(list(whole.accuracy_after.values())[-1], whole.robust.mean())
        self.assertEqual((whole.fooled_by == "").tolist(), whole.robust.tolist())
        self.assertEqual(alone[1], whole.autoattack.robust.mean())
        for batch in (5, 24):
            np.testing.assert_array_equal(self.found(batch_size=batch).robust, whole.robust)
        only = self.found(union_only=True)
        np.testing.assert_array_equal(only.robust, whole.robust)
        self.assertEqual([part["robust"] for part in only.parts[1:]], 3 * [None])
        self.assertLess(len(only.autoattack.clean), 23)
        met = only.autoattack.verdicts.image_ids  # what stood before it, under the places of all
        self.assertContainsSubset(np.flatnonzero(only.robust), met)
        self.assertNoCommonElements(met, np.flatnonzero(~only.clean))
        for result in (whole, only):
            self.assertRegex(result.table(), rf"worst case +{whole.robust.mean():.2%}, 95%")
            path = Path(self.create_tempdir()) / "results.jsonl"
            record = result.save(path, model="mine", dataset="noise")
            self.assertEqual(result_lines.read(path.parent), [json.loads(json.dumps(record))])
            self.assertEqual((record["method"], record["image_ids"]), ("union", "0..23"))
            self.assertEqual(record["robust"], whole.robust.mean())
            self.assertLen(record["worst_case"], 4)
            found = verdicts.read(path.parent / record["verdicts"])
            np.testing.assert_array_equal(found.robust, whole.robust)
            self.assertEqual(
                records.attack_line(AccuracyRecord.from_json(record)),
                f"worst case of {', '.join(result.accuracy_after)}",
            )

    def test_refuses(self):
        for more, message in (
            (
                {},
                r"no radii for images of 4 px .*; give radii=\{'linf': RADIUS, 'l2': RADIUS, 'l1'",
            ),
            ({"radii": {"l3": 1.0}}, "radii contains l3; choose norms from linf, l2, l1"),
            (
                {"radii": {"linf": 0.1, "l2": 1.0, "l1": 8 / 255}},
                "l1 radius of 0.03137 changes",
            ),
            ({"radii": {"linf": 8, "l2": 1.0, "l1": 9}}, "larger than the pixel range"),
            ({"batch_size": 0}, "batch_size=0: pass an int of at least 1"),
        ):
            with self.subTest(row=(more, message)), self.assertRaisesRegex(ValueError, message):
                evaluation.worst_case(self.net, self.images, self.labels, **more)

    def test_refuses_images(self):
        for images, message in (
            (self.images[:0], "there are no images"),
            ((255 * self.images).astype(np.uint8), "images are uint8"),
        ):
            with self.assertRaisesRegex(ValueError, message):
                evaluation.worst_case(self.net, images, self.labels[: len(images)])
