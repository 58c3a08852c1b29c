"""Each fault in a network that has it, blamed on nothing else; and nothing where there is none."""

import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from jaxrobust.doctor import explanations
from jaxrobust.doctor.findings import GREEN, RED, SKIPPED, YELLOW, examined
from jaxrobust.doctor.network_checks import NETWORK_CHECKS
from jaxrobust.doctor.patient import Patient
from jaxrobust.types import Threat
from tests.support import faults, sweeps


def patient(logits_fn, **changes):
    images, labels = faults.colours()
    given = {"images": images, "labels": labels, "threat": Threat("linf", faults.RADIUS)}
    return Patient(logits_fn, **(given | changes))


def levels(found):
    return {f.check.name: f.result.level for f in found}


class FaultsTest(parameterized.TestCase):
    def test_healthy(self):
        found = examined(NETWORK_CHECKS, patient(faults.healthy))
        self.assertLessEqual(set(levels(found).values()), {GREEN, SKIPPED})

    @sweeps.rows(*faults.FAULTS)
    @pytest.mark.slow
    def test_fault(self, name):
        found = examined(NETWORK_CHECKS, patient(faults.FAULTS[name]))
        reds = [f.check.name for f in found if f.result.level == RED]
        self.assertEqual(reds, [name.partition(",")[0]], [f.result.sentence for f in found])
        for each in found:
            if each.result.level == YELLOW:
                self.assertEqual(each.after, reds[0], each)


class OneCheckTest(parameterized.TestCase):
    """Checks that need no attack, one by one."""

    def look(self, name, logits_fn, **changes):
        (row,) = [row for row in NETWORK_CHECKS if row.name == name]
        return row.look(patient(logits_fn, **changes))

    def test_images_that_are_no_pixels(self):
        images, _ = faults.colours()
        seen = self.look("input-range", faults.healthy, images=255 * images)
        self.assertEqual(seen.level, RED)
        self.assertIn("divide by 255", seen.remedy)
        self.assertEqual(seen.cause, "attacks cannot use this data")

    def test_the_range_of_pixels_is_said(self):
        images, _ = faults.colours()
        dark = np.clip(images, 0.125, 0.75)
        sentence = self.look("input-range", faults.healthy, images=dark).sentence
        self.assertStartsWith(sentence, "images span [0.125, 0.75]; loss ")

    @sweeps.rows(
        ("label-order", "label-order", "classes shifted by -1"),
        ("label-order", "label-order, any", "output 0 is class"),
        ("channel-order", "channel-order", "BGR"),
        ("missing-normalisation", "missing-normalisation", "imagenet"),
        ("double-normalisation", "double-normalisation", "undone"),
    )
    def test_what_explains(self, name, fault, words):
        seen = self.look(name, faults.FAULTS[fault])
        self.assertEqual(seen.level, RED)
        self.assertIn(words, seen.sentence)

    @sweeps.rows(
        ("from 1", "classes shifted by -1", ()),
        ("names", "classes sorted by their names", ("pear", "Fig", "kiwi")),
        ("as text", "classes sorted by their numbers as text", ()),
    )
    def test_a_usual_order_with_one_image_a_class(self, order, words, names):
        """As of ImageNet's 1,000 classes, of which nobody wants to look at 4,000 images."""
        count, images = 40, np.random.default_rng(0).random((40, 4, 4, 3)).astype(np.float32)
        names = tuple(
            f"{name}{k % 7}{k}" for k, name in zip(range(count), 14 * names, strict=False)
        )
        means = jnp.asarray(images.mean(axis=(1, 2)))
        given = {
            "from 1": lambda z: jnp.roll(z, 1, axis=1),
            "names": lambda z: z[:, np.asarray(sorted(range(count), key=names.__getitem__))],
            "as text": lambda z: z[:, np.asarray(sorted(range(count), key=str))],
        }[order]

        def network(x):
            near = x.mean(axis=(1, 2))[:, None, :] - means[None]
            return given(-(near**2).sum(axis=2))

        labels = np.arange(count)
        how = {"images": images, "labels": labels, "classes": names}
        seen = self.look("label-order", network, **how)
        self.assertEqual(seen.level, RED)
        self.assertIn(words, seen.sentence)
        self.assertIn("100.0%", seen.sentence)

    def test_weights_of_arrays(self):
        images, _ = faults.colours()
        dark = images / 2
        seen = self.look("resizing", lambda x: faults.healthy(2 * x), arrays=dark)
        self.assertEqual(seen.level, RED)
        seen = self.look("resizing", faults.healthy, arrays=dark)
        self.assertEqual(seen.level, GREEN)

    def test_zeros_in_a_coarse_type(self):
        other = {"bfloat16": faults.quantised}
        seen = self.look("zero-gradients", faults.healthy, others=other)
        self.assertEqual(seen.level, YELLOW)
        self.assertEqual(seen.value["bfloat16"], 1.0)
        self.assertIn("search_dtype=bfloat16", seen.remedy)

    def test_saturated_is_not_masked(self):
        seen = self.look("zero-gradients", faults.saturated)
        self.assertEqual(seen.level, RED)
        self.assertIn("the softmax saturates", seen.cause)
        masked = self.look("zero-gradients", faults.quantised)
        self.assertEqual((masked.level, masked.cause), (RED, None))

    def test_no_radius_and_few_right(self):
        for name in ("dlr-against-ce", "pgd-against-noise", "radius"):
            self.assertEqual(
                self.look(name, faults.healthy, threat=Threat("linf", 0.0)).level, SKIPPED
            )
            wrong = faults.FAULTS["label-order"]
            self.assertEqual(self.look(name, wrong).level, SKIPPED)


class ExplanationsTest(absltest.TestCase):
    def test_a_permutation_is_judged_on_other_images(self):
        rng = np.random.default_rng(0)
        logits, labels = rng.normal(size=(80, 10)), rng.integers(0, 10, 80)
        order, judged = explanations.permutation(logits, labels)
        found = np.setdiff1d(np.arange(80), judged)
        self.assertEqual((len(judged), len(found)), (40, 40))
        right = order[logits.argmax(axis=1)] == labels
        self.assertLess(right[judged].mean(), 0.25)  # where it fits, chance gives more
        self.assertGreater(right[found].mean(), 0.25)

    def test_a_class_that_is_not_seen_stays(self):
        labels = np.arange(40) % 4
        order, _ = explanations.permutation(np.eye(10)[(labels + 1) % 4], labels)
        self.assertEqual(order.tolist(), [3, 0, 1, 2, *range(4, 10)])

    def test_the_loss_tells_what_few_verdicts_cannot(self):
        labels = np.zeros(100, int)
        before = np.stack([np.where(np.arange(100) < 15, -0.1, 0.3), np.zeros(100)], axis=1)
        wide = before + np.asarray([[1.0, 0]])  # 15 verdicts change, and all losses fall
        narrow = np.where(before < 0, 0.1, before)  # the same verdicts, and no other loss
        found = [explanations.compared("x", "y", before, z, labels) for z in (wide, narrow)]
        self.assertEqual([f.gain for f in found], [0.15, 0.15])
        self.assertGreater(found[0].deviations, 10)
        self.assertAlmostEqual(found[1].deviations, 15 / 15**0.5, delta=0.4)
