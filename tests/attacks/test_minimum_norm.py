"""DDN and FMN against foolbox 3.3.4 in float64, and their promises."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from jaxrobust import attacks
from tests.support import paths, sweeps
from tests.support.golden import norm_in_float64

DRAW = np.random.default_rng(0)
COUNT, CLASSES = 16, 5
IMAGES = DRAW.random((COUNT, 6, 6, 3))
W1, W2 = DRAW.normal(size=(108, 32)) / 4, DRAW.normal(size=(32, CLASSES))
NORMS = ("l0", "l1", "l2", "linf")
FOOLBOX = {"l0": "L0FMNAttack", "l1": "L1FMNAttack", "l2": "L2FMNAttack", "linf": "LInfFMNAttack"}


def net(x):
    """Return logits f[B,5] of a small network."""
    w1, w2 = jnp.asarray(W1, x.dtype), jnp.asarray(W2, x.dtype)
    return jnp.tanh(x.reshape(len(x), -1) @ w1) @ w2


LABELS = np.asarray(net(jnp.float32(IMAGES)).argmax(1))


def size(delta, norm):
    """Compute the norm of each image's perturbation in float64."""
    delta = np.asarray(delta, np.float64).reshape(len(delta), -1)
    return (delta != 0).sum(1) if norm == "l0" else norm_in_float64(delta, norm)


@functools.cache
def found(name, norm, bits=32):
    """Return the final state, and of 40 steps the points, the scores and the norms so far."""
    with jax.enable_x64(bits == 64):
        # DDN: 1 + gamma and 1 - gamma are float32 numbers, as foolbox has them in float64 too.
        settings = {"norm": norm} if name == "fmn" else {"gamma": 1 / 16}
        machine = getattr(attacks, f"{name}_machine")(steps=40, **settings)

        def step(state, _):
            done = attacks.advance(machine, lambda x, draw: net(x), state)
            score = machine.score(state, done.outputs)
            return done.state, (machine.query(state), score, done.state.norm_best)

        images = jnp.asarray(IMAGES, jnp.float64 if bits == 64 else jnp.float32)
        state = machine.init(images, jnp.asarray(LABELS))
        return jax.device_get(jax.jit(lambda s: jax.lax.scan(step, s, length=40))(state))


class FoolboxTest(parameterized.TestCase):
    """Against the package itself."""

    def setUp(self):
        super().setUp()
        try:
            import torch

            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # it imports names that SciPy will remove
                import foolbox
        except ImportError:
            self.skipTest(paths.PARITY)
        self.foolbox, self.torch = foolbox, torch

    def theirs(self, attack):
        """Return of 40 steps the points and which fool the network, and the nearest point."""
        torch, queries, wrong = self.torch, [], []
        w1, w2 = torch.tensor(W1), torch.tensor(W2)

        class Net(torch.nn.Module):
            def forward(self, x):
                queries.append(x.detach().numpy().copy())
                logits = (x.flatten(1) @ w1).tanh() @ w2
                wrong.append(logits.argmax(1).numpy() != LABELS)
                return logits

        model = self.foolbox.PyTorchModel(Net().eval(), bounds=(0, 1), device="cpu")
        nearest, _, _ = attack(
            model, torch.tensor(IMAGES), torch.tensor(LABELS).long(), epsilons=None
        )
        return np.stack(queries[:40]), np.stack(wrong[:40]), nearest.numpy()

    def fmn(self, norm, *, corrected):
        """Make foolbox's FMN, with projections as the authors have them where its own differ."""
        attack = getattr(self.foolbox.attacks, FOOLBOX[norm])(steps=40)
        if corrected and norm == "l2":  # it multiplies by norm / norm

            def shorten(x, x0, epsilon):
                length = (x - x0).flatten(1).norms.l2(axis=-1).maximum(1e-12)
                return x0 + (x - x0) * (epsilon / length).minimum(1).reshape((-1, 1, 1, 1))

            attack.project = shorten
        if corrected and norm == "l0":  # it keeps one entry too many
            project = attack.project
            attack.project = lambda x, x0, epsilon: project(x, x0, epsilon - 1)
        return attack

    @pytest.mark.slow
    def test_ddn_points(self):
        attack = self.foolbox.attacks.DDNAttack(steps=40, gamma=1 / 16)
        points, _, nearest = self.theirs(attack)
        state, (queries, _, _) = found("ddn", "l2", 64)
        np.testing.assert_allclose(queries, points, rtol=0, atol=1e-9)
        np.testing.assert_allclose(state.adv, nearest, rtol=0, atol=1e-9)
        self.assertTrue(np.isfinite(state.norm_best).all())

    @parameterized.parameters(*NORMS)
    @pytest.mark.slow
    def test_fmn_points(self, norm):
        """Of the images for which its radius grows by more than gamma until one is found."""
        attack, radii = self.fmn(norm, corrected=True), []
        project = attack.project

        def recorded(x, x0, epsilon):
            radii.append(epsilon.raw.numpy())
            return project(x, x0, epsilon)

        attack.project = recorded
        points, wrong, nearest = self.theirs(attack)
        gamma = 0.001 + 0.049 * (1 + np.cos(np.pi * np.arange(1, 40) / 40)) / 2
        grows = np.stack(radii)[1:] >= (1 + gamma[:, None]) * np.stack(radii)[:-1]
        rows = (grows | np.logical_or.accumulate(wrong)[1:]).all(0)
        self.assertGreaterEqual(rows.sum(), {"l1": 4}.get(norm, 8))
        state, (queries, _, _) = found("fmn", norm, 64)
        np.testing.assert_allclose(queries[:2], points[:2], rtol=0, atol=1e-9)
        np.testing.assert_allclose(queries[:, rows], points[:, rows], rtol=0, atol=1e-9)
        distance = size(nearest - IMAGES, norm)  # of the points, some are equal
        np.testing.assert_allclose(state.norm_best[rows], distance[rows], rtol=0, atol=1e-9)

    @parameterized.product(norm=NORMS, corrected=(False, True))
    @pytest.mark.slow
    def test_fmn_is_no_farther(self, norm, corrected):
        _, _, nearest = self.theirs(self.fmn(norm, corrected=corrected))
        distance = size(nearest - IMAGES, norm).astype(float)
        distance[distance == 0] = np.inf  # nothing found
        state, _ = found("fmn", norm, 64)
        self.assertTrue(np.isfinite(state.norm_best).all())
        self.assertLessEqual(np.median(state.norm_best), 1.01 * np.median(distance))


class PropertyTest(parameterized.TestCase):
    @sweeps.fast("linf")
    @parameterized.parameters(("ddn", "l2"), *(("fmn", norm) for norm in NORMS))
    def test_nearest(self, name, norm):
        """It is the nearest of the queries that fool the network, in the box, of that norm."""
        state, (queries, scores, norms) = found(name, norm)
        distance = np.stack([size(points - np.float32(IMAGES), norm) for points in queries])
        distance = np.where(scores <= 0, distance, np.inf)
        np.testing.assert_allclose(norms, np.minimum.accumulate(distance), rtol=1e-5)
        np.testing.assert_allclose(state.norm_best, distance.min(0), rtol=1e-5)
        np.testing.assert_array_equal(
            state.adv,
            queries[norms.argmin(0), np.arange(COUNT)],  # the first of that norm
        )
        self.assertTrue(np.isfinite(state.norm_best).all())
        self.assertTrue(((queries >= 0) & (queries <= 1)).all())

    @sweeps.fast(0)
    @parameterized.parameters(("fmn", jnp.nan), ("ddn", 0.0), ("ddn", jnp.nan), ("fmn", 0.0))
    def test_nothing_found_and_no_gradient(self, name, output):
        """The image comes back, without NaN."""
        images, labels = jnp.full((2, 4, 4, 1), 0.25), jnp.zeros(2, jnp.int32)
        network = lambda x: jnp.full((2, 3), output) * (1 + 0 * x[:, 0, 0])  # noqa: E731
        run = functools.partial(getattr(attacks, f"{name}_run"), network, steps=2)
        state = jax.jit(run)(images, labels)
        np.testing.assert_array_equal(state.points, images)
        np.testing.assert_array_equal(state.adv, images)
        self.assertTrue(np.isinf(state.norm_best).all())

    @sweeps.fast("fmn")
    @parameterized.parameters("ddn", "fmn")
    def test_a_goal_without_classes(self, name):
        """The nearest image whose first feature has grown by 1."""
        embed = lambda x: {"features": x.reshape(len(x), -1) @ jnp.float32(W1)}  # noqa: E731
        grown = lambda outputs, clean: (outputs["features"] - clean)[:, 0]  # noqa: E731
        goal = attacks.Goal(
            lambda outputs, clean: grown(outputs, clean) - 1, grown, lambda score: score >= 1
        )
        images = jnp.float32(IMAGES)
        attack = getattr(attacks, name)(steps=30, loss=goal, info=True)
        points, info = jax.jit(functools.partial(attack, embed))(
            None, images, embed(images)["features"]
        )
        self.assertTrue(((info.score >= 0.999) & (info.score < 1.1)).all(), info.score)
        self.assertEqual(info.steps.tolist(), [30] * COUNT)
        self.assertEqual(points.shape, images.shape)

    @sweeps.rows(
        ({"loss": lambda outputs, targets: outputs[:, 0]}, r"pass loss=attacks.Goal\(loss, score"),
        ({"loss": "dlr-targeted"}, "needs a target class per image"),
        ({"gamma": 1}, "gamma=1 must be between 0 and 1, such as 0.05"),
        ({"steps": 0}, "steps=0 must be an int"),
    )
    def test_refuses(self, settings, words):
        for make in (attacks.ddn, attacks.fmn):
            with self.assertRaisesRegex(ValueError, words):
                make(**settings)

    def test_refuses_norms_steps_and_starts(self):
        with self.assertRaisesRegex(ValueError, "norm='l3' is unknown; choose one of l0, l1, l2"):
            attacks.fmn(norm="l3")
        with self.assertRaisesRegex(ValueError, "step_size=0 must be a finite"):
            attacks.fmn(norm="L0", step_size=0)
        with self.assertRaisesRegex(ValueError, "init_epsilon=0 must be above 0"):
            attacks.ddn(init_epsilon=0)
        with self.assertRaisesRegex(ValueError, "attacks start at the image; pass start='image'"):
            attacks.ddn_machine().init(jnp.float32(IMAGES), LABELS, start="random")


if __name__ == "__main__":
    absltest.main()
