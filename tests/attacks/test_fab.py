"""FAB against auto-attack a392200 (tests/golden/attacks), and its promises.

A step of FAB divides a difference of logits by the gradient: where a single entry carries the
step (L1, gradients of 0.04), the 2e-6 by which two float32 programs differ in their logits are
5e-5 of a pixel. In float64, against the reference itself, there is no such excuse.
"""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from jaxrobust import attacks
from jaxrobust.attacks.geometry import hyperplanes
from jaxrobust.attacks.machine import nearest
from tests.support import compiling, paths, sweeps
from tests.support.golden import assert_within, golden_nets, load, norm_in_float64
from tests.support.machines import told

fab = importlib.import_module("jaxrobust.attacks.fab")  # `attacks.fab` is the attack

NORMS = ("linf", "l2", "l1")
EPSILON = {"linf": 8 / 255, "l2": 0.5, "l1": 12.0}
REFERENCE = {"Linf": "linf", "L2": "l2", "L1": "l1"}  # its names for ours
PAIRS = (("linf", True), ("l2", False), ("l1", True))  # norm, targeted: each of both, compiled once
BATCH = 16  # of all golden runs, so that they share six programs


@functools.cache
def golden():
    """The small copy, and the full arrays where the project's shared folder is there."""
    small = load(paths.GOLDEN / "attacks/fab.npz")
    full = {}
    if (paths.SHARED / "golden/fab.npz").exists():
        full = load(paths.SHARED / "golden/fab.npz")
    small["images"] = small["images_u8"] / np.float32(255)
    return small, full


NET = golden_nets()["conv"]  # here: its arrays must not be made inside a trace


def net():
    return NET


def drive(machine, logits_fn, state, steps):
    """The final state and, per step, the points checked, who was adversarial, and the state."""

    def body(state, _):
        made = attacks.advance(machine, lambda points, draw: logits_fn(points), state)
        adversarial = jnp.argmax(made.outputs, axis=1) != state.labels
        seen = {"points": made.points, "is_adv": adversarial, "state": made.state}
        return made.state, seen | {"counts": machine.counts(made.queried)}

    return jax.lax.scan(body, state, length=steps)


@functools.partial(
    jax.jit, static_argnames=("norm", "targeted"), compiler_options=compiling.as_users()
)
def trajectory(images, labels, targets, start, *, norm, targeted):
    machine = fab.fab_machine(norm=norm, epsilon=EPSILON[norm], steps=20, targeted=targeted)
    state = machine.init(images, labels, start=start, targets=targets)
    return drive(machine, net(), state, 20)


def padded(*arrays):
    """Arrays with the first image repeated up to the batch."""
    return [np.concatenate([a, np.repeat(a[:1], BATCH - len(a), axis=0)]) for a in arrays]


def run_golden(norm, images, labels, targets=None, start=None):
    count = len(images)
    start = images if start is None else start
    given = labels if targets is None else targets
    images, labels, given, start = padded(images, labels, given, start)
    state, seen = trajectory(
        jnp.asarray(images),
        jnp.asarray(labels, jnp.int32),
        jnp.asarray(given, jnp.int32),
        jnp.asarray(start),
        norm=REFERENCE[norm],
        targeted=targets is not None,
    )
    return (
        jax.tree.map(lambda a: np.asarray(a[:count]), state),
        jax.tree.map(lambda a: np.asarray(a[:, :count]), seen),
    )


def assert_points(actual, expected, norm):
    """The golden README's tolerances, for points f[..., H, W, C]."""
    error = np.abs(np.asarray(actual) - expected)
    if norm == "Linf":
        # Seen 1e-6. The README allows single entries up to 1e-3.
        assert error.max() < 1e-3, error.max()
        assert (error > 2e-6).mean() < 1e-4, np.sort(error.ravel())[-10:]
    elif norm == "L2":
        assert error.max() < 2e-6, error.max()  # seen 1.3e-6
    else:
        # The entries that move partially, one per projection, take the noise of the logits: seen
        # 6e-5, of which 6e-5 are ours (JAX's logits, 2e-6 off float64) and 2e-5 the reference's;
        # in 4 entries of an image at most, for those of earlier iterations fade only slowly.
        assert error.max() < 1e-4, error.max()
        per_image = (error > 2e-5).sum(axis=(-3, -2, -1))
        assert (per_image <= 6).all(), per_image


def compare_run(g, norm, mode, state, seen):
    """A run of the first images with golden arrays, which may hold fewer of them."""
    key = f"{norm}_{mode}"
    np.testing.assert_array_equal(seen["is_adv"], g[f"{key}_is_adv"])
    for at, expected in zip(g[f"{key}_x1_at"], g[f"{key}_x1_before_backward_step"], strict=True):
        assert_points(seen["points"][at - 1][: len(expected)], expected, norm)
    assert_points(state.adv[: len(g[f"{key}_adv"])], g[f"{key}_adv"], norm)
    assert_norms(state.norm_best, g[f"{key}_adv_norm"], norm)


def assert_norms(actual, expected, norm, wandering=0):
    # 1e-4 is the golden README's; 2e-7 is the rounding of the pixels themselves. An L1 norm adds
    # the noise of single entries (see `assert_points`): seen 6e-5, with JAX 0.10.0.
    off = np.abs(actual - expected) > 1e-4 * expected + (1e-4 if norm == "L1" else 2e-7)
    assert off.sum() <= wandering, (actual[off], expected[off])
    np.testing.assert_allclose(actual, expected, rtol=1e-2)


class ProjectionTest(parameterized.TestCase):
    def check(self, g, prefix, norm):
        points, normals, offsets = (jnp.asarray(g[f"{prefix}_{k}"]) for k in ("t", "w", "b"))
        actual = hyperplanes.project_onto_hyperplane(points, normals, offsets, norm=norm)
        tolerance = np.full(actual.shape, 1e-6)
        if norm == "l1" and prefix == "fab_big":
            # The one partially moved entry divides the rounding of a sum of up to 1e3 by its
            # normal: against float64 the reference is 1.1e-4 off, ours as well.
            error = np.abs(actual - g[f"{prefix}_{norm}"])
            self.assertLessEqual((error > 1e-6).sum(axis=1).max(), 1)
            tolerance[np.arange(len(actual)), error.argmax(axis=1)] = 3e-4
        assert_within(actual, g[f"{prefix}_{norm}"], tolerance)

    @sweeps.rows(*NORMS)
    def test_golden_small(self, norm):
        """Among the rows: planes out of reach, normals of 0 and 1e-9, points on the faces."""
        self.check(golden()[0], "fab_small", norm)

    @sweeps.fast("l2")
    @parameterized.parameters(*NORMS)
    def test_golden_big(self, norm):
        if not (paths.SHARED / "golden/projections.npz").exists():
            self.skipTest(paths.NO_SHARED)
        self.check(load(paths.SHARED / "golden/projections.npz"), "fab_big", norm)

    @sweeps.fast("l2")
    @parameterized.parameters(*NORMS)
    def test_equal_normals_meet_the_plane(self, norm):
        """Ties: L1 may move any of the equal entries."""
        points = jnp.full((1, 8), 0.5).at[0, 0].set(1.0)
        normals = jnp.array([[1.0, 1.0, -1.0, 1.0, 1.0, -1.0, 0.0, 0.5]])
        offsets = jnp.array([0.75])
        moved = hyperplanes.project_onto_hyperplane(points, normals, offsets, norm=norm)
        np.testing.assert_allclose(jnp.sum((points + moved) * normals, axis=1), 0.75, atol=1e-6)
        self.assertEqual(moved[0, 6], 0)
        self.assertEqual(moved[0, 7] == 0, norm == "l1")

    @sweeps.fast("l2")
    @parameterized.parameters(*NORMS)
    def test_float64_and_extremes(self, norm):
        with jax.enable_x64(True):
            arguments = [jnp.asarray(a) for a in random_planes()]
            moved = hyperplanes.project_onto_hyperplane(*arguments, norm=norm)
            self.assertEqual(moved.dtype, jnp.float64)
            points, normals, offsets = map(np.asarray, arguments)
            excess = (normals * points).sum(1) - offsets
            for i in range(0, 1000, 7):
                expected = by_sorting(points[i], normals[i], excess[i], norm)
                np.testing.assert_allclose(moved[i], expected, atol=1e-9)
        for size in (1e-30, 1e-12, 1e12, 1e30, 3e38):
            normals = jnp.asarray([[size, -size, 0.0], [size, 1.0, -1.0]])
            points = jnp.full((2, 3), 0.5)
            moved = hyperplanes.project_onto_hyperplane(
                points, normals, jnp.full(2, size), norm=norm
            )
            self.assertTrue(jnp.isfinite(moved).all())
            self.assertLessEqual(jnp.abs(moved).max(), 0.5)

    def test_unknown_norm(self):
        with self.assertRaisesRegex(ValueError, "norm='l3' is unknown; choose one of linf, l2, l1"):
            hyperplanes.project_onto_hyperplane(
                jnp.ones((1, 2)), jnp.ones((1, 2)), jnp.ones(1), norm="l3"
            )


def random_planes(count=1000, entries=24):
    """Points, half of them with saturated entries, and planes: three in ten out of reach."""
    rng = np.random.default_rng(0)
    points = rng.random((count, entries))
    points[::2] = np.clip(points[::2] * 2 - 0.5, 0, 1)
    normals = rng.normal(size=points.shape) * 10 ** rng.uniform(-2, 1, (count, 1))
    normals[rng.random(points.shape) < 0.1] = 0
    side = rng.choice([-1, 1], (count, 1))
    reach = (np.abs(normals) * np.where(side * normals > 0, points, 1 - points)).sum(1)
    share = np.where(rng.random(count) < 0.7, rng.random(count) * 0.99, 1.5)
    return points, normals, (normals * points).sum(1) - side[:, 0] * share * reach


def by_sorting(point, normal, excess, norm):
    """The projection of one row in float64, by its definition."""
    normal = normal if excess >= 0 else -normal
    size, excess = np.abs(normal), abs(excess)
    room = np.where(normal > 0, point, 1 - point) * (size > 1e-8)
    if size @ room <= excess:
        return -np.sign(normal) * room
    if norm == "l1":
        order = np.argsort(-size, kind="stable")
        before = np.concatenate([[0], np.cumsum((size * room)[order])[:-1]])
        moves = np.zeros_like(room)
        with np.errstate(divide="ignore", invalid="ignore"):
            wanted = np.where(size[order] > 0, (excess - before) / size[order], 0)
        moves[order] = np.clip(wanted, 0, room[order])
        return -np.sign(normal) * moves
    speed = size if norm == "l2" else np.ones_like(size)
    with np.errstate(divide="ignore", invalid="ignore"):
        nodes = np.where(size > 1e-8, room / speed, 0)
    nodes = np.unique(np.concatenate([[0], nodes]))
    reached = [size @ np.minimum(level * speed, room) for level in nodes]
    level = np.interp(excess, reached, nodes)
    return -np.sign(normal) * np.minimum(level * speed, room)


class GoldenCase(parameterized.TestCase):
    """How verdicts are compared; no tests of its own."""

    def check_perturb(self, g, norm, mode, images, labels):
        """What FAB does alone: the first success in order of targets counts, nothing else."""
        logits_fn, epsilon = jax.jit(net()), EPSILON[REFERENCE[norm]]
        for first in range(0, len(images), BATCH):
            part = slice(first, first + BATCH)
            x, y = images[part], labels[part]
            logits = np.asarray(logits_fn(jnp.asarray(x)))
            left = logits.argmax(1) == y
            robust, norms = left.copy(), np.zeros(BATCH, np.float32)
            for rank in range(2, 11) if mode == "perturbT" else (None,):
                targets = None if rank is None else logits.argsort(axis=1)[:, -rank]
                state, _ = run_golden(norm, x, y, targets)
                wrong = np.asarray(logits_fn(jnp.asarray(state.adv))).argmax(1) != y
                found = robust & wrong & (state.norm_best <= np.float32(epsilon))
                norms[found] = state.norm_best[found]
                robust &= ~found
            np.testing.assert_array_equal(robust, g[f"{norm}_{mode}_robust"][part])
            # Image 48 on Linf: a last unit in its pixels moves its norm by 7e-3, and the
            # reference's targeted and untargeted run of the same boundary differ by 4e-4.
            wandering = norm == "Linf" and 48 in range(first, first + BATCH)
            assert_norms(norms, g[f"{norm}_{mode}_norm"][part], norm, int(wandering))


class GoldenTest(GoldenCase):
    """20 iterations on the network of the golden arrays."""

    @parameterized.parameters(*REFERENCE)
    def test_targeted(self, norm):
        small, full = golden()
        images, labels = small["images"][small["idx"]], small["y"]
        ranks = [small[f"{norm}_{mode}_ytarget"] for mode in ("rank2", "rank3")]
        state, seen = run_golden(
            norm, np.tile(images, (2, 1, 1, 1)), np.tile(labels, 2), np.concatenate(ranks)
        )
        for i, mode in enumerate(("rank2", "rank3")):
            for name, g in (("small", small), ("full", full)):
                with self.subTest(mode, golden=name):
                    if g:
                        part = jax.tree.map(lambda a, i=i: a[:, 6 * i : 6 * i + 6], seen)
                        final = jax.tree.map(lambda a, i=i: a[6 * i : 6 * i + 6], state)
                        compare_run(g, norm, mode, final, part)

    @sweeps.fast("Linf")
    @parameterized.parameters(*REFERENCE)
    def test_untargeted(self, norm):
        small, full = golden()
        state, seen = run_golden(norm, small["images"][small["idx"]], small["y"])
        for name, g in (("small", small), ("full", full)):
            with self.subTest(golden=name):
                if g:
                    compare_run(g, norm, "untargeted", state, seen)

    @parameterized.parameters(*REFERENCE)
    @pytest.mark.slow
    def test_random_start(self, norm):
        small, full = golden()
        g = full or small
        count = len(g[f"{norm}_rs_draw"])
        images = small["images"][small["idx"]][:count]
        epsilon = jnp.full(count, EPSILON[REFERENCE[norm]])
        draw = jnp.asarray(g[f"{norm}_rs_draw"])
        start = fab.place_start(draw, jnp.asarray(images), epsilon, norm=REFERENCE[norm])
        np.testing.assert_allclose(start, g[f"{norm}_rs_x1_start"], atol=1.2e-7)  # one unit of 1
        _, seen = run_golden(norm, images, small["y"][:count], start=np.asarray(start))
        assert_points(seen["state"].adv[4], g[f"{norm}_rs_adv"], norm)  # after 5 iterations

    @sweeps.fast("L1")
    @sweeps.fast(0, 1)
    @parameterized.parameters(*REFERENCE)
    def test_perturb(self, norm):
        small, _ = golden()
        self.check_perturb(small, norm, "perturbT", small["images"], small["labels"])


@pytest.mark.matrix
class FullGoldenTest(GoldenCase):
    @parameterized.product(norm=tuple(REFERENCE), mode=("perturbT", "perturbU"))
    def test_perturb_in_full(self, norm, mode):
        _, full = golden()
        if not full:
            self.skipTest(paths.NO_SHARED)
        data = load(paths.SHARED / "golden/data.npz")
        self.check_perturb(full, norm, mode, data["x"][:64], data["labels"][:64])


class ReferenceTest(parameterized.TestCase):
    """The reference library itself, on images that the golden arrays do not have."""

    @parameterized.product(norm=tuple(REFERENCE), targeted=(True, False))
    @pytest.mark.slow
    def test_parity(self, norm, targeted):
        try:
            import torch
            from pyautoattack.fab_pt import FABAttack_PT
        except ImportError:
            self.skipTest(paths.PARITY)
        w = {k: torch.tensor(v) for k, v in load(paths.GOLDEN / "attacks/nets.npz").items()}

        def torch_net(x):
            h = (x - w["mean"][:, None, None]) / w["std"][:, None, None]
            for i in "123":
                kernel = w[f"conv{i}_w_hwio"].permute(3, 2, 0, 1)
                h = torch.nn.functional.conv2d(h, kernel, w[f"conv{i}_b"], stride=2, padding=1)
                h = torch.nn.functional.gelu(h)
            h = h.permute(0, 2, 3, 1).flatten(1) @ w["fc1_w_hwc"] + w["fc1_b"]
            return torch.nn.functional.gelu(h) @ w["fc2_w"] + w["fc2_b"]

        rng = np.random.default_rng(5)
        images = golden()[0]["images"][8:]
        images = np.clip(images[:, :, ::-1] + rng.normal(size=images.shape) / 20, 0, 1)
        images = images.astype(np.float32)
        images_nchw = torch.tensor(images.transpose(0, 3, 1, 2).copy())
        logits = torch_net(images_nchw).numpy()
        labels, targets = logits.argsort(axis=1)[:, -1], logits.argsort(axis=1)[:, -3]
        attack = FABAttack_PT(
            torch_net, norm=norm, n_iter=10, eps=0.5, targeted=targeted, device="cpu"
        )
        attack.target_class = 3
        expected = attack.attack_single_run(
            images_nchw, torch.tensor(labels), use_rand_start=False, is_targeted=targeted
        )
        expected = expected.detach().numpy().transpose(0, 2, 3, 1)
        _, seen = run_golden(norm, images, labels, targets if targeted else None)
        self.assertGreaterEqual(np.isfinite(seen["state"].norm_best[9]).sum(), 6)
        assert_points(seen["state"].adv[9], expected, norm)


class PropertyTest(parameterized.TestCase):
    """What holds for any network; a small one, and few compiled programs."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        w1, w2 = (
            jax.random.normal(jax.random.key(i), s) for i, s in enumerate(((48, 16), (16, 5)))
        )

        def net(x):  # with a hole in the derivative where an entry is exactly 0.25: sqrt at 0
            hole = jnp.sqrt(jnp.abs(x - 0.25)).sum(axis=(1, 2, 3))[:, None] * 0
            return jnp.sin(x.reshape(len(x), -1) @ w1) @ w2 + hole

        cls.net = staticmethod(net)
        cls.attack_6 = staticmethod(functools.cache(lambda norm: cls().attack(norm=norm)))
        cls.images = jax.random.uniform(jax.random.key(2), (16, 4, 4, 3))
        logits = cls.net(cls.images)
        cls.labels = jnp.argmax(logits, axis=1)
        cls.targets = jnp.argsort(logits, axis=1)[:, -2]

    def attack(self, logits_fn=None, **settings):
        settings = {"epsilon": 0.1, "steps": 6} | settings
        return jax.jit(functools.partial(attacks.fab_run, logits_fn or self.net, **settings))

    def test_the_first_of_equally_near_points_is_kept(self):
        images = jnp.full((1, 2, 2, 1), 0.5)
        machine = fab.fab_machine(norm="linf", epsilon=0.5, steps=3, targeted=False)
        state = machine.init(images, jnp.array([0]))
        for point in (0.75, 0.25):
            state = machine.check(state._replace(points=jnp.full_like(images, point)), jnp.zeros(1))
        np.testing.assert_array_equal(state.adv, np.full_like(images, 0.75))

    @sweeps.rows(("linf", 9.0), ("l2", 29**0.5), ("l1", 4.0))
    def test_the_distance_to_a_boundary_is_by_the_dual_norm(self, norm, steepness):
        machine = fab.fab_machine(norm=norm, epsilon=0.5, steps=3, targeted=False)
        state = machine.init(jnp.full((2, 2, 2, 1), 0.5), jnp.array([0, 1]))
        gradient = jnp.tile(jnp.float32([3, -4, 2, 0]).reshape(1, 2, 2, 1), (2, 1, 1, 1))
        found = machine.distance(state, jnp.float32([-6, 6]), gradient, jnp.int32(1))
        np.testing.assert_allclose(found, [6 / steepness, np.inf], rtol=1e-6)  # none to its own

    @parameterized.parameters(*PAIRS)
    def test_finds_near_points_inside_the_box(self, norm, targeted):
        images = jnp.clip(self.images * 1.5 - 0.25, 0, 1)  # many saturated pixels
        labels = jnp.argmax(self.net(images), axis=1)
        targets = jnp.argsort(self.net(images), axis=1)[:, -2] if targeted else None
        state = self.attack_6(norm)(images, labels, targets=targets)
        self.assertTrue((state.adv >= 0).all() and (state.adv <= 1).all())
        found = np.asarray(jnp.isfinite(state.norm_best))
        self.assertGreater(found.sum(), 12)
        wrong = np.asarray(jnp.argmax(self.net(state.adv), axis=1) != labels)
        np.testing.assert_array_equal(wrong, found)
        np.testing.assert_array_equal(state.adv[~found], images[~found])
        norms = norm_in_float64(state.adv - images, norm)
        np.testing.assert_allclose(norms[found], state.norm_best[found], rtol=1e-5)
        # Near: a tenth of the largest norm that there is.
        self.assertLess(np.median(norms[found]), {"linf": 0.1, "l2": 0.7, "l1": 4.8}[norm])

    @sweeps.fast("linf")
    @parameterized.parameters(*PAIRS)
    def test_fab_run_is_the_machine(self, norm, targeted):
        targets = self.targets if targeted else None
        epsilon = {"linf": 0.01, "l2": 0.1, "l1": 0.3}[norm]
        state = self.attack_6(norm)(self.images, self.labels, targets=targets)
        machine = fab.fab_machine(norm=norm, epsilon=epsilon, steps=6, targeted=targeted)
        given = machine.init(self.images, self.labels, targets=targets)
        expected, seen = jax.jit(lambda s: drive(machine, self.net, s, 6))(given)
        np.testing.assert_allclose(state.adv, expected.adv, atol=1e-5)  # another order of sums
        self.assertTrue(machine.finished(state).all())
        self.assertFalse(machine.finished(given).any())
        self.assertFalse(machine.finished(seen["state"])[:-1].any())
        np.testing.assert_array_equal(machine.result(state), state.adv)
        # `counts` is the norm of the point that is checked; the smallest of a success is kept.
        norms = np.stack([norm_in_float64(p - self.images, norm) for p in seen["points"]])
        np.testing.assert_array_equal(seen["counts"], norms <= epsilon)
        self.assertBetween(np.mean(norms <= epsilon), 0.01, 0.99)
        best = np.minimum.accumulate(np.where(seen["is_adv"], norms, np.inf))
        np.testing.assert_allclose(seen["state"].norm_best, best, rtol=1e-5)

    @sweeps.fast("linf")
    @parameterized.parameters(*NORMS)
    def test_order_and_padding_do_not_matter(self, norm):
        attack = self.attack(norm=norm, start="random")
        keys = attacks.image_keys(jax.random.key(7), 16)
        arguments = self.images, self.labels, self.targets
        expected = attack(*arguments[:2], targets=arguments[2], key=keys)
        order = np.random.default_rng(0).permutation(16)
        x, y, t = (a[order] for a in arguments)
        shuffled = attack(x, y, targets=t, key=keys[order])
        x, y, t = (a.at[5:].set(0) for a in arguments)
        few = attack(x, y, targets=t, key=keys)
        for name in ("adv", "norm_best", "points"):
            value = getattr(expected, name)
            np.testing.assert_array_equal(getattr(shuffled, name), value[order])
            np.testing.assert_array_equal(getattr(few, name)[:5], value[:5])

    def test_start_is_the_image_s_own(self):
        """Whatever the batch; and it lies at half the radius, in the box."""
        images = jnp.tile(self.images, (4, 1, 1, 1))
        keys = attacks.image_keys(jax.random.key(3), 64)
        labels = jnp.tile(self.labels, 4)
        machine = fab.fab_machine(norm="linf", epsilon=0.2, steps=1, targeted=False)
        start = jax.jit(lambda x, y, k: machine.init(x, y, keys=k, start="random").points)
        starts = [start(images[:n], labels[:n], keys[:n]) for n in (1, 7, 64)]
        np.testing.assert_array_equal(starts[0], starts[2][:1])
        np.testing.assert_array_equal(starts[1], starts[2][:7])
        norms = norm_in_float64(starts[2] - images, "linf")
        self.assertTrue((norms < 0.1 + 1e-6).all() and (norms > 0.05).all())
        self.assertTrue((starts[2] >= 0).all() and (starts[2] <= 1).all())
        self.assertFalse((starts[2][:16] == starts[2][16:32]).all(axis=(1, 2, 3)).any())

    @parameterized.parameters(*PAIRS)
    def test_image_without_gradient_stays(self, norm, targeted):
        targets = self.targets if targeted else None
        attack = self.attack_6(norm)
        expected = attack(self.images, self.labels, targets=targets)
        images = self.images.at[2, 0, 0, 0].set(0.25).at[4, 1, 1, 1].set(0.25)
        labels = jnp.argmax(self.net(images), axis=1)
        actual = attack(images, labels, targets=targets)
        for i in (2, 4):
            np.testing.assert_array_equal(actual.adv[i], images[i])
            np.testing.assert_array_equal(actual.points[i], images[i])
            self.assertEqual(actual.norm_best[i], jnp.inf)
        others = np.setdiff1d(np.arange(16), [2, 4])
        np.testing.assert_array_equal(actual.points[others], expected.points[others])

    @sweeps.fast("linf")
    @parameterized.parameters(*PAIRS)
    def test_one_bad_entry_is_enough(self, norm, targeted):
        machine = fab.fab_machine(norm=norm, epsilon=0.1, steps=2, targeted=targeted)
        state = machine.init(self.images, self.labels, targets=self.targets)
        logits = self.net(self.images)
        shape = (16, 4, 4, 3) if targeted else (16, 5, 4, 4, 3)
        gradient = jax.random.normal(jax.random.key(0), shape)
        where = (3, 1, 1, 1) if targeted else (3, (int(self.labels[3]) + 1) % 5, 1, 1, 1)

        @jax.jit
        def tell(state, logits, gradient):
            if targeted:
                return told(machine, state, logits, gradient)
            pull = lambda g: (gradient[:, jnp.argmax(g[0])],)  # noqa: E731
            values = machine.loss(state, logits)
            loss, gradient = nearest(machine, state, values, pull)
            return machine.tell(state, loss, None, gradient)

        good, others = tell(state, logits, gradient), np.arange(16) != 3
        self.assertTrue((good.points != self.images).any(axis=(1, 2, 3)).all())
        for bad in (jnp.nan, jnp.inf, -jnp.inf):
            after = tell(state, logits, gradient.at[where].set(bad))
            np.testing.assert_array_equal(after.points[3], self.images[3])
            np.testing.assert_array_equal(after.points[others], good.points[others])
        after = tell(state, logits.at[3].set(jnp.nan), gradient)
        np.testing.assert_array_equal(after.points[3], self.images[3])

    @sweeps.fast("linf")
    @parameterized.parameters(*PAIRS)
    def test_constant_network(self, norm, targeted):
        """No gradient: nowhere to go, and nothing is divided by it."""
        labels, targets = jnp.zeros(16, jnp.int32), jnp.ones(16, jnp.int32)

        @jax.jit
        def attack(logits):
            return attacks.fab_run(
                lambda x: logits + 0 * x.sum(axis=(1, 2, 3))[:, None],
                self.images,
                labels,
                norm=norm,
                epsilon=0.1,
                steps=2,
                targets=targets if targeted else None,
            )

        for logits in ([[1.0, 0.5, 0.0]], [[0.0, 0.0, 0.0]]):
            state = attack(jnp.array(logits))
            # Each step mixes the image with itself, a x + (1 - a) x, which rounds.
            rounding = 2 * np.finfo(np.float32).eps
            np.testing.assert_allclose(state.points, self.images, rtol=0, atol=rounding)
            np.testing.assert_array_equal(state.norm_best, jnp.inf)

    @parameterized.parameters(("linf", 2), ("l1", 3))
    def test_few_classes(self, norm, classes):
        net = lambda x: self.net(x)[:, :classes]  # noqa: E731
        labels = jnp.argmax(net(self.images), axis=1)
        attack = self.attack(net, norm=norm, steps=10)
        untargeted = attack(self.images, labels)
        self.assertGreater(jnp.isfinite(untargeted.norm_best).sum(), 12)
        if classes == 2:  # then there is only one boundary
            targeted = attack(self.images, labels, targets=1 - labels)
            np.testing.assert_allclose(targeted.adv, untargeted.adv, atol=1e-5)

    def test_misclassified_image_counts(self):
        machine = fab.fab_machine(norm="l2", epsilon=0.0, steps=2, targeted=False)
        state = machine.init(self.images, (self.labels + 1) % 5)
        self.assertTrue(machine.counts(state).all())
        state = machine.check(state, machine.score(state, self.net(self.images)))
        np.testing.assert_array_equal(state.norm_best, 0)
        np.testing.assert_array_equal(state.points, self.images)

    @sweeps.fast(1)
    @parameterized.parameters(("l1", False), ("l2", True))
    def test_devices_do_not_matter(self, norm, targeted):
        """Image by image on 8 devices, inside shard_map with its type checks; no collective."""

        def attack(keys, images, labels, targets):
            state = attacks.fab_run(
                self.net,
                images,
                labels,
                norm=norm,
                epsilon=0.1,
                steps=3,
                targets=targets if targeted else None,
                key=keys,
                start="random",
            )
            return state.adv, state.norm_best

        keys = attacks.image_keys(jax.random.key(7), 16)
        arguments = keys, self.images, self.labels, self.targets
        mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        spec = jax.sharding.PartitionSpec("data")
        spread = jax.jit(
            jax.shard_map(attack, mesh=mesh, in_specs=(spec,) * 4, out_specs=(spec, spec))
        )
        compiled = spread.lower(*arguments).compile()
        # Sums of another batch size may be ordered differently; a step divides by the gradient.
        for actual, expected in zip(compiled(*arguments), jax.jit(attack)(*arguments), strict=True):
            np.testing.assert_allclose(actual, expected, atol=1e-5)
        for collective in ("all-reduce(", "all-gather(", "all-to-all(", "collective-permute("):
            self.assertNotIn(collective, compiled.as_text())

    def test_program_does_not_grow(self):
        """Neither with the steps nor with the classes; two forward passes and one backward."""
        sizes, calls = set(), []

        def net(x, classes):
            calls.append(x.shape)
            return jnp.tile(self.net(x), (1, classes))

        for steps, classes in ((3, 1), (10, 1), (3, 4)):
            attack = functools.partial(
                attacks.fab_run,
                functools.partial(net, classes=classes),
                norm="l2",
                epsilon=0.1,
                steps=steps,
            )
            program = jax.make_jaxpr(attack)(self.images, self.labels)
            sizes.add(len(str(program).splitlines()))
        self.assertLen(sizes, 1)
        self.assertLen(calls, 6)

    @pytest.mark.slow
    def test_two_machines_share_a_batch(self):
        """Slots refilled by a machine of another radius and length finish as if alone."""
        machines = [
            fab.fab_machine(norm="linf", epsilon=e, steps=n) for e, n in ((3 / 8, 6), (0, 4))
        ]
        run = jax.jit(lambda state: drive(machines[0], self.net, state, 4))
        alone, mixed = [], []
        for i, machine in enumerate(machines):
            take = slice(8 * i, 8 * i + 8)
            state = machine.init(self.images[take], self.labels[take], targets=self.targets[take])
            mixed.append(state)
            alone.append(run(state)[0])
        state, seen = run(jax.tree.map(lambda a, b: jnp.concatenate([a, b]), *mixed))
        for i in (0, 1):
            np.testing.assert_allclose(state.adv[8 * i : 8 * i + 8], alone[i].adv, atol=1e-5)
        np.testing.assert_array_equal(machines[0].finished(state), np.arange(16) >= 8)
        self.assertTrue(seen["counts"][:, :8].any())
        self.assertFalse(seen["counts"][:, 8:].any())

    def test_radius_may_be_traced(self):
        machine = lambda e: fab.fab_machine(norm="l2", epsilon=e, steps=2, targeted=False)  # noqa: E731
        states = [
            jax.jit(lambda e: machine(e).init(self.images, self.labels))(jnp.float32(0.25)),
            machine(0.25).init(self.images, self.labels),
        ]
        np.testing.assert_array_equal(states[0].epsilon, states[1].epsilon)

    def test_three_starts(self):
        machine = fab.fab_machine(norm="linf", epsilon=0.1, steps=1, targeted=False)
        noisy = self.images * 3 - 1
        state = machine.init(noisy, self.labels)
        for points in (state.points, state.images, state.adv):
            np.testing.assert_array_equal(points, jnp.clip(noisy, 0, 1))
        given = machine.init(self.images, self.labels, start=np.asarray(noisy))
        np.testing.assert_array_equal(given.points, jnp.clip(noisy, 0, 1))
        np.testing.assert_array_equal(given.adv, self.images)


class ErrorTest(parameterized.TestCase):
    @sweeps.rows(
        ({"norm": "l3"}, "norm='l3' is unknown; choose one of linf, l2, l1"),
        ({"epsilon": 4}, r"epsilon=4.0 is larger than the pixel range \[0, 1\]; write 4/255"),
        ({"epsilon": "4/255"}, r"epsilon='4/255' is not a number; pass one without quotes"),
        ({"steps": 0}, "steps=0 must be an int >= 1"),
        ({"alpha_max": 1.5}, r"alpha_max=1.5 is outside \[0, 1\]; pass a number in this"),
        ({"alpha_max": float("nan")}, "alpha_max=nan is outside"),
        ({"eta": 0.9}, r"eta=0.9 is outside \[1, inf\]"),
        ({"beta": -0.1}, r"beta=-0.1 is outside \[0, 1\]"),
        ({"beta": "0.9"}, "beta='0.9' is not a number"),
    )
    def test_settings(self, changes, message):
        with self.assertRaisesRegex(ValueError, message):
            attacks.fab_machine(**{"norm": "linf", "epsilon": 0.1, "steps": 2} | changes)

    @sweeps.rows(
        ({"images": jnp.zeros((2, 4, 4, 3), jnp.uint8)}, "divide uint8 images by 255 first"),
        (
            {"labels": jnp.zeros((2, 5))},
            r"class labels i32\[B\], got shape \(2, 5\); pass labels.argmax",
        ),
        ({"targets": None}, r"needs targets i32\[B\]; pass targets=..."),
        (
            {"targets": jnp.zeros(3, jnp.int32)},
            r"targets are int32 of shape \(3,\); pass one class",
        ),
        ({"targets": jnp.zeros(2)}, "targets are float32 of shape .*; pass one class per image"),
        ({"start": "corner"}, "start='corner' is unknown; pass 'image', 'random' or an array"),
        ({"start": "random"}, "a random start needs random keys; pass keys"),
        ({"start": jnp.zeros((1, 4, 4, 3))}, "pass one point per image"),
    )
    def test_arrays(self, changes, message):
        labels = jnp.zeros(2, jnp.int32)
        arguments = {"images": jnp.zeros((2, 4, 4, 3)), "labels": labels, "targets": labels + 1}
        with self.assertRaisesRegex(ValueError, message):
            attacks.fab_machine(norm="linf", epsilon=0.1, steps=2).init(**arguments | changes)

    def test_classes_outside(self):
        net = lambda x: x.sum(axis=(1, 2))  # noqa: E731
        run = functools.partial(
            attacks.fab_run, net, jnp.full((2, 4, 4, 3), 0.5), norm="l2", epsilon=1, steps=1
        )
        with self.assertRaisesRegex(ValueError, r"labels\[1\]=3 is outside the 3 classes"):
            run([0, 3])
        with self.assertRaisesRegex(ValueError, r"targets\[0\]=-1 is outside the 3 classes"):
            run([0, 1], targets=[-1, 0])
        self.assertEqual(run([0, 1], targets=np.array([1, 0])).adv.shape, (2, 4, 4, 3))
