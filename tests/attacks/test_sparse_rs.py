"""Sparse-RS against the authors' algorithm with the same draws, and its promises."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxrobust import attacks
from tests.support import sweeps
from tests.support.sparse_nets import COUNT, DRAW, IMAGES, LABELS, SIDE, W1, W2, net

sparse_rs = importlib.import_module("jaxrobust.attacks.sparse.sparse_rs")

PIXELS, QUERIES = 6, 50


def share(query, queries):
    """Return the share of the changed pixels that a query exchanges, of `alpha_init` 1."""
    at = int(query / queries * 10000)
    for least, divisor in (
        *((8000, 20), (6000, 15), (4000, 12), (2000, 10), (1000, 8)),
        *((500, 6), (200, 5), (50, 4), (0, 2)),
    ):
        if at > least:
            return 1 / divisor
    return 1


def searched(image, label, orders, corners):
    """Return the points of all queries of one image, with lists of pixels as the authors have them.

    A query exchanges the pixels of either list that come first in its order.
    """
    image, corners = image.reshape(-1, 3), corners.reshape(len(corners), -1, 3)
    by_order = lambda places, order: sorted(range(len(places)), key=lambda i: order[places[i]])  # noqa: E731
    pixels = np.argsort(orders[0])
    changed, others = list(pixels[:PIXELS]), list(pixels[PIXELS:])
    best, loss_best, points = image.copy(), None, []
    for query in range(QUERIES):
        new, count = best.copy(), PIXELS
        if query == 0:
            new[changed] = corners[0][changed]
        else:
            count = max(int(0.8 * share(query, QUERIES) * PIXELS), 1)
            out = by_order(changed, orders[query])[:count]
            into = by_order(others, orders[query])[:count]
            for i in out:
                new[changed[i]] = image[changed[i]]
            for i in into:
                colour = corners[query][others[i]]
                same = count == 1 and (colour == new[others[i]]).all()
                new[others[i]] = 1 - colour if same else colour
        points.append(new)
        logits = np.tanh(new.ravel() @ W1 / 4) @ W2
        loss = logits[label] - np.delete(logits, label).max()
        if loss_best is None or loss < loss_best or loss < -1e-6:
            best, loss_best = new, loss
            if query:
                for i, j in zip(out, into, strict=True):
                    changed[i], others[j] = others[j], changed[i]
    return np.stack(points).reshape(QUERIES, SIDE, SIDE, 3)


class SparseRsTest(parameterized.TestCase):
    @pytest.mark.slow
    def test_the_authors_search(self):
        """Points of 50 queries in float64; the machine does not stop at success, nor does this."""
        with jax.enable_x64(True):
            machine = attacks.sparse_rs_machine(pixels=PIXELS, queries=QUERIES, alpha_init=0.8)

            def step(state, _):
                draws = sparse_rs._draw(state.keys, state.iteration, state.images)
                after = attacks.advance(machine, lambda x, draw: net(x), state).state
                return after, (machine.query(state), *draws)

            keys = attacks.image_keys(jax.random.key(0), COUNT)
            state = machine.init(jnp.asarray(IMAGES), jnp.asarray(LABELS), keys=keys)
            scan = jax.jit(lambda state: jax.lax.scan(step, state, length=QUERIES))
            state, (points, orders, corners) = jax.device_get(scan(state))
        for i in range(COUNT):
            expected = searched(
                IMAGES[i], LABELS[i], orders[:, i].reshape(QUERIES, -1), corners[:, i]
            )
            np.testing.assert_allclose(points[:, i], expected, rtol=0, atol=1e-12)
        self.assertGreater(len(np.unique(np.abs(np.diff(points, axis=0)).sum((2, 3, 4)))), 100)

    @sweeps.rows((6, 50, 0.8), (150, 1000, 0.3), (20, 10000, 0.8), (3, 1, 0.3))
    def test_schedule(self, pixels, queries, alpha_init):
        expected = [
            max(int(alpha_init * share(query, queries) * pixels), 1) for query in range(queries)
        ]
        counts = sparse_rs.exchanged_pixels(pixels + 1, alpha_init)[pixels]
        np.testing.assert_array_equal(counts[sparse_rs.search_levels(queries)], expected)

    def test_pixels_queries_and_success(self):
        attack = attacks.sparse_rs(pixels=PIXELS, queries=200, info=True)
        run = jax.jit(lambda key, x, y: attack(net, key, x, y))
        points, info = run(jax.random.key(1), jnp.float32(IMAGES), jnp.asarray(LABELS))
        changed = np.asarray(points) != np.float32(IMAGES)
        self.assertLessEqual(changed.any(3).sum((1, 2)).max(), PIXELS)
        self.assertTrue(np.isin(np.asarray(points)[changed], (0, 1)).all())
        self.assertLessEqual(int(info.steps.max()), 200)
        np.testing.assert_array_equal(info.score <= 0, np.asarray(net(points)).argmax(1) != LABELS)
        stopped = np.asarray(info.steps) < 200
        np.testing.assert_array_equal(stopped, np.asarray(info.score) <= 0)
        # At random, one point an image.
        pixels = DRAW.random((COUNT, SIDE * SIDE)).argsort(1).reshape(COUNT, SIDE, SIDE, 1) < PIXELS
        once = np.where(pixels, DRAW.integers(0, 2, IMAGES.shape), IMAGES)
        fooled = (np.asarray(net(jnp.float32(once))).argmax(1) != LABELS).sum()
        self.assertGreater((info.score <= 0).sum(), 2 * fooled + 2)

    @parameterized.parameters(
        ("sparse_rs", {"pixels": PIXELS}, 0.53), ("square", {"epsilon": 0.1}, 0.53)
    )
    @pytest.mark.slow
    def test_a_goal_without_classes_that_rises(self, name, settings, least):
        """The image's mean, raised until it is done: not before the first query."""
        images = jnp.full((2, SIDE, SIDE, 3), 0.5)
        goal = attacks.Goal(
            lambda means, _: means[:, 0], lambda means, _: means[:, 0], lambda score: score >= least
        )
        attack = getattr(attacks, name)(**settings, queries=100, loss=goal, info=True)
        _, info = attack(lambda x: x.mean((1, 2)), jax.random.key(0), images, None)
        self.assertTrue((info.score >= least).all())
        self.assertTrue((info.steps < 100).all())
        self.assertTrue((info.steps > 1).any())

    @parameterized.parameters(
        ("sparse_rs", {"pixels": 3, "queries": 5}),
        ("ddn", {"steps": 3}),
        ("fmn", {"norm": "l0", "steps": 3}),
        ("fmn", {"norm": "l1", "steps": 3}),
    )
    @pytest.mark.slow
    def test_devices_do_not_matter(self, name, settings):
        """Nor does a `vmap` over seeds."""
        attack = functools.partial(getattr(attacks, name)(**settings), net)
        keys, images = attacks.image_keys(jax.random.key(2), COUNT), jnp.float32(IMAGES)
        expected = jax.jit(attack)(keys, images, LABELS)
        mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
        mapped = jax.shard_map(attack, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
        found = jax.jit(mapped)(keys, images, jnp.asarray(LABELS))
        np.testing.assert_allclose(found, expected, atol=1e-5)
        seeds = jax.vmap(lambda keys: attack(keys, images, LABELS))(keys[None])
        np.testing.assert_allclose(seeds[0], expected, atol=1e-5)

    @sweeps.rows(
        ({"pixels": 0}, "pixels=0 must be an int >= 1"),
        ({"pixels": 0.5}, "pixels=0.5 must be an int"),
        ({"pixels": 2, "queries": 0}, "queries=0 must be an int"),
        ({"pixels": 2, "alpha_init": 0}, "alpha_init=0 must be above 0 and at most 1, such as 0.3"),
        ({"pixels": 2, "loss": "dlr-targeted"}, "needs a target class per image"),
    )
    def test_refuses(self, settings, words):
        with self.assertRaisesRegex(ValueError, words):
            attacks.sparse_rs(**settings)

    def test_refuses_images_and_starts(self):
        images, keys = jnp.float32(IMAGES), attacks.image_keys(jax.random.key(0), COUNT)
        with self.assertRaisesRegex(
            ValueError, "pixels=64 must be less than the 64 pixels of an image"
        ):
            attacks.sparse_rs(pixels=64)(net, jax.random.key(0), images, LABELS)
        said = "only supports a random start; pass start='random' and keys"
        with self.assertRaisesRegex(ValueError, said):
            attacks.sparse_rs_machine(pixels=2).init(images, LABELS, keys=keys, start="image")


if __name__ == "__main__":
    absltest.main()
