"""One step of any machine, the rows of all attacks, and an attack that is added to them."""

import itertools
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from jaxrobust import attacks
from jaxrobust.attacks import machine, registry
from jaxrobust.attacks.ensembles import VERSIONS
from jaxrobust.evaluation import autoattack
from jaxrobust.types import Machine
from tests.support import sweeps
from tests.support.ensemble import IMAGES, LABELS, NETS


class CornerState(NamedTuple):
    images: jax.Array
    labels: jax.Array
    epsilon: jax.Array
    points: jax.Array
    told: jax.Array


def corner_machine(epsilon) -> Machine:
    """One step to the corner of the ball that the gradient points to: an attack in 30 lines."""

    def init(images, labels, *, keys=None, targets=None, start="image"):
        del keys, targets, start
        one_each = images.reshape(len(images), -1)[:, 0]
        radius = jnp.full_like(one_each, epsilon)
        return CornerState(images, labels, radius, images, jnp.zeros_like(labels))

    def tell(state, loss, score, gradient):
        del loss, score
        step = state.epsilon[:, None, None, None] * jnp.sign(gradient)
        points = jnp.clip(state.images + step, 0, 1)
        return state._replace(points=points, told=state.told + 1)

    return Machine(
        init=init,
        query=lambda state: state.points,
        loss=lambda state, logits: attacks.ce_loss(logits, state.labels),
        tell=tell,
        finished=lambda state: state.told > 1,
        result=lambda state: state.points,
    )


FACTS = registry.MachineFacts(
    machine="corner",
    make=lambda setting, epsilon: corner_machine(epsilon),
    rule="to the corner",
    starts=("image",),
    least={"steps": 1},
)


class RowsTest(parameterized.TestCase):
    @pytest.mark.slow
    def test_an_attack_is_one_file_and_one_entry(self):
        """It runs in the engine and as an attack, with the same points."""
        with mock.patch.dict(attacks.ROWS), mock.patch.dict(attacks.MACHINES):
            registry.add(
                FACTS,
                registry.NamedAttack("corner", "a corner", FACTS, registry.StandardSettings(77, 1)),
            )
            result = autoattack(
                NETS["lin"],
                IMAGES[:24],
                LABELS[:24],
                norm="linf",
                epsilon=0.01,
                version="custom",
                attacks=("corner",),
                batch_size=8,
                verbose=False,
            )
        fgsm = attacks.fgsm(epsilon=0.01)
        images, labels = jnp.asarray(IMAGES[:24]), jnp.asarray(LABELS[:24])
        expected = fgsm(NETS["lin"], None, images, labels)
        fooled = result.clean & ~result.robust
        self.assertTrue(fooled.any())
        np.testing.assert_allclose(result.images_adv[fooled], expected[fooled], atol=1e-6)
        standing = np.asarray(NETS["lin"](expected)).argmax(1) == LABELS[:24]
        np.testing.assert_array_equal(standing & result.clean, result.robust)
        self.assertNotIn("corner", registry.searching())

    def test_numbers_are_an_attacks_own(self):
        numbers = [own.number for _, own in registry.searching().values()]
        self.assertLen(set(numbers), len(numbers))
        # For ever: verdicts of ledgers on disk depend on them.
        fixed = {"apgd-ce": 0, "apgd-dlr": 1, "apgd-t": 2, "fab": 3, "fab-t": 4, "square": 5}
        self.assertContainsSubset(
            fixed.items(),
            {name: own.number for name, (_, own) in registry.searching().items()}.items(),
        )

    def test_versions_name_what_is_there(self):
        self.assertContainsSubset(set(itertools.chain(*VERSIONS.values())), registry.searching())

    @sweeps.rows(("apgd", 2, 5), ("apgd", 10, 21), ("pgd", 2, 4), ("pgd", 10, 20), ("fgsm", 9, 2))
    def test_passes_of_training(self, name, steps, passes):
        """2K + 1 with APGD's last forward pass, 2K without, 2 for a single step."""
        self.assertEqual(attacks.passes(name, steps), passes)


class AdvanceTest(absltest.TestCase):
    def setUp(self):
        super().setUp()
        self.machine = corner_machine(0.1)
        images, labels = jnp.asarray(IMAGES[:2]), jnp.asarray(LABELS[:2])
        self.state = self.machine.init(images, labels)

    def test_the_points_that_were_asked_are_returned(self):
        made = attacks.advance(self.machine, lambda x, draw: NETS["lin"](x), self.state)
        np.testing.assert_array_equal(made.points, self.state.points)
        np.testing.assert_array_equal(made.outputs, NETS["lin"](self.state.points))
        self.assertGreater(float(jnp.abs(made.state.points - made.points).max()), 0.09)

    def test_the_gradient_is_the_mean_over_the_draws_and_the_votes_their_sum(self):
        scales = jnp.asarray([0.5, 1.0, 4.0])
        each = [
            attacks.advance(self.machine, lambda x, draw, s=s: s * NETS["lin"](x), self.state)
            for s in scales
        ]
        made = attacks.advance(
            self.machine,
            lambda x, draw: scales[draw] * NETS["lin"](x),
            self.state,
            draws=3,
            tally=lambda logits: logits[:, 0],
        )
        mean = np.mean([own.gradient for own in each], axis=0)
        np.testing.assert_allclose(made.gradient, mean, rtol=1e-5, atol=1e-6 * np.abs(mean).max())
        np.testing.assert_allclose(made.votes, sum(own.outputs[:, 0] for own in each), rtol=1e-5)
        np.testing.assert_allclose(made.outputs, each[-1].outputs, rtol=1e-6)

    def test_a_last_evaluation_has_no_gradient(self):
        made = attacks.advance(
            self.machine, lambda x, draw: NETS["lin"](x), self.state, gradient=False
        )
        np.testing.assert_array_equal(made.gradient, 0)
        np.testing.assert_array_equal(made.state.points, self.state.points)

    @pytest.mark.slow
    def test_a_check_asks_again_with_a_draw_of_its_own(self):
        seen = []

        def network(points, draw):
            seen.append(draw)
            return NETS["lin"](points)

        own = attacks.fab_machine(norm="linf", epsilon=0.1, steps=1, targeted=False)
        state = own.init(self.state.images, self.state.labels)
        made = attacks.advance(own, network, state)
        self.assertEqual(seen, [0, 1])
        np.testing.assert_array_equal(made.points, own.query(made.queried))


class TallyTest(parameterized.TestCase):
    """What draws of a randomized network say, against the same counted one by one."""

    LOGITS = np.float32(
        [
            [[2.0, 1.0, 0.0], [0.0, 1.0, 1.0], [np.nan, 0.0, 5.0], [1.0, 1.0, 0.5]],
            [[2.0, 3.0, 0.0], [0.0, 3.0, 1.0], [0.0, 0.0, 5.0], [np.inf, 1.0, 0.5]],
            [[2.0, 1.5, 0.0], [0.0, 1.0, 4.0], [0.0, 0.0, 5.0], [3.0, 1.0, 0.5]],
        ]
    )  # [draws, images, classes]
    LABELS = jnp.int32([0, 1, 2, 0])

    def test_majority(self):
        rule = machine.TALLIES["majority"]
        votes = [np.asarray(rule.of(jnp.asarray(one), self.LABELS)) for one in self.LOGITS]
        expected = [
            [float(not (np.isfinite(row).all() and row.argmax() == label)) for row, label in pairs]
            for pairs in (list(zip(one, self.LABELS, strict=True)) for one in self.LOGITS)
        ]
        np.testing.assert_array_equal(votes, expected)
        share = jnp.float32([0.0, 0.5, 0.75, 1.0])
        excess = np.asarray(rule.excess(share, self.LABELS))
        self.assertEqual((excess >= 0).tolist(), [False, True, True, True])
        np.testing.assert_allclose(excess, [-0.5, 0, 0.25, 0.5])

    def test_mean(self):
        rule = machine.TALLIES["mean"]
        finite = np.nan_to_num(self.LOGITS, nan=0.0, posinf=9.0)
        sums = sum(np.asarray(rule.of(jnp.asarray(one), self.LABELS)) for one in finite)
        shares = np.exp(finite) / np.exp(finite).sum(2, keepdims=True)
        np.testing.assert_allclose(sums, shares.sum(0), rtol=1e-5)
        mean = shares.mean(0)
        expected = [
            max(np.delete(row, label)) - row[label]
            for row, label in zip(mean, self.LABELS, strict=True)
        ]
        found = rule.excess(jnp.asarray(mean, jnp.float32), self.LABELS)
        np.testing.assert_allclose(found, expected, rtol=1e-4)
        broken = jnp.float32([[np.nan, 0.5, 0.5]])
        self.assertEqual(float(rule.excess(broken, jnp.int32([0]))[0]), 0)


class NewAttacksTest(parameterized.TestCase):
    """FAB and Square as attacks: in the ball, and no weaker than what they are made of."""

    @sweeps.rows(("linf", "square"), ("l2", "fab"), ("l1", "square"))
    def test_stays_in_ball_and_box(self, norm, name):
        epsilon = {"linf": 0.02, "l2": 0.5, "l1": 8.0}[norm]
        more = {"fab": {"steps": 5}, "square": {"queries": 30}}[name]
        attack = getattr(attacks, name)(norm=norm, epsilon=epsilon, **more)
        images, labels = jnp.asarray(IMAGES[:16]), jnp.asarray(LABELS[:16])
        found = jax.jit(lambda k, x, y: attack(NETS["lin"], k, x, y))(
            jax.random.key(0), images, labels
        )
        delta = np.abs(np.asarray(found - images, np.float64).reshape(16, -1))
        norms = {"linf": delta.max(1), "l2": np.sqrt((delta**2).sum(1)), "l1": delta.sum(1)}[norm]
        self.assertLessEqual(norms.max(), epsilon * (1 + 1e-5) + 1e-6)
        self.assertBetween(float(found.min()), 0, 1)
        self.assertBetween(float(found.max()), 0, 1)
        before = np.asarray(NETS["lin"](images)).argmax(1) == LABELS[:16]
        after = np.asarray(NETS["lin"](found)).argmax(1) == LABELS[:16]
        self.assertLess(after.sum(), before.sum())

    @sweeps.rows(("fab", {}), ("square", {}), ("apgd", {"steps": 2}), ("pgd", {"steps": 2}))
    def test_no_images(self, name, more):
        attack = getattr(attacks, name)(epsilon=0.1, **more)
        none = jnp.zeros((0, 4, 4, 3))
        labels = jnp.zeros(0, jnp.int32)
        self.assertEqual(attack(NETS["lin"], jax.random.key(0), none, labels).shape, none.shape)


class NearestTest(parameterized.TestCase):
    @sweeps.rows(
        ([2.0, 1.0, 3.0], 1),
        ([2.0, 1.0, 1.0], 1),  # of equal ones the first, as of `argmin`
        ([0.0, 0.0, 0.0], 0),
        ([3.0, np.nan, 1.0], 1),  # not a number is the least
        ([np.nan, 0.0, np.nan], 0),
        ([np.inf, np.inf, 7.0], 2),
    )
    def test_the_class_and_its_own_gradient(self, distances, expected):
        table = jnp.float32([distances, [5.0, 4.0, 0.5]])
        slopes = jnp.float32([[1.0, 10.0], [2.0, 20.0], [3.0, 30.0]])  # of each class, two pixels
        nearest = SimpleNamespace(
            distance=lambda state, values, gradient, which: jnp.take(table, which, axis=1),
            query=lambda state: state,
        )
        losses = jnp.float32([[0, 1, 2], [10, 11, 12]])
        loss, found = machine.nearest(
            nearest, jnp.zeros((2, 2)), losses, lambda weights: (weights @ slopes,)
        )
        self.assertEqual(loss.tolist(), [expected, 12])
        np.testing.assert_array_equal(found, slopes[jnp.array([expected, 2])])
