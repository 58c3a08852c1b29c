"""Threats and ladders of them, as flags write them."""

import numpy as np
from absl.testing import parameterized

from jaxrobust.runtime.commandline import threats
from jaxrobust.types import Threat
from tests.support import sweeps


class ThreatsTest(parameterized.TestCase):
    @sweeps.rows(
        ("linf:4/255", Threat("linf", 4 / 255)),
        (" L2 : 0.5 ", Threat("l2", 0.5)),
        ("l1:12", Threat("l1", 12.0)),
        ("l0:24", Threat("l0", 24.0)),
    )
    def test_a_threat(self, text, threat):
        self.assertEqual(threats.parse(text), threat)

    @sweeps.rows(
        ("l3:1", "--threat=l3:1: the norm 'l3' is unknown; choose one of linf, l2, l1"),
        ("4/255", "--threat=4/255: the norm '4/255' is unknown"),
        ("l2", "--threat=l2 has no radius; write l2:RADIUS"),
        ("l2:", "--threat=l2: has no radius"),
        ("linf:4", "--threat=linf:4: .*write 4/255"),
        ("l2:x", "--threat=l2:x: "),
        ("l0:0.5", "--threat=l0:0.5: epsilon=0.5 must be a whole number of pixels, such as 24"),
    )
    def test_no_threat(self, text, said):
        with self.assertRaisesRegex(ValueError, said):
            threats.parse(text)

    @sweeps.rows(("linf:0.1", 0.1), ("l2:2", 3), ("l1:75", 168.75), ("l0:25", 56))
    def test_a_radius_that_grows_with_the_image(self, text, epsilon):
        found = threats.grown(threats.parse(text), 336 / 224)
        self.assertAlmostEqual(found.epsilon, epsilon)

    def test_a_ladder_has_both_ends_and_equal_steps(self):
        found = threats.ladder("Linf:0:16/255:5")
        self.assertEqual({each.norm for each in found}, {"linf"})
        radii = [each.epsilon for each in found]
        np.testing.assert_allclose(radii, np.array([0, 4, 8, 12, 16]) / 255)
        self.assertLen(threats.ladder("l2:0.1:0.2:2"), 2)

    @sweeps.rows(
        ("l2:0:1", "has 3 parts; write NORM:LOW:HIGH:RADII"),
        ("l2:0:1:2:3", "has 5 parts"),
        ("l2:0:1:1", "'1' is not a number of radii above 1"),
        ("l2:0:1:-3", "'-3' is not a number of radii"),
        ("l2:1:0:3", "must start at the smallest"),
        ("l2:1:1:3", "must start at the smallest"),
        ("linf:0:16:3", "--ladder=linf:0:16:3: linf:16: "),
    )
    def test_no_ladder(self, text, said):
        with self.assertRaisesRegex(ValueError, said):
            threats.ladder(text)
