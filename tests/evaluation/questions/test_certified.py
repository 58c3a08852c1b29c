"""Certified accuracy by the command: the record, its resumption, and every refusal."""

import json
from pathlib import Path
from unittest import mock

import numpy as np
from absl.testing import parameterized

from jaxrobust.evaluation.questions import certified
from tests.support import result_lines, sweeps
from tests.support.evaluations import call
from tests.support.outcomes import refused

NET = """
import jax.numpy as jnp
def logits_fn(images):  # tells 5 classes apart by how bright they are
    return -jnp.abs(images.mean((1, 2, 3))[:, None] - jnp.linspace(0.3, 0.6, 5)[None])
"""


class CommandCase(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.folder = Path(self.create_tempdir())
        (self.folder / "net.py").write_text(NET)

    def evaluate(self, out="out", **given) -> tuple[int, str, str]:
        function = f"{self.folder / 'net.py'}:logits_fn"
        given = {"dataset": "fake:8x8x3:5", "split": "test", "n": 6, "certify": "0.25"} | given
        return call(function=function, out=str(self.folder / out), **given)

    def record(self, **given) -> dict:
        code, self.printed, said = self.evaluate(**given)
        self.assertEqual(code, 0, said)
        return result_lines.read(self.folder / given.get("out", "out"))[-1]

    def rows(self, out="out") -> list[dict]:
        (file,) = (self.folder / out).glob("smoothing-*.jsonl")
        return [json.loads(line) for line in file.read_text().splitlines()]


class Killed(BaseException):
    """Ends a command, which answers every other error."""


PLACES = [2, 41, 170, 203, 230, 254]  # six of the 256 by `spread.places`


class RecordTest(CommandCase):
    def test_accuracies_are_those_of_the_images(self):
        found = self.record(draws=200, alpha="0.01")
        said, rows = found["certified"], self.rows()
        self.assertEqual((found["method"], found["attacks"]), ("smoothing 0.25", []))
        self.assertEqual((said["sigma"], said["draws"], said["alpha"]), (0.25, 200, 0.01))
        self.assertEqual(said["images"], next((self.folder / "out").glob("smoothing-*")).name)
        self.assertEqual([row["image"] for row in rows], PLACES)
        right = np.array([row["answer"] == row["label"] for row in rows])
        radii = np.array([row["radius"] for row in rows])
        self.assertGreater(right.sum(), 0)
        for radius, accuracy in said["accuracy"].items():
            self.assertEqual(accuracy, (right & (radii >= float(radius))).mean(), radius)
        values = [*said["accuracy"].values()]
        self.assertEqual(values, sorted(values, reverse=True))
        self.assertAlmostEqual(said["average_radius"], (radii * right).mean())
        self.assertIn(f"certified at l2 0         {values[0]:7.1%}", self.printed)
        self.assertIn("sigma 0.25, 200 draws, alpha 0.01", self.printed)

    def test_an_interrupted_one_goes_on(self):
        whole = self.record(draws=100)
        append, calls = certified.jsonl.append, []

        def until_the_third(path, row):
            if len(calls) == 2:
                raise Killed
            calls.append(append(path, row))

        with (
            mock.patch.object(certified.jsonl, "append", side_effect=until_the_third),
            self.assertRaises(Killed),
        ):
            self.evaluate("again", draws=100)
        (ledger,) = (self.folder / "again").glob("smoothing-*.jsonl")
        first, second = self.rows("again")
        first["unanswered"] = 7  # shows that it is not computed again
        ledger.write_text("".join(f"{json.dumps(row)}\n" for row in (first, second)))
        found = self.record(out="again", draws=100)["certified"]
        self.assertEqual(self.rows("again")[0]["unanswered"], 7)
        self.assertEqual(self.rows("again")[1:], self.rows()[1:])
        self.assertEqual(found["abstained"], whole["certified"]["abstained"])

    @parameterized.parameters(
        {"radius": 0.9},
        {"votes": 40},
    )
    def test_a_line_that_its_votes_do_not_bear_out_is_refused(self, **changed):
        self.record(draws=100)
        (ledger,) = (self.folder / "out").glob("smoothing-*.jsonl")
        rows = self.rows()
        at = next(i for i, row in enumerate(rows) if row["radius"] > 0)
        rows[at] |= changed
        ledger.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        (self.folder / "out" / "results.jsonl").unlink()
        said = refused(self.evaluate(draws=100))
        self.assertRegex(
            said, rf"certifies more for image {PLACES[at]} than its \d+ votes support; remove that"
        )

    def test_other_settings_are_other_evaluations(self):
        self.record(draws=100)
        self.record(draws=100)
        self.assertLen(result_lines.read(self.folder / "out"), 1)
        for other in ({"certify": "0.5"}, {"draws": 50}, {"alpha": "0.01"}, {"seed": 1}):
            self.record(**({"draws": 100} | other))
        self.assertLen(result_lines.read(self.folder / "out"), 5)


class RefusedTest(CommandCase):
    @sweeps.rows(
        ({"certify": "0"}, "--certify=0: sigma=0 must be above 0"),
        ({"draws": 5}, "--certify=0.25: 5 draws are too few to certify any image"),
        ({"alpha": "2.0"}, "--certify=0.25: alpha=2 must be between 0 and 0.5"),
        ({"norm": "linf"}, "--certify gives radii in l2, .* leave --norm=linf out"),
        ({"epsilon": "0.5"}, "--certify finds the radius of each .*; leave --epsilon out"),
        ({"threat": ["l2:0.5"]}, "--certify finds the radius of each .*; leave --threat out"),
        ({"ladder": "l2:0:1:3"}, "--certify finds the radius of each .*; leave --ladder out"),
        ({"attack": "pgd-3"}, "--certify does not attack; leave --attack=pgd-3 out"),
        ({"until_width": "2"}, "--until_width stops attacks, but --certify runs none; leave one"),
        ({"rule": "mean"}, "--rule has no effect with --certify; leave it out"),
        ({"noreplay": True}, "--noreplay has no effect with --certify; leave it out"),
        ({"version": "rand"}, "--certify does not support --version=rand; leave"),
        ({"certify": None, "alpha": "0.1"}, "--alpha=0.1 has no effect .* or --certify; leave"),
    )
    def test_with_one_sentence(self, given, sentence):
        said = refused(self.evaluate(**given))
        self.assertRegex(said, sentence)
        self.assertLen(said.strip().splitlines(), 1)
