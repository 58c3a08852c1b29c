"""Square against auto-attack a392200, by its own draws and in distribution, and its promises."""

import functools
import importlib
import itertools
import math
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from jaxrobust import attacks
from jaxrobust.attacks.geometry import square_proposals as square_geometry
from jaxrobust.attacks.geometry.square_windows import template_of, window_levels, window_table
from tests.support import paths, sweeps
from tests.support.golden import assert_within, golden_nets, load, norm_in_float64
from tests.support.machines import told

square = importlib.import_module("jaxrobust.attacks.square")  # `attacks.square` is the attack

NORMS = ("linf", "l2", "l1")
EPSILON = {"linf": 8 / 255, "l2": 0.5, "l1": 12.0}
REFERENCE = {"linf": "Linf", "l2": "L2", "l1": "L1"}  # our names for its
NETS = golden_nets()


def golden():
    return load(paths.GOLDEN / "attacks/square.npz")


def windows(norm, shape, queries=5000):
    return window_table(norm, window_levels(queries, False), 0.8, shape)


class ScheduleTest(parameterized.TestCase):
    @sweeps.rows(*itertools.product(("linf", "l2", "l1"), (32, 224)))
    def test_sides(self, norm, size):
        expected = golden()[f"s_{'linf' if norm == 'linf' else 'l2l1'}_h{size}"]
        table = windows(norm, (size, size))
        np.testing.assert_array_equal(table.sides[table.levels], expected)

    @sweeps.rows(False, True)
    def test_fractions(self, rescale):
        expected = golden()[f"p_nq5000_resc{rescale:d}"]
        np.testing.assert_array_equal(0.8 / 2.0 ** window_levels(5000, rescale), expected)

    @sweeps.rows(*itertools.product(("l2", "l1"), (3, 5, 6, 7, 9, 15, 21, 29)))
    def test_templates(self, norm, side):
        expected = golden()[f"eta_{REFERENCE[norm]}_s{side}"]
        np.testing.assert_allclose(template_of(norm, side), expected, atol=1e-7, rtol=0)

    @parameterized.parameters(*NORMS)
    @pytest.mark.slow
    def test_against_the_reference(self, norm):
        try:
            import pyautoattack.square as reference
        except ImportError:
            self.skipTest(paths.PARITY)
        for queries, p_init, rescale in ((5000, 0.8, False), (777, 0.3, True), (20000, 0.5, True)):
            theirs = reference.SquareAttack(
                None, p_init=p_init, n_queries=queries, norm=REFERENCE[norm], resc_schedule=rescale
            )
            levels = window_levels(queries, rescale)
            expected = [theirs.p_selection(i) for i in range(queries)]
            np.testing.assert_array_equal(p_init / 2.0**levels, expected)
        if norm != "linf":
            for side in range(2, 24):
                expected = theirs.eta(side).abs()  # turned at random, or not
                ours = np.abs(template_of(norm, side))
                error = min(np.abs(o - expected.numpy()).max() for o in (ours, ours.T))
                self.assertLess(error, 1e-7)


# --- Runs with the reference's draws ---


def scripted_draws(g, norm):
    """The golden draws of a start and of the queries, as ours."""
    name = f"scr_{REFERENCE[norm]}"
    batch = len(g["scr_y"])
    as_float, as_int = (functools.partial(jnp.asarray, dtype=d) for d in (jnp.float32, jnp.int32))
    if norm == "linf":
        start = square_geometry.StartDraws(
            signs=as_float(g[f"{name}_init_signs_ncw"].transpose(0, 2, 1)),
            across=jnp.zeros((batch, 0), bool),
        )
        offsets = np.pad(g[f"{name}_vh_vw"], ((0, 0), (0, 2)))
        signs = np.repeat(g[f"{name}_signs_c"][:, None], batch, axis=1)
        across = np.zeros(len(offsets), bool)
    else:

        def turned(eta, side):
            return not np.allclose(eta[:side, :side], template_of(norm, side), atol=1e-6)

        start = square_geometry.StartDraws(
            signs=as_float(g[f"{name}_init_signs_tile_nc"].swapaxes(0, 1)),
            across=jnp.tile(
                np.array([turned(eta, 6) for eta in g[f"{name}_init_eta_tiles"]]), (batch, 1)
            ),
        )
        offsets, signs = g[f"{name}_vh_vw_vh2_vw2"], g[f"{name}_signs_nc"]
        pairs = zip(g[f"{name}_eta"], g[f"{name}_eta_s"], strict=True)
        across = np.array([turned(eta, side) for eta, side in pairs])
    queries = square_geometry.SquareDraws(
        offsets=as_int(np.repeat(offsets[:, None], batch, axis=1)),
        signs=as_float(signs),
        across=jnp.asarray(np.repeat(across[:, None], batch, axis=1)),
    )
    return start, queries


def scripted_run(g, norm):
    """31 evaluations with the golden draws: the final state; each point, its margin, the best."""
    start, queries = scripted_draws(g, norm)
    geometry = square_geometry.PROPOSALS[norm]._replace(draw_start=lambda keys, images: start)

    def draw_query(state, side):
        del side
        return jax.tree.map(lambda a: a[jnp.clip(state.iteration[0] - 1, 0, 29)], queries)

    def run(images, labels):
        machine = attacks.square_machine(norm=norm, epsilon=EPSILON[norm], queries=30)

        def body(state, _):
            points = machine.query(state)
            logits = NETS["conv"](points)
            state = told(machine, state, logits)
            return state, (points, -attacks.cw_loss(logits, labels), state.x_best)

        keys = attacks.image_keys(jax.random.key(0), len(labels))
        state, seen = jax.lax.scan(body, machine.init(images, labels, keys=keys), length=31)
        return (machine.result(state), *seen)

    with (
        mock.patch.object(square_geometry, "draw_query", draw_query),
        mock.patch.dict(square_geometry.PROPOSALS, {norm: geometry}),
    ):
        images = jnp.asarray(g["scr_x_u8"].astype(np.float32) / np.float32(255))
        return map(np.asarray, jax.jit(run)(images, jnp.asarray(g["scr_y"], jnp.int32)))


class ScriptedCase(parameterized.TestCase):
    """30 queries with the reference's draws lead where it went; no tests of its own."""

    def check(self, g, norm):
        name = f"scr_{REFERENCE[norm]}"
        result, points, margins, x_best = scripted_run(g, norm)
        expected = g[f"{name}_margin_eval"]
        # Bit for bit but for sums: of the network, and of masses on L2 and L1.
        assert_within(margins, expected, 1e-5)
        assert_within(points[g[f"{name}_x_eval_at"]], g[f"{name}_x_eval"], 1e-5)
        assert_within(result, g[f"{name}_x_best_final"], 1e-5)
        best = np.minimum.accumulate(expected, axis=0)
        accepted = (x_best[1:] != x_best[:-1]).any(axis=(2, 3))
        # A window that was drawn again proposes the best point once more, but for its last bits:
        # which of the two margins is smaller the rounding of the network's sums decides.
        decided = np.abs(expected[1:] - best[:-1]) > 2e-5
        agree = accepted == (best[1:] < best[:-1])
        np.testing.assert_array_equal(agree[decided], True)
        self.assertGreater(decided.mean(), 0.9)
        self.assertGreater((accepted & decided).mean(), 0.1)
        if norm == "linf":  # its arithmetic has no sums
            same = agree.all(axis=0)
            self.assertGreater(same.mean(), 0.5)
            np.testing.assert_array_equal(result[same], g[f"{name}_x_best_final"][same])


class ScriptedTest(ScriptedCase):
    @parameterized.parameters(*NORMS)
    def test_golden(self, norm):
        self.check(golden(), norm)


@pytest.mark.slow
class FullScriptedTest(ScriptedCase):
    @parameterized.parameters(*NORMS)
    def test_golden_in_full(self, norm):
        if not (paths.SHARED / "golden/square.npz").exists():
            self.skipTest(paths.NO_SHARED)
        g = load(paths.SHARED / "golden/square.npz")
        self.check(g | {"scr_x_u8": np.round(g["scr_x"] * 255).astype(np.uint8)}, norm)


@pytest.mark.matrix
class DistributionTest(parameterized.TestCase):
    """As strong as the reference, image by image, within what seeds change."""

    @parameterized.parameters(*NORMS)
    def test_in_full(self, norm):
        g, name = golden(), f"dist_{REFERENCE[norm]}"
        if not (paths.SHARED / "golden/data.npz").exists():
            self.skipTest(paths.NO_SHARED)
        data = load(paths.SHARED / "golden/data.npz")
        images, labels = jnp.asarray(data["x"]), jnp.asarray(data["labels"], jnp.int32)
        count = len(images)
        queries = int(g[f"{name}_n_queries"])

        @jax.jit
        def run(key):
            return attacks.square_run(
                NETS["conv"],
                images,
                labels,
                norm=norm,
                epsilon=EPSILON[norm],
                queries=queries,
                key=key,
            )

        clean = np.asarray(attacks.cw_loss(NETS["conv"](images), labels)) < 0
        expected = g[f"{name}_robust"]
        majority = expected.mean(axis=0) > 0.5
        used = g[f"{name}_nqueries_used"].mean(axis=1)
        for seed in range(3):
            state = run(jax.random.key(seed))
            robust = clean & (np.asarray(state.margin_best) > 0)
            # Its own seeds differ in up to 3 images from each other; here windows are per image.
            fractions = expected.mean(axis=1)
            self.assertBetween(
                robust.mean(), fractions.min() - 2 / count, fractions.max() + 2 / count
            )
            self.assertLessEqual((robust != majority).sum(), 6 if norm == "l1" else 4)
            spent = np.where(clean, state.iteration, 0).mean()
            self.assertBetween(spent, 0.95 * used.min(), 1.05 * used.max())


def small_net(shape, classes=5):
    """A smooth function of all pixels, with random labels and images, a third saturated."""
    size = math.prod(shape)
    w1, w2 = (
        jax.random.normal(jax.random.key(i), s) for i, s in enumerate(((size, 16), (16, classes)))
    )
    images = jax.random.uniform(jax.random.key(2), (16, *shape))
    images = jnp.where(jax.random.uniform(jax.random.key(4), images.shape) < 0.3, 1.0, images)
    images = images.at[1].set(0.0)
    net = lambda x: jnp.sin(x.reshape(len(x), -1) @ w1 / math.sqrt(size) * 4) @ w2  # noqa: E731
    labels = jnp.argmax(net(images), axis=1).astype(jnp.int32)
    return net, images, labels


SMALL = {"linf": 0.02, "l2": 0.1, "l1": 0.4}  # some images fall early, some late, some never


class PropertyTest(parameterized.TestCase):
    """What holds for any network."""

    def trace(self, norm, shape, epsilon, queries=40, key=0):
        net, images, labels = small_net(shape)
        machine = attacks.square_machine(norm=norm, epsilon=epsilon, queries=queries)

        @jax.jit
        def run(images, labels):
            def body(state, _):
                points = machine.query(state)
                state = told(machine, state, net(points))
                return state, (points, state.margin_best, machine.result(state))

            keys = attacks.image_keys(jax.random.key(key), len(images))
            return jax.lax.scan(body, machine.init(images, labels, keys=keys), length=queries + 1)

        state, seen = run(images, labels)
        return net, images, labels, state, [np.asarray(s) for s in seen]

    @sweeps.fast(3, 5, 0)
    @parameterized.product(norm=NORMS, shape=((13, 8, 3), (3, 4, 1)))
    def test_stays_in_ball_and_box(self, norm, shape):
        epsilon = {"linf": 0.1, "l2": 0.7, "l1": 3.0}[norm]
        net, images, labels, _, (points, margins, results) = self.trace(norm, shape, epsilon)
        for x in (points, results):
            # L1 projects without a clip; `result` has one.
            slack = 3e-7 if norm == "l1" and x is points else 0
            self.assertTrue((x >= -slack).all() and (x <= 1 + slack).all())
            delta = (x.astype(np.float64) - np.asarray(images)).reshape(-1, *shape)
            norms = norm_in_float64(delta, norm)
            np.testing.assert_array_less(norms, epsilon * (1 + 1e-5) + 1e-6)
        # The margin is that of the result, and never rises.
        self.assertTrue((np.diff(margins, axis=0) <= 0).all())
        self.assertLess(margins[-1].mean(), margins[0].mean())
        np.testing.assert_allclose(
            margins[-1], -attacks.cw_loss(net(results[-1]), labels), atol=1e-5
        )

    @sweeps.rows(*NORMS)
    def test_zero_radius_is_identity(self, norm):
        _, images, _, _, (points, _, results) = self.trace(norm, (8, 8, 3), 0.0, queries=3)
        np.testing.assert_array_equal(results, np.broadcast_to(images, results.shape))
        np.testing.assert_allclose(points, results, atol=3e-7, rtol=0)

    def test_of_equal_margins_the_first_point_stays(self):
        images, labels = jnp.full((2, 4, 4, 1), 0.5), jnp.zeros(2, jnp.int32)
        machine = attacks.square_machine(norm="linf", epsilon=0.1, queries=5)
        logits = jnp.array([[2.0, 1.0], [3.0, 0.0]])

        @jax.jit
        def twice(key):
            state = machine.init(images, labels, keys=attacks.image_keys(key, 2))
            first = told(machine, state, logits)
            second = told(machine, first, logits - jnp.array([[0.0, 0.0], [1.0, 0.0]]))
            return (second.x_best == first.x_best).all((1, 2))

        self.assertEqual(twice(jax.random.key(1)).tolist(), [True, False])

    @sweeps.fast("l2")
    @parameterized.parameters("linf", "l2")  # L1 draws as L2 does
    def test_draws_do_not_depend_on_the_batch(self, norm):
        keys = attacks.image_keys(jax.random.key(5), 64)
        images = small_net((8, 8, 3))[1][:1]
        seen = []
        for batch in (1, 7, 64):
            many = jnp.tile(images, (batch, 1, 1, 1))
            machine = attacks.square_machine(norm=norm, epsilon=0.1, queries=5)

            @jax.jit
            def draw(images, keys, machine=machine):
                labels = jnp.zeros_like(images[:, 0, 0, 0], jnp.int32)
                state = machine.init(images, labels, keys=keys)
                start = square_geometry.PROPOSALS[norm].draw_start(state.keys, images)
                state = state._replace(iteration=jnp.arange(len(images), dtype=jnp.int32) % 5 + 1)
                return start, square_geometry.draw_query(state, jnp.full_like(labels, 3))

            seen.append(draw(many, keys[:batch]))
        for few, many in itertools.pairwise(seen):
            jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b[: len(a)]), few, many)
        start, query = jax.tree.map(np.asarray, seen[-1])
        for values in (start.signs, query.signs):
            self.assertSetEqual(set(np.unique(values)), {-1.0, 1.0})
            self.assertLess(abs(values.mean()), 0.25)
        self.assertSetEqual(set(np.unique(query.offsets)), set(range(5)))  # 8 - 3, and not 5
        self.assertBetween(query.across.mean(), 0.25, 0.75)

    def test_offsets_without_room(self):
        @jax.jit
        def draw(images, labels, keys):
            state = attacks.square_machine(norm="linf", epsilon=0.1).init(images, labels, keys=keys)
            return square_geometry.draw_query(state, jnp.full(4, 5, jnp.int32))

        keys = jax.random.split(jax.random.key(0), 4)
        offsets = draw(jnp.zeros((4, 5, 8, 3)), jnp.zeros(4, jnp.int32), keys).offsets
        np.testing.assert_array_equal(offsets[:, ::2], 0)

    @sweeps.fast("l2")
    @parameterized.parameters(*NORMS)
    def test_order_padding_and_devices_do_not_matter(self, norm):
        net, images, labels = small_net((8, 8, 3))
        run = functools.partial(attacks.square_run, net, norm=norm, epsilon=SMALL[norm], queries=50)
        attack = lambda key, x, y: run(x, y, key=key)  # noqa: E731
        keys = attacks.image_keys(jax.random.key(7), 16)
        plain = jax.jit(attack)
        expected = plain(keys, images, labels)
        fooled = np.asarray(expected.margin_best) <= 0
        self.assertBetween(fooled.sum(), 2, 14)
        order = np.random.default_rng(0).permutation(16)
        shuffled = plain(keys[order], images[order], labels[order])
        self.assert_equal(shuffled, jax.tree.map(lambda a: a[order], expected))
        padded = plain(keys, images.at[5:].set(0), labels)
        for ours, theirs in zip(padded, expected, strict=True):
            np.testing.assert_array_equal(ours[:5], theirs[:5])
        # Image by image on 8 devices, inside shard_map with its type checks; no collective.
        mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        spec = jax.sharding.PartitionSpec("data")
        spread = jax.jit(jax.shard_map(attack, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec))
        actual = spread(keys, images, labels)
        np.testing.assert_array_equal(actual.iteration, expected.iteration)
        # Sums of another batch size may be ordered differently.
        np.testing.assert_allclose(actual.x_best, expected.x_best, atol=2e-6)
        program = spread.lower(keys, images, labels).compile().as_text()
        for collective in ("all-reduce(", "all-gather(", "all-to-all(", "collective-permute("):
            self.assertNotIn(collective, program)

    def assert_equal(self, actual, expected):
        jax.tree.map(np.testing.assert_array_equal, actual, expected)

    @sweeps.fast(0)
    @parameterized.parameters("linf", "l1")
    def test_finished_images_stay(self, norm):
        net, images, labels = small_net((8, 8, 3))
        machine = attacks.square_machine(norm=norm, epsilon=SMALL[norm], queries=20)
        tell = jax.jit(lambda state: told(machine, state, net(machine.query(state))))
        keys = jax.random.split(jax.random.key(0), 16)
        states = [jax.jit(machine.init)(images, labels, keys=keys)]
        for _ in range(21):
            self.assertFalse(machine.finished(states[-1]).any())
            states.append(tell(states[-1]))
        self.assertTrue(machine.finished(states[-1]).all())
        self.assert_equal(tell(states[-1]), states[-1])
        # A run stops at an image's first success.
        run = jax.jit(
            lambda: attacks.square_run(
                net, images, labels, norm=norm, epsilon=SMALL[norm], queries=20, key=keys
            )
        )()
        margins = np.stack([state.margin_best for state in states])
        ends = np.where((margins <= 0).any(axis=0), np.argmax(margins <= 0, axis=0), 21)
        self.assertBetween((ends < 21).sum(), 2, 14)
        np.testing.assert_array_equal(run.iteration, ends)
        for i, end in enumerate(ends):
            # Another program, whose sums may be ordered differently.
            np.testing.assert_allclose(run.x_best[i], states[end].x_best[i], atol=2e-6)

    def test_nan_is_never_accepted(self):
        net, images, labels = small_net((8, 8, 3))
        machine = attacks.square_machine(norm="l2", epsilon=0.5, queries=20)
        state = jax.jit(machine.init)(images, labels, keys=jax.random.split(jax.random.key(0), 16))
        tell = jax.jit(functools.partial(told, machine))
        logits = net(machine.query(state))
        nan = logits.at[:, 2].set(jnp.nan)
        first = tell(state, nan)
        self.assert_equal(first.x_best, state.x_best)
        np.testing.assert_array_equal(first.margin_best, np.inf)
        np.testing.assert_array_equal(first.iteration, 1)
        second = tell(first, logits)
        np.testing.assert_array_equal(machine.result(second), machine.query(first))
        self.assert_equal(tell(second, nan).x_best, second.x_best)

    def test_a_traced_radius(self):
        net, images, labels = small_net((8, 8, 3))
        key = jax.random.key(0)

        @jax.jit
        def run(epsilon):
            settings = {"norm": "linf", "epsilon": epsilon, "queries": 10, "key": key}
            return attacks.square_run(net, images, labels, **settings)

        given = functools.partial(run.__wrapped__, 0.1)
        self.assert_equal(run(jnp.float32(0.1)), jax.jit(given)())

    def test_doubles(self):
        """The same draws, and the same points but for rounding."""
        _, images, labels = small_net((8, 8, 3))
        machine = attacks.square_machine(norm="l1", epsilon=0.5)
        keys = jax.random.split(jax.random.key(0), 16)

        @jax.jit
        def two(images, keys):
            state = machine.init(images, labels, keys=keys)
            after = told(machine, state, jnp.zeros((16, 5), images.dtype) + state.epsilon[:, None])
            return state.points, after.points

        single = two(images, keys)
        with jax.enable_x64(True):
            double = two(np.asarray(images, np.float64), keys)
        for ours, exact in zip(single, double, strict=True):
            self.assertEqual(exact.dtype, np.float64)
            np.testing.assert_allclose(ours, exact, atol=2e-6)

    def test_program_does_not_grow_with_queries(self):
        net, images, labels = small_net((8, 8, 3))
        sizes = set()
        for queries in (300, 400):
            run = functools.partial(
                attacks.square_run, net, norm="l1", epsilon=1.0, queries=queries
            )
            program = jax.make_jaxpr(lambda x, y, key, run=run: run(x, y, key=key))
            text = str(program(images, labels, jax.random.key(0)))
            sizes.add(len(text.splitlines()))
        self.assertLen(sizes, 1)


class ErrorTest(parameterized.TestCase):
    @sweeps.rows(
        ({"norm": "l3"}, "norm='l3' is unknown"),
        ({"epsilon": 8}, r"epsilon=8.0 is larger than the pixel range \[0, 1\]; write 8/255"),
        ({"epsilon": -1}, "not a valid radius"),
        ({"queries": 0}, "queries=0 must be an int >= 1"),
        ({"queries": 2.5}, "queries=2.5 must be an int"),
        ({"queries": True}, "queries=True must be an int"),
        ({"p_init": 0}, "p_init=0 must be a fraction of the pixels"),
        ({"p_init": 1.5}, "p_init=1.5 must be a fraction of the pixels"),
    )
    def test_settings(self, changes, message):
        with self.assertRaisesRegex(ValueError, message):
            attacks.square_machine(**{"norm": "linf", "epsilon": 0.1} | changes)

    @sweeps.rows(
        ({"images": jnp.zeros((2, 8, 8, 3), jnp.uint8)}, "divide uint8 images by 255"),
        ({"labels": jnp.zeros((2, 5))}, r"Square needs class labels i32\[B\]"),
        ({"keys": None}, "a random start needs a key; pass"),
        ({"start": "image"}, "pass start='random'"),
        ({"start": jnp.zeros((2, 8, 8, 3))}, "pass start='random'"),
        ({"keys": jax.random.split(jax.random.key(0, impl="rbg"), 2)}, "impl='threefry2x32'"),
    )
    def test_arrays(self, changes, message):
        arguments = {
            "images": jnp.zeros((2, 8, 8, 3)),
            "labels": jnp.zeros(2, jnp.int32),
            "keys": jax.random.split(jax.random.key(0), 2),
        }
        with self.assertRaisesRegex(ValueError, message):
            attacks.square_machine(norm="l2", epsilon=0.1).init(**arguments | changes)
