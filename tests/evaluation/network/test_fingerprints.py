"""When one network is taken for another, by the fields of their fingerprints."""

from concurrent.futures import Future

import numpy as np
from absl.testing import parameterized

from jaxrobust.evaluation.network import fingerprint
from jaxrobust.evaluation.network.fingerprint import Fingerprint
from tests.support import sweeps

LOGITS, GRADIENTS = [[2.0, 1.0], [4.0, -3.0]], [[1.0, 1.0], [1.0, 0.5]]
BY = {"jaxrobust": "1", "jax": "0.9"}
OWN = {"program": "p", "gradient": "g", "arrays": "a", "versions": BY,
       "probe": {"logits": LOGITS, "gradients": GRADIENTS}}  # fmt: skip
OTHER = {"versions": {"jaxrobust": "2", "jax": "0.9"}}


def moved(name, by):
    return {"probe": OWN["probe"] | {name: (np.array(OWN["probe"][name]) + by).tolist()}}


class DifferenceTest(parameterized.TestCase):
    @sweeps.rows(
        ({}, ""),
        ({"arrays": "b"}, "its arrays (weights) differ"),
        ({"arrays": "b", "program": "q"}, "its arrays (weights) differ"),
        ({"program": "q"}, "a different program computes its logits"),
        ({"gradient": "h"}, "a different program computes its input gradient"),
        ({"program": "q", "gradient": "h"}, "a different program computes its logits"),
        ({"gradient": "h", **OTHER}, ""),
        ({"program": "q", "versions": None}, "a different program computes its logits"),
        ({"gradient": "h", "versions": {"torch": "2"}}, "a different program computes its input"),
        ({"program": "q", **OTHER, **moved("logits", 1)},
         "its logits on eight noisy images differ (there jaxrobust 2, jax 0.9, here jaxrobust "
         "1, jax 0.9)"),
        (moved("logits", 1), "its logits on eight noisy images differ"),
        (moved("gradients", 1), "its gradients on eight noisy images differ"),
        (moved("gradients", 0.009), ""),
        (moved("gradients", 0.011), "its gradients on"),
        (moved("logits", 0.009), "its logits on"),  # of which rounding moves less
        ({"probe": None}, "its logits on eight noisy images differ"),
        ({"probe": {"logits": LOGITS}}, "its gradients on"),
    )  # fmt: skip
    def test_difference(self, changes, words):
        found = fingerprint.difference(OWN | changes, OWN)
        self.assertStartsWith(found, words)
        self.assertEqual(bool(found), bool(words))

    def test_what_is_still_computed_is_waited_for(self):
        later = Future()
        later.set_result(OWN["probe"])
        self.assertEqual(fingerprint.difference(OWN, OWN | {"probe": later}), "")
        known = Fingerprint("p", "g", "a", later, BY)
        self.assertEqual(known.computed_probe, OWN["probe"])
        self.assertEqual(fingerprint.resolved(known._asdict())["probe"], OWN["probe"])
        self.assertEqual(known.exact, {"program": "p", "gradient": "g", "arrays": "a"})

    @sweeps.rows(
        ([[1.0], [2.0]], True), ([[-1.0], [2.0]], True), ([[-1.0], [-1.0]], False),
        ([[0.0], [-1.0]], True),
    )  # fmt: skip
    def test_answers(self, rows, answers):
        known = Fingerprint("p", "g", "a", {"logits": rows, "gradients": rows}, BY)
        self.assertEqual(known.has_answers, answers)

    @sweeps.rows(
        ({"a": "1"}, {"a": "1"}, False), ({"a": "1"}, {"a": "2"}, True), ({}, {"a": "1"}, False),
        ({"a": "1", "b": "2"}, {"a": "1", "c": "3"}, False),
        ({"a": "1", "b": "2"}, {"a": "1", "b": "3"}, True),
    )  # fmt: skip
    def test_other_versions(self, one, other, differ):
        self.assertEqual(fingerprint.other_versions(one, other), differ)

    @sweeps.rows(
        ({}, "jaxrobust ?"),
        ({"jaxrobust": "1", "torch": "2", "jax": "3", "platform": "cpu"},
         "jaxrobust 1, jax 3, torch 2, platform cpu"),
        ({"jaxrobust": "1", "commit": "0123456789abcdef"}, "jaxrobust 1 at 0123456789ab"),
        ({"commit": "0123456789abcdef+changes"}, "jaxrobust ? at 0123456789ab+changes"),
    )  # fmt: skip
    def test_words(self, versions, words):
        self.assertEqual(fingerprint.words(versions), words)


class NearTest(parameterized.TestCase):
    @sweeps.rows(
        ([[10, 1]], [[10, 1.09]], True),
        ([[10, 1]], [[10, 1.11]], False),
        ([[10, 1]], [[10.1, 1.1005]], True),  # the longer of both counts
        ([[10, 1], [1, 1]], [[10, 1], [1, 1.02]], False),  # each row by its own length
        (
            [[10, 1], [1e-9, 0]],
            [[10, 1], [1e-9, 9e-8]],
            True,
        ),  # but what is rounding next to others
        ([[10, 1], [1e-9, 0]], [[10, 1], [1e-9, 2e-7]], False),
        ([[-1, -1]], [[-1, -1]], True),
        ([[-1, -1]], [[1, 1]], False),
        ([[1, 1]], [[1, 1], [1, 1]], False),
        ([[1, 1]], [[1]], False),
        (None, [[1]], False),
        ("text", [[1]], False),
        ([[1], [1, 2]], [[1], [2]], False),
        ([[float("nan")]], [[1]], False),
        ([[0, 0]], [[0, 0]], True),
    )
    def test_near(self, theirs, ours, near):
        self.assertEqual(fingerprint._near(theirs, ours, 1e-2), near)


class SketchTest(parameterized.TestCase):
    def test_lengths_and_products_row_by_row(self):
        rows = np.random.default_rng(0).normal(size=(4, 3, 2, 5))
        rows[2, 1, 0, 3] = np.inf
        found = np.array(fingerprint._sketch(rows))
        self.assertEqual(found.shape, (4, 9))
        for at in (0, 1, 3):
            self.assertAlmostEqual(found[at, 0], (rows[at] ** 2).sum() ** 0.5, places=5)
            alone = np.array(fingerprint._sketch(rows[at : at + 1]))[0]
            np.testing.assert_array_equal(found[at], alone)
        np.testing.assert_array_equal(found[2], -1)
        np.testing.assert_allclose(fingerprint._sketch(3 * rows[:1]), 3 * found[:1], rtol=1e-5)
        changed = rows.copy()
        changed[0, 2, 1, 4] += 0.1  # any entry is seen
        other = np.array(fingerprint._sketch(changed))
        self.assertTrue((np.abs(other - found)[0, 1:] > 0.05).all())
        text = repr(found[0, 1]).strip("-").replace(".", "").lstrip("0")
        self.assertLessEqual(len(text), 7 + len("npfloat64()"))

    @sweeps.rows((0, [0] * 8), (1, [0] * 8), (3, [0, 1, 2, 0, 1, 2, 0, 1]),
                              (9, list(range(8))))  # fmt: skip
    def test_noisy_images(self, count, which):
        images = np.random.default_rng(1).random((count, 4, 4, 3)).astype(np.float32)
        found = fingerprint._noisy(images, 8)
        self.assertEqual((found.shape, found.dtype), ((8, 4, 4, 3), np.float32))
        of = images[which] if count else np.full((8, 4, 4, 3), 0.5, np.float32)
        self.assertBetween(np.abs(found - of).max(), 7 / 255, 8 / 255 + 1e-6)
        self.assertBetween(float(found.min()), 0, 1)
        self.assertBetween(float(found.max()), 0, 1)
        np.testing.assert_array_equal(found, fingerprint._noisy(images, 8))
        if count == 1:
            self.assertFalse(np.array_equal(found[0], found[1]))  # each with noise of its own
