"""The levels that the checks of attacks say they have, at both sides of each limit."""

from types import SimpleNamespace

import numpy as np
from absl.testing import parameterized

from jaxrobust.doctor.attack_checks import ATTACK_CHECKS
from jaxrobust.doctor.findings import GREEN, RED, SKIPPED, YELLOW, CheckResult
from tests.support import sweeps

RADIUS, GREY = 0.1, 0.5  # the latter is one at which all images can be the same gray


def margins(fooled: int, of: int = 100, before: int = 0) -> np.ndarray:
    """Margins after an attack: above 0 for `fooled` images behind the first `before`."""
    places = np.arange(of)
    return np.where((before <= places) & (places < before + fooled), 0.5, -0.5)


def slopes(zero: int) -> np.ndarray:
    """Largest gradients of 100 images; of those that move none every second is not a number."""
    values = np.ones(100)
    values[:zero:2], values[1:zero:2] = 0, np.nan
    return values


def look(name: str, **of_patient) -> CheckResult:
    (check,) = [check for check in ATTACK_CHECKS if check.name == name]
    about = {"threat": SimpleNamespace(epsilon=RADIUS), "attacked": np.arange(100)}
    about |= {"without_gradient": None, "logits": np.zeros((100, 3)), "everything": GREY}
    return check.look(SimpleNamespace(**(about | of_patient)))


class AttackChecksTest(parameterized.TestCase):
    @sweeps.rows(
        (1, 0, GREEN, "zero for 1.0% (float32), 0.0% (bfloat16) of 100 images"),
        (
            2,
            0,
            RED,
            "the margin's gradient is zero for 1.0%",
        ),  # half of the share is not below its half
        (4, 0, RED, "the margin's gradient is zero for 1.0%"),
        (0, 10, GREEN, "zero for 0.0% (float32), 10.0% (bfloat16)"),
        (0, 11, YELLOW, "11.0% (bfloat16)"),
    )
    def test_zero_gradients(self, float32, bfloat16, level, said):
        zero = {("ce", "float32"): float32, ("ce", "bfloat16"): bfloat16, ("cw", "float32"): 1}
        found = look(
            "zero-gradients",
            others=("bfloat16",),
            slopes=lambda loss, dtype: slopes(zero[loss, dtype]),
        )
        self.assertEqual(found.level, level)
        self.assertIn(said, found.sentence)
        saturated = "the softmax saturates" in (found.cause or "")
        self.assertEqual(saturated, float32 == 4)

    def test_a_network_without_a_derivative(self):
        found = look("zero-gradients", without_gradient="Pure callbacks")
        self.assertEqual(found.level, RED)
        self.assertEqual(found.sentence, "the network cannot be differentiated: Pure callbacks")
        self.assertEqual(found.cause, "a callback, or an operation without a derivative")
        self.assertStartsWith(found.remedy, "write that operation in JAX, or give it a derivative")
        self.assertIsNone(found.value)

    # Of 12 images that one loss alone fools, all are 3.46 times what chance moves; of 13, 3.6.
    @sweeps.rows(
        (0, 12, 0, GREEN),
        (0, 13, 0, RED),
        (0, 10, 60, GREEN),  # 10 points are not more than 10
        (5, 25, 0, RED),  # 20 of 30: 3.65 times
        (6, 24, 0, GREEN),  # 18 of 30: 3.29 times
        (30, 0, 0, GREEN),
        (31, 0, 5, YELLOW),
    )
    def test_dlr_against_ce(self, only_ce, only_dlr, both, level):
        ce, dlr = only_ce + both, only_dlr + both
        by = {"ce": margins(ce), "dlr": margins(dlr, before=only_ce)}
        found = look("dlr-against-ce", after_pgd=lambda epsilon, loss: by[loss])
        self.assertEqual(found.level, level, found.sentence)
        expected = (
            f"{1 - ce / 100:.1%} of images withstand PGD with CE, {1 - dlr / 100:.1%} with DLR"
        )
        self.assertEqual(found.sentence, expected)

    @sweeps.rows((15, GREEN), (16, YELLOW), (33, YELLOW), (34, RED))
    def test_pgd_against_noise(self, closer, level):
        noise = margins(0)
        noise[:closer] += 0.1
        found = look("pgd-against-noise", after_pgd=lambda epsilon: margins(0), after_noise=noise)
        self.assertEqual((found.level, found.value), (level, {"noise is better": closer / 100}))
        same = margins(50)
        found = look("pgd-against-noise", after_pgd=lambda epsilon: same, after_noise=same)
        self.assertEqual(found.level, GREEN)  # as close is not closer
        self.assertIn("PGD fools 50.0%, noise of the same size 50.0%", found.sentence)

    @sweeps.rows(
        ({0.05: 50, 0.1: 50, 0.2: 60, GREY: 86}, GREEN),
        ({0.05: 50, 0.1: 50, 0.2: 60, GREY: 84}, YELLOW),
        ({0.05: 50, 0.1: 50, 0.2: 60, GREY: 69}, RED),
        ({0.05: 50, 0.1: 41, 0.2: 60, GREY: 100}, GREEN),  # 9 of 9 are 3 times what chance is
        ({0.05: 50, 0.1: 40, 0.2: 60, GREY: 100}, RED),
        ({0.05: 50, 0.1: 50, 0.2: 60, GREY: 50}, RED),
    )
    def test_radius(self, fooled, level):
        found = look("radius", after_pgd=lambda epsilon: margins(fooled[round(epsilon, 3)]))
        self.assertEqual(found.level, level, found.sentence)
        self.assertEqual(found.value, {f"{r:.4g}": 1 - n / 100 for r, n in fooled.items()})

    def test_no_radius_above_the_one_of_all(self):
        asked = []
        look("radius", everything=0.15, after_pgd=lambda e: asked.append(e) or margins(100))
        np.testing.assert_allclose(asked, [0.05, 0.1, 0.15])
        asked.clear()
        look("radius", everything=0.2, after_pgd=lambda e: asked.append(e) or margins(100))
        np.testing.assert_allclose(asked, [0.05, 0.1, 0.2])  # each once

    @sweeps.rows(
        ({"threat": SimpleNamespace(epsilon=0.0)}, "the radius is 0"),
        ({"without_gradient": "it rounds"}, "cannot be differentiated"),
        ({"attacked": np.arange(15)}, "only 15 clean images are classified correctly"),
        ({"logits": np.zeros((100, 2))}, "DLR needs three classes"),
    )
    def test_skipped(self, about, said):
        found = look("dlr-against-ce", **about)
        self.assertEqual(found.level, SKIPPED)
        self.assertIn(said, found.sentence)

    def test_16_images_are_enough(self):
        found = look(
            "dlr-against-ce", attacked=np.arange(16), after_pgd=lambda epsilon, loss: margins(1, 16)
        )
        self.assertEqual(found.level, GREEN)
