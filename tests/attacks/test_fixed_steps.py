"""Attacks of a fixed number of steps: how long a step is, what it costs, what a record says."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized

from jaxrobust.attacks import fixed_steps, registry
from jaxrobust.types import Threat
from tests.support import sweeps

# Four pixels in the middle of [0, 1], and two classes that they vote for with other weights.
IMAGES = np.full((1, 2, 2, 1), 0.5, np.float32)
VOTES = jax.tree_util.Partial(
    lambda x: x.reshape(len(x), 4) @ jnp.float32([[3, 0], [0, 3], [1, 0], [0, 1]])
)


class FixedStepsTest(parameterized.TestCase):
    @sweeps.rows(
        # FGSM goes to the edge; PGD's steps are 2.5 epsilon / K long.
        ("fgsm", {}, 0.2),
        ("pgd-4", {}, 0.125),
        ("pgd-4", {"relative": 2.0}, 0.1),
        ("pgd-4", {"step": 0.03}, 0.03),
        ("pgd-4", {"step": 0.0, "relative": 2.0}, 0.0),
        ("mim-4", {}, 0.05),
    )
    def test_length(self, name, given, expected):
        self.assertAlmostEqual(fixed_steps.parse(name).length(0.2, **given), expected)

    @sweeps.rows(("fgsm", 1), ("pgd-7", 7), ("cw-20", 20), ("margin-1", 1))
    def test_a_step_is_a_pass_forward_and_one_backward(self, name, steps):
        named = fixed_steps.parse(name)
        self.assertEqual((named.steps, named.forward, named.backward), (steps, steps, steps))

    def test_settings_say_what_was_given_or_the_attacks_own_start(self):
        pgd, threat = fixed_steps.parse("pgd-3"), Threat("l1", 12.0)
        own = {"name": "pgd", "norm": "l1", "epsilon": 12.0, "steps": 3, "step_size": 6.0}
        self.assertEqual(pgd.settings(threat, length=6.0), own | {"start": "random"})
        given = {"start": "image", "l1_rule": "coordinate"}
        self.assertEqual(pgd.settings(threat, length=6.0, **given), own | given)
        start = fixed_steps.parse("fgsm").settings(threat, length=6.0)["start"]
        self.assertEqual(start, "image")

    # The loss of class 0 grows with pixels 1 and 3, and falls with 0 and 2.
    @sweeps.rows(("fgsm", 0.2), ("pgd-1", 0.3), ("pgd-2", 0.1), ("margin-2", 0.1))
    def test_the_attack_makes_its_steps(self, name, length):
        named = fixed_steps.parse(name)
        settings = named.settings(Threat("linf", 0.2), length=length, start="image")
        points = fixed_steps.attack_of(settings)(VOTES, None, IMAGES, np.int32([0]))
        moved = min(length * named.steps, 0.2) * np.array([-1, 1, -1, 1])
        np.testing.assert_allclose(points.ravel(), 0.5 + moved, atol=1e-6)

    def test_the_rule_of_l1_is_the_one_of_the_settings(self):
        named, given = fixed_steps.parse("pgd-1"), {"start": "image", "l1_rule": "art"}
        settings = named.settings(Threat("l1", 0.2), length=0.2, **given)
        row = registry.ROWS["pgd"]
        made = mock.Mock()
        with mock.patch.dict(registry.ROWS, pgd=row._replace(make=made)):
            fixed_steps.attack_of(settings)
        self.assertEqual(made.call_args.kwargs["l1_rule"], "art")

    def test_a_floor_of_the_margin_stops_where_the_image_is_fooled(self):
        settings = fixed_steps.parse("cw-2").settings(Threat("linf", 0.2), length=0.1)
        attack = fixed_steps.attack_of(settings | {"start": "image"})
        points = attack(VOTES, None, IMAGES + np.float32([[0.0, 0.05]]).reshape(1, 1, 2, 1), [0])
        np.testing.assert_allclose(points.ravel(), [0.5, 0.55, 0.5, 0.55], atol=1e-6)

    def test_names(self):
        self.assertEqual(fixed_steps.written(), registry.written() + " (K steps)")
        self.assertIsNone(fixed_steps.parse("pgd"))
