"""`--n` of a data set that is sorted by class: spread over its classes, in records and in flags.

Before, `--n 39` was one class and a part of the next: 100% with an exact interval, and no flag.
"""

import json
from pathlib import Path

import numpy as np
from absl.testing import parameterized

from jaxrobust.evaluation.records import records, verdicts
from tests.support import result_lines, sorted_sources, sweeps
from tests.support.evaluations import call

# Right on half of the classes; one class further on all; and a network that knows nothing.
NET = """
import jax.numpy as jnp
def level(images):
    return images[:, :4].mean((1, 2, 3))[:, None] * 255 - 20
classes = jnp.arange(10)[None]
def logits_fn(images):
    return -jnp.abs(level(images) - jnp.where(classes < 5, 20.0 * classes, 1e3))
def shifted(images):
    return -jnp.abs(level(images) - 20.0 * ((classes - 1) % 10))
def guessing(images):
    return jnp.sin(1e4 * level(images)) * jnp.sin(99.0 * classes)
"""


class ChoiceCase(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.folder = Path(self.create_tempdir())
        (self.folder / "net.py").write_text(NET)
        self.named = sorted_sources.write("npz", self.folder)

    def evaluate(self, out="out", function="logits_fn", **given):
        given = {"attack": "clean", "split": self.named["split"]} | given
        code, printed, said = call(
            function=f"{self.folder / 'net.py'}:{function}", dataset=self.named["name"],
            out=str(self.folder / out), **given,
        )  # fmt: skip
        self.assertEqual(code, 0, said)
        self.printed = printed
        return result_lines.read(self.folder / out)[-1]

    def verdicts(self, record, out="out"):
        return verdicts.read(self.folder / out / record["verdicts"])


class EvaluateTest(ChoiceCase):
    @parameterized.parameters(
        {"attack": "clean"},
        {"attack": "fgsm", "epsilon": "0.001"},
        {"attack": "pgd-2", "epsilon": "0.001"},
        {"attack": "apgd-ce", "steps": 2, "epsilon": "0.001"},
        {"attack": "apgd-ce", "steps": 2, "ladder": "linf:0.001:0.002:2"},
        {"attack": "apgd-ce", "steps": 2, "threat": ["linf:0.001", "l2:0.01"]},
        {"attack": "apgd-ce", "steps": 2, "epsilon": "0.001", "until_width": "40"},
    )
    def test_images_of_all_classes(self, **given):
        found = self.evaluate(n=39, **given)
        own = self.verdicts(found)
        if "until_width" not in given:
            counts = np.bincount(own.labels, minlength=10)
            self.assertEqual((counts.min(), counts.max()), (3, 4))
            self.assertEqual(found["image_ids"], records.ranges(own.image_ids.tolist()))
        np.testing.assert_array_equal(own.labels, sorted_sources.LABELS[own.image_ids])
        self.assertEqual(found["image_choice"], "hash")
        self.assertLess(found["clean"], 0.7)
        self.assertNotIn("one-class", found["flags"])
        self.assertNotIn("lopsided-classes", found["flags"])

    def test_certified(self):
        found = self.evaluate(n=12, certify="0.05", draws=100)
        (file,) = (self.folder / "out").glob("smoothing-*.jsonl")
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        labels = np.array([row["label"] for row in rows])
        self.assertEqual(np.bincount(labels, minlength=10).min(), 1)
        ids = [row["image"] for row in rows]
        np.testing.assert_array_equal(labels, sorted_sources.LABELS[ids])
        self.assertEqual(found["image_ids"], records.ranges(ids))

    def test_more_images_hold_the_fewer(self):
        fewer, more = (self.evaluate(str(n), n=n) for n in (39, 100))
        own = self.verdicts(fewer, "39").image_ids
        self.assertContainsSubset(own.tolist(), self.verdicts(more, "100").image_ids.tolist())

    def test_all_images_are_what_they_were(self):
        for n in ("all", 300, 1000):
            found = self.evaluate(str(n), n=n)
            self.assertEqual(found["image_ids"], "0..299")
            self.assertEqual(found["image_choice"], "all")

    def test_what_is_printed(self):
        self.evaluate(n=39)
        self.assertIn("split test, 39 images, spread over the classes", self.printed)

    def test_a_part_is_flagged(self):
        """It is what TFDS' users mean by it: these images, which here are of one class."""
        found = self.evaluate(split="test[:30]")
        self.assertEqual((found["image_ids"], found["clean"]), ("0..29", 1))
        self.assertStartsWith(
            found["flags"]["one-class"], "all 30 images belong to class 0, one of"
        )
        found = self.evaluate("two", split="test[:39]")
        self.assertIn("39 images cover 2 of 10 classes", found["flags"]["lopsided-classes"])
        self.assertIn("flag lopsided-classes: 39 images", self.printed)


class FlagsTest(ChoiceCase):
    """`low-accuracy` was only raised where AutoAttack ran."""

    ATTACKS = (
        {"attack": "clean"},
        {"attack": "fgsm", "epsilon": "0.001"},
        {"attack": "pgd-2", "epsilon": "0.001"},
        {"attack": "apgd-ce", "steps": 2, "epsilon": "0.001"},
        {"attack": "square", "steps": 2, "epsilon": "0.001"},
        {"certify": "0.05", "draws": 100, "n": 40},
    )

    @sweeps.rows(*ATTACKS)
    def test_no_more_than_guessing(self, **given):
        flags = self.evaluate(function="guessing", **given)["flags"]
        self.assertIn("no better than guessing among 10 classes", flags["low-accuracy"])
        self.assertNotIn("permuted-labels", flags)

    @sweeps.rows(*ATTACKS)
    def test_labels_that_are_one_off(self, **given):
        flags = self.evaluate(function="shifted", **given)["flags"]
        self.assertIn("0 of ", flags["low-accuracy"])
        self.assertIn("would be if all labels were 1 higher", flags["permuted-labels"])
        self.assertIn("0.0% of ", flags["permuted-labels"])

    @sweeps.rows(*ATTACKS[:4])
    def test_a_network_that_errs_is_none_of_them(self, **given):
        flags = self.evaluate(**given)["flags"]
        self.assertNotIn("low-accuracy", flags)
        self.assertNotIn("permuted-labels", flags)
