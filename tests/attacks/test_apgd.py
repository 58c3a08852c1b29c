"""APGD against auto-attack a392200 and the training attack of revisiting-at, and its promises.

Two float32 programs for the same network differ by 1e-7 in the loss. Where an image's loss has
reached its ceiling, such a difference decides whether "the loss rose", so the step is halved at
different iterations from there on: it also differs between the reference and its own float64
twin. Golden trajectories are therefore compared bit for bit (or nearly) up to such a decision,
which is checked to be one; in float64 there is no such excuse.
"""

import functools
import itertools
import math
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from jaxrobust import attacks
from jaxrobust.attacks import apgd_radii
from jaxrobust.attacks.geometry import balls
from tests.support import paths, sweeps
from tests.support.golden import assert_within, golden_nets, load, norm_in_float64
from tests.support.machines import told

NORMS = ("linf", "l2", "l1")
EPSILON = {"linf": 8 / 255, "l2": 0.5, "l1": 12.0}
REFERENCE = {"Linf": "linf", "L2": "l2", "L1": "l1"}  # its names for ours
LOSS = {"ce": "ce", "dlr": "dlr", "dlrt": "dlr-targeted"}
NETS = golden_nets()
X_TOLERANCE = {"linf": 1e-6, "l2": 2e-6, "l1": 2e-6}  # sums of 3072 squares; L1 residue
# On Linf, the fraction of entries that may be off by more: the sign of a gradient entry near 0
# differs between versions of XLA, and sign() makes a whole step of it. The golden README's rule.
LINF_FLIPS = 1e-3


def drive(machine, net, state, evaluations):
    """The final state and, per evaluation, the point, its loss and what was made of it."""

    def body(state, _):
        made = attacks.advance(machine, lambda points, draw: NETS[net](points), state)
        right = jnp.argmax(made.outputs, axis=1) == state.labels
        seen = {"points": made.points, "loss": machine.loss(state, made.outputs), "right": right}
        return made.state, seen | {"state": made.state}

    return jax.lax.scan(body, state, length=evaluations)


@functools.partial(jax.jit, static_argnames=("net", "norm", "loss", "steps"))
def trajectory(images, labels, targets, start, *, net, norm, loss, steps):
    machine = attacks.apgd_machine(norm=norm, epsilon=EPSILON[norm], steps=steps, loss=loss)
    state = machine.init(images, labels, start=start, targets=targets)
    return drive(machine, net, state, steps + 1)


def run_like(g, key, steps, start):
    """Run what a golden key describes."""
    net, norm, loss = key.split("_")[:3]
    as_int = functools.partial(jnp.asarray, dtype=jnp.int32)
    state, seen = trajectory(
        jnp.asarray(g["x"]) if "x" in g else start,
        as_int(g["y"]),
        as_int(g["ytarget"]),
        start,
        net=net,
        norm=REFERENCE[norm],
        loss=LOSS[loss],
        steps=steps,
    )
    return state, jax.tree.map(np.asarray, seen)


def first_tainted(state, losses, golden_best, golden_step):
    """Per image, the first evaluation after a decision that differs, or one past the last.

    Decisions are whether a loss is the best so far, and which step comes next. One that differs
    must have compared losses that are equal but for rounding.
    """
    steps = len(golden_step)
    step_differs = ~np.isclose(state.step[:steps], golden_step, rtol=1e-6)
    best_differs = (np.diff(state.loss_best, axis=0) > 0) != (np.diff(golden_best, axis=0) > 0)
    tainted = np.full(golden_step.shape[1], steps + 1)
    for i in np.flatnonzero((step_differs | best_differs).any(0)):
        at = (step_differs | best_differs)[:, i].argmax()
        window = slice(max(0, at - 5), at + (2 if best_differs[at, i] else 1))
        gaps = [np.diff(v[window, i]) for v in (losses, golden_best)]
        gaps.append(losses[window, i][-1:] - golden_best[window, i][-2:-1])
        smallest = np.abs(np.concatenate(gaps)).min()
        rounding = 1e-5 * max(1, np.abs(losses[at, i]))
        assert smallest <= rounding, f"image {i}, iteration {at}: {smallest} is not rounding"
        tainted[i] = at + 1
    return tainted


def assert_points(actual, expected, norm):
    """Iterates in float32, of any number of images, are those of the reference."""
    if norm != "linf":
        return assert_within(actual, expected, X_TOLERANCE[norm])
    off = np.abs(np.asarray(actual) - expected) > X_TOLERANCE[norm]
    assert off.mean() < LINF_FLIPS, f"{off.sum()} entries of {off.size} are off"


def two_steps(images, labels, start, **settings):
    """`apgd_run` on the small network; a start that is a word stays out of the arguments."""
    run = functools.partial(
        attacks.apgd_run, NETS["conv"], epsilon=EPSILON[settings["norm"]], **settings
    )
    if isinstance(start, str):
        return jax.jit(functools.partial(run, start=start))(images, labels)
    return jax.jit(lambda x, y, s: run(x, y, start=s))(images, labels, start)


class GoldenCase(parameterized.TestCase):
    """How a set of golden arrays is compared; no tests of its own."""

    def check(self, g, key):
        norm = REFERENCE[key.split("_")[1]]
        start = g["x"] if key.endswith("x0") else g[f"{key.split('_')[1]}_x_init"]
        state, seen = run_like(g, key, 20, jnp.asarray(start))
        expected = g[f"{key}_loss_best"]
        tainted = first_tainted(
            seen["state"], g[f"{key}_loss_iter"], expected, g[f"{key}_step_size"]
        )
        for at in range(21):
            same = tainted > at
            # The golden README's tolerance; but a DLR loss of 100 divides logits that are off by
            # 2e-6 by 0.02. After a differing decision all still lead to about the same loss.
            steep = ("dlr" in key) & (expected[at] > 10)
            rtol = np.where(same, np.where(steep, 5e-4, 1e-4), 1e-3)
            assert_within(
                seen["state"].loss_best[at], expected[at], 1e-3 + rtol * np.abs(expected[at])
            )
        np.testing.assert_array_equal(state.correct, g[f"{key}_acc_final"])
        if norm == "l1":  # counts decide, not small differences
            np.testing.assert_array_equal(seen["state"].step[:20], g[f"{key}_step_size"])
            np.testing.assert_array_equal(seen["state"].kept[:20], g[f"{key}_topk"])
        for name, ours in (("x_adv", seen["points"]), ("x_best", seen["state"].x_best)):
            for at, expected in zip(g[f"{key}_{name}_at"], g[f"{key}_{name}"], strict=True):
                same = tainted > at
                if same.any():
                    assert_points(ours[at][same], expected[same], norm)
        return tainted

    def check_two_steps(self, g):
        images, labels = jnp.asarray(g["x"]), jnp.asarray(g["y"], jnp.int32)
        for key in sorted(k.removesuffix("_loss_best") for k in g if k.endswith("_loss_best")):
            kind, norm, loss, steps = key.split("_")[:4]
            state = two_steps(
                images,
                labels,
                "image" if kind == "train" else jnp.asarray(g[f"{norm}_x_init"]),
                norm=REFERENCE[norm],
                loss=loss,
                steps=int(steps[1:]),
                kept_fraction=0.2 if "istrainFalse" in key else 0.05,
            )
            # The noise floor of the golden README: 1e-6 for CE, 3e-5 and relative for DLR.
            np.testing.assert_allclose(
                state.loss_best, g[f"{key}_loss_best"], atol=3e-5, rtol=1e-5, err_msg=key
            )
            np.testing.assert_array_equal(state.correct, g[f"{key}_acc"], err_msg=key)
            for name in ("x_best", "x_best_adv"):
                if f"{key}_{name}" in g:
                    with self.subTest(key, name=name):
                        assert_points(getattr(state, name), g[f"{key}_{name}"], REFERENCE[norm])


class GoldenTrainingTest(GoldenCase):
    @sweeps.fast(1, 5)
    @parameterized.parameters(1, 2, 3, 4, 5, 10, 20)
    def test_toy_in_float64(self, steps):
        """The authors' function, images partly outside [0, 1], soft labels: equal bit for bit."""
        g = load(paths.GOLDEN / "attacks/train_toy.npz")
        with jax.enable_x64(True):
            w, v, b, y = (jnp.asarray(g[k]) for k in ("W", "V", "b", "y"))
            x = jnp.asarray(g["x"].transpose(0, 2, 3, 1))

            def net(x):
                z = x.transpose(0, 3, 1, 2).reshape(len(x), -1)
                return 3 * jnp.sin(0.2 * (z @ w.T)) + 0.5 * (z @ v.T + b[None]) * jnp.cos(z @ v.T)

            settings = {"norm": "linf", "epsilon": float(g["eps"]), "steps": steps}
            state = jax.jit(lambda x, y: attacks.apgd_run(net, x, y, **settings))(x, y)
            if steps == 2:  # the public attack is this very run
                images_adv = jax.jit(functools.partial(attacks.apgd(**settings), net))(None, x, y)
                self.assertEqual(images_adv.dtype, jnp.float64)
                np.testing.assert_array_equal(images_adv, state.x_best)
            golden = {k: g[f"{k}_n{steps}"] for k in ("x_best", "loss_best", "acc", "x_best_adv")}
        # A few units in the last place for another exp, sin and matrix product.
        for actual, k in ((state.x_best, "x_best"), (state.x_best_adv, "x_best_adv")):
            np.testing.assert_allclose(
                np.asarray(actual).transpose(0, 3, 1, 2), golden[k], atol=1e-15, rtol=0
            )
        np.testing.assert_allclose(state.loss_best, golden["loss_best"], rtol=1e-14)
        np.testing.assert_array_equal(state.correct, golden["acc"])

    @pytest.mark.slow
    def test_two_steps(self):
        self.check_two_steps(load(paths.GOLDEN / "attacks/twostep.npz"))


@pytest.mark.computes
class GoldenRunTest(GoldenCase):
    """20 iterations of AutoAttack's APGD from given starts."""

    @parameterized.parameters(
        "conv_Linf_ce_xi", "conv_Linf_dlr_xi", "conv_Linf_dlrt_xi", "conv_Linf_ce_x0"
    )
    def test_linf(self, key):
        tainted = self.check(load(paths.GOLDEN / "attacks/apgd20.npz"), key)
        self.assertGreaterEqual(tainted.min(), 10)  # all agree for half of the run at least

    @sweeps.fast(0, 2)
    @parameterized.parameters("conv_L2_ce_xi", "conv_L2_dlr_xi", "conv_L2_dlrt_xi", "conv_L2_ce_x0")
    def test_l2(self, key):
        self.check(load(paths.GOLDEN / "attacks/apgd20.npz"), key)

    @sweeps.fast(0, 2)
    @parameterized.parameters("conv_L1_ce_xi", "conv_L1_dlr_xi", "conv_L1_dlrt_xi", "conv_L1_ce_x0")
    def test_l1(self, key):
        self.check(load(paths.GOLDEN / "attacks/apgd20.npz"), key)

    @parameterized.parameters(*REFERENCE)
    def test_starts_from_the_reference_draws(self, norm):
        if not (paths.SHARED / "golden/apgd_conv20.npz").exists():
            self.skipTest(paths.NO_SHARED)
        g = np.load(paths.SHARED / "golden/apgd_conv20.npz")  # large: only what is read of it
        place, draw = {
            "Linf": (balls.place_linf, "rand"),
            "L2": (balls.place_l2, "randn"),
            "L1": (balls.place_l1, "randn"),
        }[norm]
        images, epsilon = jnp.asarray(g["x"]), jnp.full(8, EPSILON[REFERENCE[norm]], jnp.float32)
        start = place(jnp.asarray(g[f"{norm}_draw_{draw}"]), images, epsilon)
        expected = g[f"conv_{norm}_ce_t_x_adv"][0]
        # L1: the reference sums 3072 of what is taken away; the residue of ours is the same.
        np.testing.assert_allclose(start, expected, atol=1e-5 if norm == "L1" else 1e-7)
        np.testing.assert_array_equal(start == g["x"], expected == g["x"])


@pytest.mark.matrix
class FullGoldenTest(GoldenCase):
    """Every golden array of APGD."""

    def test_two_steps_in_full(self):
        if not (paths.SHARED / "golden/apgd_twostep.npz").exists():
            self.skipTest(paths.NO_SHARED)
        self.check_two_steps(load(paths.SHARED / "golden/apgd_twostep.npz"))

    @parameterized.parameters("conv", "lin")
    def test_in_full(self, net):
        if not (paths.SHARED / f"golden/apgd_{net}20.npz").exists():
            self.skipTest(paths.NO_SHARED)
        g = load(paths.SHARED / f"golden/apgd_{net}20.npz")
        for key in sorted(k.removesuffix("_loss_iter") for k in g if k.endswith("_loss_iter")):
            if not key.endswith("_t"):
                with self.subTest(key):
                    self.check(g, key)

    @parameterized.product(norm=tuple(REFERENCE), loss=tuple(LOSS))
    def test_hundred_iterations(self, norm, loss):
        if not (paths.SHARED / "golden/apgd_conv100_curves.npz").exists():
            self.skipTest(paths.NO_SHARED)
        g = load(paths.SHARED / "golden/apgd_conv100_curves.npz")
        data = load(paths.SHARED / "golden/data.npz")
        key = f"conv_{norm}_{loss}"
        start = jnp.asarray(data["x"][g["idx"]])
        state, seen = run_like(g, key, 100, start)
        golden = {k: g[f"{norm}_{loss}_x0_{k}"] for k in ("loss_best", "acc_final", "step_size")}
        np.testing.assert_array_equal(state.correct, golden["acc_final"])
        error = np.abs(seen["state"].loss_best - golden["loss_best"])[-1]
        # One image of 32 may end elsewhere, as the reference's own float64 twin does under DLR.
        self.assertLessEqual((error > 1e-3 + 1e-4 * np.abs(golden["loss_best"][-1])).sum(), 1)
        self.assertLess(error.max(), 0.15)
        if norm == "L1":
            np.testing.assert_array_equal(seen["state"].step[:100], golden["step_size"])
            np.testing.assert_array_equal(seen["state"].kept[:100], g[f"{norm}_{loss}_x0_topk"])


class ReferenceTest(parameterized.TestCase):
    """The reference library itself in float64, where rounding decides nothing."""

    @parameterized.product(norm=("Linf", "L2"), loss=tuple(LOSS), steps=(3, 30))
    @pytest.mark.slow
    def test_parity(self, norm, loss, steps):
        try:
            import torch
            from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
        except ImportError:
            self.skipTest(paths.PARITY)
        rng = np.random.default_rng(5)
        weights = [rng.normal(size=s) / math.sqrt(s[0]) for s in ((75, 24), (24, 7))]
        # Too small for the label to rank third, where the gradient of DLR cancels to 1e-12 and
        # L2 would normalize what rounding left of it.
        x, radius = rng.random((6, 5, 5, 3)), {"Linf": 8 / 255, "L2": 0.1}[norm]
        start = x + rng.uniform(-1, 1, x.shape) * radius / (1 if norm == "Linf" else 9)
        target = rng.integers(0, 7, 6)
        y = np.sin(x.reshape(6, -1) * 3 @ weights[0]) @ weights[1]
        y = y.argmax(axis=1)

        def torch_net(x):
            w1 = weights[0].reshape(5, 5, 3, 24).transpose(2, 0, 1, 3).reshape(75, 24)
            return torch.sin((x.flatten(1) * 3) @ torch.tensor(w1)) @ torch.tensor(weights[1]) * 2

        torch.set_default_dtype(torch.float64)  # its table of losses has the default type
        try:
            attack_class = APGDAttack_targeted if loss == "dlrt" else APGDAttack
            attack = attack_class(torch_net, n_iter=steps, norm=norm, eps=radius, device="cpu")
            attack.loss = LOSS[loss]
            attack.y_target = torch.tensor(target)
            images, points = (torch.tensor(v.transpose(0, 3, 1, 2).copy()) for v in (x, start))
            attack.init_hyperparam(images)
            expected = attack.attack_single_run(images, torch.tensor(y), points)
        finally:
            torch.set_default_dtype(torch.float32)
        x_best, acc, loss_best, x_best_adv = (v.detach().numpy() for v in expected)
        with jax.enable_x64(True):
            w1, w2 = map(jnp.asarray, weights)
            run = functools.partial(
                attacks.apgd_run,
                lambda x: jnp.sin((x.reshape(len(x), -1) * 3) @ w1) @ w2 * 2,
                norm=REFERENCE[norm],
                epsilon=radius,
                steps=steps,
                loss=LOSS[loss],
            )
            state = jax.jit(lambda x, y, s, t: run(x, y, start=s, targets=t))(x, y, start, target)
        np.testing.assert_array_equal(state.correct, acc)
        np.testing.assert_allclose(state.loss_best, loss_best, rtol=1e-9)
        for ours, theirs in ((state.x_best, x_best), (state.x_best_adv, x_best_adv)):
            np.testing.assert_allclose(ours, theirs.transpose(0, 2, 3, 1), atol=1e-9)


class PropertyTest(parameterized.TestCase):
    """What holds for any network; a small one, and few compiled programs."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        w1, w2 = (
            jax.random.normal(jax.random.key(i), s) for i, s in enumerate(((48, 16), (16, 5)))
        )
        cls.net = staticmethod(lambda x: jnp.sin(x.reshape(len(x), -1) @ w1) @ w2)
        cls.images = jax.random.uniform(jax.random.key(2), (16, 4, 4, 3))
        cls.labels = jax.random.randint(jax.random.key(3), (16,), 0, 5, jnp.int32)

    @sweeps.rows(
        *itertools.product(NORMS, (attacks.apgd, attacks.pgd)), ("l1", attacks.apgd, False)
    )
    def test_stays_in_ball_and_box(self, norm, make, random_start=True):
        radius = {"linf": 0.1, "l2": 0.5, "l1": 2.0}[norm]
        attack = make(norm=norm, epsilon=radius, steps=7, random_start=random_start)
        images = jax.random.uniform(jax.random.key(4), (1000, 4, 4, 3)).at[::3].set(1.0)
        labels = jnp.tile(self.labels, 63)[:1000]
        images_adv = jax.jit(functools.partial(attack, self.net))(jax.random.key(0), images, labels)
        self.assertTrue((images_adv >= 0).all() and (images_adv <= 1).all())
        norms = norm_in_float64(np.asarray(images_adv, np.float64) - images, norm)
        np.testing.assert_array_less(norms, radius * (1 + 1e-5) + 1e-6)
        before, after = (
            attacks.ce_loss(self.net(x), labels) for x in (images, np.asarray(images_adv))
        )
        self.assertGreater(after.mean(), before.mean() + 0.1)

    @sweeps.rows(*itertools.product(NORMS, (attacks.apgd, attacks.pgd)))
    def test_zero_radius_is_identity(self, norm, make):
        attack = make(norm=norm, epsilon=0.0, steps=2, random_start=True)
        attack = jax.jit(functools.partial(attack, self.net))
        images_adv = attack(jax.random.key(0), self.images, self.labels)
        np.testing.assert_array_equal(images_adv, self.images)

    @parameterized.parameters(*NORMS)
    def test_best_loss_never_falls(self, norm):
        start = jnp.asarray(self.images)
        g = {"y": self.labels, "ytarget": jnp.zeros(16, jnp.int32)}
        NETS["small"] = self.net
        _, seen = run_like(g, f"small_{ {v: k for k, v in REFERENCE.items()}[norm] }_ce", 10, start)
        best = seen["state"].loss_best
        self.assertTrue((np.diff(best, axis=0) >= 0).all())
        np.testing.assert_array_equal(best, np.maximum.accumulate(seen["loss"], axis=0))

    @sweeps.rows(
        ("linf", attacks.apgd), ("l2", attacks.apgd), ("l1", attacks.apgd), ("l1", attacks.pgd)
    )
    def test_order_and_padding_do_not_matter(self, norm, make):
        attack = make(norm=norm, epsilon=0.1, steps=4, random_start=True)
        attack = jax.jit(functools.partial(attack, self.net))
        keys = attacks.image_keys(jax.random.key(7), 16)
        expected = attack(keys, self.images, self.labels)
        np.testing.assert_array_equal(attack(jax.random.key(7), self.images, self.labels), expected)
        order = np.random.default_rng(0).permutation(16)
        shuffled = attack(keys[order], self.images[order], self.labels[order])
        np.testing.assert_array_equal(shuffled, expected[order])
        padded = attack(keys, self.images.at[5:].set(0), self.labels.at[5:].set(0))
        np.testing.assert_array_equal(padded[:5], expected[:5])

    @sweeps.rows(("linf", attacks.apgd), ("l2", attacks.pgd), ("l1", attacks.apgd))
    def test_image_without_gradient_stays(self, norm, make):
        attack = make(norm=norm, epsilon=0.1, steps=3, random_start=False)
        expected = jax.jit(functools.partial(attack, self.net))(None, self.images, self.labels)
        bad = self.images.at[2, 0, 0, 0].set(0.25).at[4, 1, 1, 1].set(0.25)

        def net(x):  # a hole in the derivative at 0.25: sqrt at 0
            return self.net(x) + jnp.sqrt(jnp.abs(x - 0.25)).sum(axis=(1, 2, 3))[:, None] * 0

        actual = jax.jit(functools.partial(attack, net))(None, bad, self.labels)
        np.testing.assert_array_equal(actual[jnp.array([2, 4])], bad[jnp.array([2, 4])])
        others = jnp.array([0, 1, 3, 5, 6])
        np.testing.assert_allclose(actual[others], expected[others], atol=1e-6)
        self.assertTrue((actual[others] != self.images[others]).any(axis=(1, 2, 3)).all())

    @sweeps.rows(attacks.apgd, attacks.pgd)
    def test_program_does_not_grow_with_steps(self, make):
        sizes = set()
        for steps in (3, 10):
            attack = make(epsilon=0.1, steps=steps, random_start=False)
            program = jax.make_jaxpr(functools.partial(attack, self.net, None))
            sizes.add(len(str(program(self.images, self.labels)).splitlines()))
        self.assertLen(sizes, 1)

    @parameterized.parameters("linf", "l1")
    def test_devices_do_not_matter(self, norm):
        """Image by image on 8 devices, inside shard_map with its type checks; no collective."""
        attack = attacks.apgd(norm=norm, epsilon=0.1, steps=3, random_start=True)
        attack = functools.partial(attack, self.net)
        arguments = attacks.image_keys(jax.random.key(7), 16), self.images, self.labels
        mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        spec = jax.sharding.PartitionSpec("data")
        spread = jax.jit(
            jax.shard_map(attack, mesh=mesh, in_specs=(spec, spec, spec), out_specs=spec)
        )
        # Sums of another batch size may be ordered differently.
        np.testing.assert_allclose(spread(*arguments), jax.jit(attack)(*arguments), atol=1e-6)
        program = spread.lower(*arguments).compile().as_text()
        for collective in ("all-reduce(", "all-gather(", "all-to-all(", "collective-permute("):
            self.assertNotIn(collective, program)

    def test_cost(self):
        """K+1 forward and K backward passes: one of each in the loop, one forward after it."""
        attack = attacks.apgd(epsilon=0.1, steps=5)
        calls = []

        def net(x):
            calls.append(x.shape)
            return self.net(x)

        jax.eval_shape(functools.partial(attack, net, None), self.images, self.labels)
        self.assertLen(calls, 2)

    @pytest.mark.slow
    def test_two_machines_share_a_batch(self):
        """Slots refilled by a machine of another radius and length finish as if alone."""
        machines = [
            attacks.apgd_machine(norm="l1", epsilon=e, steps=n) for e, n in ((3, 6), (1, 4))
        ]
        alone, mixed = [], []
        for i, machine in enumerate(machines):
            take = slice(8 * i, 8 * i + 8)
            state = machine.init(self.images[take], self.labels[take], start=self.images[take])
            mixed.append(state)
            alone.append(
                attacks.run(machine, self.net, state, gradient_steps=4, final_forward=False)
            )
        state = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), *mixed)
        state = attacks.run(machines[0], self.net, state, gradient_steps=4, final_forward=False)
        for i in (0, 1):
            np.testing.assert_allclose(state.points[8 * i : 8 * i + 8], alone[i].points, atol=1e-6)
        finished = machines[1].finished(
            told(machines[0], state, self.net(state.points), state.points)
        )
        np.testing.assert_array_equal(finished, np.arange(16) >= 8)

    def test_three_starts(self):
        settings = {"norm": "linf", "epsilon": 0.1, "steps": 1}
        machine = attacks.apgd_machine(**settings)
        keys = attacks.image_keys(jax.random.key(0), 16)
        noisy = self.images * 3 - 1
        np.testing.assert_array_equal(
            machine.init(noisy, self.labels).points, jnp.clip(noisy, 0, 1)
        )
        random = machine.init(self.images, self.labels, keys=keys, start="random").points
        np.testing.assert_array_equal(
            random, attacks.GEOMETRIES["linf"].sample(keys, self.images, jnp.full(16, 0.1))
        )
        given = machine.init(self.images, self.labels, start=random).points
        np.testing.assert_array_equal(given, random)


def sums(images):
    """A network of three classes: the sum of each channel."""
    return images.sum(axis=(1, 2))


class ErrorTest(parameterized.TestCase):
    @sweeps.rows(
        ({"norm": "l3"}, "norm='l3' is unknown; choose one of linf, l2, l1"),
        (
            {"loss": "xent"},
            "loss='xent' is unknown; choose one of ce, dlr, dlr-targeted, cw, cw-floor, ce-cw, pm",
        ),
        ({"loss": "dlr-targeted"}, "needs a target class per image"),
        ({"epsilon": 4}, r"epsilon=4.0 is larger than the pixel range \[0, 1\]; write 4/255"),
        ({"epsilon": -0.1}, "epsilon=-0.1 is not a valid radius; pass a finite number >= 0"),
        ({"epsilon": float("nan")}, "epsilon=nan is not a valid radius"),
        ({"steps": 0}, "steps=0 must be an int >= 1"),
        ({"steps": 2.0}, "steps=2.0 must be an int"),
        ({"steps": True}, "steps=True must be an int"),
        ({"epsilon": "4/255"}, r"epsilon='4/255' is not a number; pass one without quotes"),
        ({"epsilon": None}, "epsilon=None is not a number"),
        ({"kept_fraction": 2}, "kept_fraction=2 must be a fraction .*above 0 and at most 1"),
        ({"kept_fraction": -1}, "kept_fraction=-1 must be a fraction"),
        ({"kept_fraction": 0.0}, "kept_fraction=0.0 must be a fraction"),
    )
    def test_settings(self, changes, message):
        for attack in (attacks.apgd, attacks.pgd):
            with self.assertRaisesRegex(ValueError, message):
                attack(**{"epsilon": 0.1, "steps": 2} | changes)
        if "steps" not in changes:
            with self.assertRaisesRegex(ValueError, message):
                attacks.fgsm(**{"epsilon": 0.1} | changes)

    def test_large_radii_elsewhere(self):
        attacks.apgd(norm="l2", epsilon=2, steps=1)
        attacks.apgd(norm="l1", epsilon=75, steps=1)

    @sweeps.rows(
        ({"images": jnp.zeros((2, 4, 4, 3), jnp.uint8)}, "divide uint8 images by 255 first"),
        ({"labels": jnp.zeros(3, jnp.int32)}, r"labels of shape \(3,\) do not fit 2 images"),
        ({"labels": jnp.zeros((2, 1), jnp.int32)}, r"labels are int32 of shape \(2, 1\); pass cl"),
        ({"labels": jnp.zeros(2)}, r"labels are float32 of shape \(2,\); pass class labels as int"),
        ({"labels": [0.5, 1.0]}, "labels are float32 .*soft targets as floats"),
        ({"images": jnp.zeros((0, 4, 4, 3)), "labels": []}, "no images given"),
        ({"start": "corner"}, "start='corner' is unknown; pass 'image', 'random' or an array"),
        ({"start": "random"}, "a random start needs random keys; pass keys"),
        ({"start": jnp.zeros((1, 4, 4, 3))}, "pass one point per image"),
    )
    def test_arrays(self, changes, message):
        arguments = {"images": jnp.zeros((2, 4, 4, 3)), "labels": jnp.zeros(2, jnp.int32)}
        with self.assertRaisesRegex(ValueError, message):
            machine = attacks.apgd_machine(norm="linf", epsilon=0.1, steps=2)
            machine.init(**arguments | changes)

    @sweeps.fast("l2")
    @parameterized.parameters(*NORMS)
    def test_numpy_arrays_and_lists_are_converted(self, norm):
        images = np.random.default_rng(0).random((2, 4, 4, 3), np.float32)
        for attack in (
            attacks.apgd(norm=norm, epsilon=0.1, steps=2),
            attacks.fgsm(norm=norm, epsilon=0.1),
        ):
            expected = attack(sums, None, jnp.asarray(images), jnp.array([0, 2]))
            for labels in ([0, 2], np.array([0, 2])):
                actual = attack(sums, None, images, labels)
                np.testing.assert_array_equal(actual, expected)

    @pytest.mark.slow
    def test_labels_outside_the_classes(self):
        images = jnp.full((3, 4, 4, 3), 0.5)
        for make in (attacks.apgd, attacks.pgd):
            attack = make(epsilon=0.1, steps=1)
            attack = functools.partial(attack, sums, jax.random.key(0), images)
            for labels, first in (([0, 3, -1], 3), ([1, -1, 3], -1)):
                with self.assertRaisesRegex(
                    ValueError,
                    rf"^labels\[1\]={first} is outside the 3 classes .*; pass numbers from 0 to 2$",
                ):
                    attack(labels)
            attack([0, 1, 2])
            jax.jit(attack)(jnp.array([0, 3, -1]))  # undefined, but not an error
        settings = {"norm": "linf", "epsilon": 0.1, "steps": 1, "loss": "dlr-targeted"}
        with self.assertRaisesRegex(ValueError, r"targets\[2\]=4 is outside the 4 classes"):
            net = lambda x: x.sum(axis=1).reshape(3, -1)[:, :4]  # noqa: E731
            attacks.apgd_run(
                net, images, jnp.zeros(3, jnp.int32), targets=jnp.array([1, 2, 4]), **settings
            )

    def test_soft_targets_of_other_classes(self):
        for loss in ("ce", "kl"):
            attack = attacks.apgd(epsilon=0.1, steps=1, loss=loss)
            with self.assertRaisesRegex(
                ValueError, rf"'{loss}': targets of shape \(2, 5\) do not fit logits of .*\(2, 3\)"
            ):
                attack(sums, None, jnp.zeros((2, 4, 4, 3)), jnp.full((2, 5), 0.2))

    def test_keys_and_targets(self):
        for key in (0, [0, 1], np.zeros(2, np.int64)):
            with self.assertRaisesRegex(
                ValueError, r"is not a JAX key; pass jax.random.key\(seed\)"
            ):
                attacks.image_keys(key, 2)
        with self.assertRaisesRegex(ValueError, "pass one or"):
            attacks.image_keys(jax.random.split(jax.random.key(0), 3), 2)
        with self.assertRaisesRegex(ValueError, "a random start needs a key; pass"):
            attacks.image_keys(None, 2)
        np.testing.assert_array_equal(  # keys of the old kind
            jax.random.key_data(attacks.image_keys(jax.random.PRNGKey(3), 2)),
            jax.random.key_data(attacks.image_keys(jax.random.key(3), 2)),
        )
        machine = attacks.apgd_machine(norm="linf", epsilon=0.1, steps=2, loss="dlr-targeted")
        with self.assertRaisesRegex(ValueError, "pass targets="):
            machine.init(jnp.zeros((2, 4, 4, 3)), jnp.zeros(2, jnp.int32))
        masks = jnp.ones((2, 4, 4), jnp.int32)
        with self.assertRaisesRegex(ValueError, r"int32 of shape \(2, 4, 4\); pass one class per"):
            machine.init(jnp.zeros((2, 4, 4, 3)), jnp.zeros(2, jnp.int32), targets=masks)


@pytest.mark.computes
class MultiRadiusTest(parameterized.TestCase):
    """The L1 schedule, stage by stage from the reference's starts.

    Its very first start is chaotic in the last bits (it projects twice onto the same ball), so
    that the three stages in a row are compared by their verdicts only: test_autoattack.py.
    """

    @sweeps.fast(1)
    @parameterized.parameters(("ce", "ce"), ("dlrt", "dlr-targeted"))
    def test_stages_in_small(self, golden_loss, loss):
        self.check(load(paths.GOLDEN / "attacks/l1_schedule.npz"), golden_loss, loss)

    @parameterized.parameters(("ce", "ce"), ("dlrt", "dlr-targeted"))
    @pytest.mark.matrix
    def test_stages_in_full(self, golden_loss, loss):
        if not (paths.SHARED / "golden/apgd_l1_schedule.npz").exists():
            self.skipTest(paths.NO_SHARED)
        self.check(load(paths.SHARED / "golden/apgd_l1_schedule.npz"), golden_loss, loss)

    def check(self, g, golden_loss, loss):
        g = g | {k.removeprefix(golden_loss + "_"): v for k, v in g.items()}
        radii, lengths = EPSILON["l1"] * np.array([3, 2, 1]), (6, 6, 8)
        np.testing.assert_array_equal(g["epss"], radii)
        np.testing.assert_array_equal(g["iters"], lengths)
        integers = functools.partial(jnp.asarray, dtype=jnp.int32)
        for stage, (radius, steps) in enumerate(zip(radii, lengths, strict=True)):
            machine = attacks.apgd_machine(norm="l1", epsilon=radius, steps=steps, loss=loss)
            first = int(g["stage_offsets"][stage])
            rows = slice(first, first + steps + 1)
            state = machine.init(
                jnp.asarray(g["x"]),
                integers(g["y"]),
                start=jnp.asarray(g["stage_x_start"][stage]),
                targets=integers(g["ytarget"]),
            )
            run = functools.partial(drive, machine, "conv", evaluations=steps + 1)
            _, seen = jax.jit(run)(state)
            assert_within(seen["points"][0], g["stage_x_start"][stage], 1e-7)
            assert_within(seen["points"][1], g["x_eval1"][stage], 1e-5)
            # The golden README's: 1e-3 or 1e-4 relative, of DLR as in the other trajectories.
            expected = g["loss_eval"][rows]
            assert_within(seen["loss"], expected, 1e-3 + 1e-4 * np.abs(expected))
            np.testing.assert_array_equal(seen["right"], g["correct_eval"][rows])
            # What the reference used in step i is what we hold after evaluation i.
            assert_within(seen["state"].step[:-1], g["step_size"][rows][1:], 1e-6)
            assert_within(seen["state"].kept[:-1], g["topk"][rows][1:], 1e-6)

    def test_three_stages_of_two_pixels(self):
        """The stages, their radii, starts and targets, of a linear network, from the image."""
        weights = jnp.float32([[1.0, -2.0, 0.5, 3.0], [0.5, 1.0, -1.0, 0.2], [2.0, 0.0, 1.0, -1.0]])
        images = jnp.float32([[0.4, 0.5, 0.6], [0.9, 0.1, 0.3]]).reshape(2, 1, 3, 1)
        labels, aims = jnp.int32([0, 1]), jnp.int32([3, 2])

        def loss(logits, labels, targets):
            return (
                jnp.take_along_axis(logits, targets[:, None], 1)[:, 0]
                - jnp.take_along_axis(logits, labels[:, None], 1)[:, 0]
            )

        made = {
            "norm": "l1",
            "epsilon": 0.2,
            "steps": 6,
            "loss": attacks.Goal(loss, logits=True, aims=True),
        }
        machine = attacks.apgd_multi_radius_machine(**made)
        begin = functools.partial(machine.init, targets=aims, start="image")
        state = jax.jit(begin)(images, labels)
        project = jax.jit(balls.GEOMETRIES["l1"].project)

        @jax.jit
        def step(state):
            made = attacks.advance(machine, lambda x, draw: x.reshape(2, 3) @ weights, state)
            better = machine.loss(state, made.outputs) > state.run.loss_best
            best = jnp.where(better[:, None, None, None], made.points, state.run.x_best)
            facts = {"stage": state.stage, "points": made.points, "best": best, "run": state.run}
            facts |= {"counts": machine.counts(state), "finished": machine.finished(state)}
            return made.state, facts

        rows = []
        for _ in range(9):
            state, facts = step(state)
            rows.append(jax.device_get(facts))
        stages = [row["stage"].tolist() for row in rows]
        sums = [np.abs(row["points"] - images).sum((1, 2, 3)) for row in rows]
        for before, row in zip([rows[0], *rows[:-1]], rows, strict=True):
            self.assertEqual(row["counts"].tolist(), (row["stage"] == 2).tolist())
            self.assertFalse(row["finished"].any())
            if row["stage"][0] != before["stage"][0]:
                radius = np.full(2, 0.2 * (3 - row["stage"][0]), np.float32)
                start = project(before["best"], images, radius)
                np.testing.assert_allclose(row["points"], start, atol=1e-6)
                np.testing.assert_allclose(row["run"].epsilon, radius, rtol=1e-6)
                np.testing.assert_array_equal(row["run"].targets, aims)
        # Each has its start more: steps 2, 2, 2.
        self.assertEqual(stages, [[s, s] for s in (0, 0, 0, 1, 1, 1, 2, 2, 2)])
        self.assertTrue(np.asarray(machine.finished(state)).all())
        np.testing.assert_allclose(sums[0], 0)
        for stage, radius in enumerate((0.6, 0.4, 0.2)):
            here = np.array(sums[3 * stage : 3 * stage + 3])
            self.assertLessEqual(here.max(), radius + 1e-5)
            self.assertGreater(here.max(), 0.9 * radius)
        np.testing.assert_allclose(machine.result(state), state.run.x_best, atol=1e-6)

    def test_a_stage_begins_at_the_best_point_of_the_one_before(self):
        machine = attacks.apgd_multi_radius_machine(
            norm="l1", epsilon=0.5, steps=6, loss=lambda logits, labels: logits[:, 0]
        )
        images = jnp.full((1, 2, 2, 1), 0.5)
        aims = {"targets": jnp.array([1]), "start": "image"}
        state, met = machine.init(images, jnp.array([0]), **aims), []
        for loss in (1.0, 9.0, 2.0):  # the image and two steps
            met.append(machine.query(state))
            gradient = jnp.float32([4, 3, 2, 1]).reshape(1, 2, 2, 1) * (-1) ** len(met)
            state = machine.tell(state, jnp.float32([loss]), None, gradient)
        self.assertEqual(int(state.stage[0]), 1)
        self.assertGreater(np.abs(met[2] - met[1]).max(), 0.1)
        expected = balls.GEOMETRIES["l1"].project(met[1], images, jnp.float32([1.0]))
        np.testing.assert_allclose(machine.query(state), expected, atol=1e-6)

    @sweeps.rows((5, (2, 2, 1)), (10, (3, 3, 4)), (11, (4, 4, 3)), (100, (30, 30, 40)))
    def test_lengths_of_stages(self, steps, expected):
        made: list[int] = []

        def machine(**how):
            made.append(how["steps"])
            return attacks.apgd_machine(**how)

        with mock.patch.object(apgd_radii, "apgd_machine", machine):
            attacks.apgd_multi_radius_machine(norm="l1", epsilon=1.0, steps=steps)
        self.assertEqual(tuple(made), expected)

    def test_too_few_steps(self):
        with self.assertRaisesRegex(ValueError, "steps=2 cannot be split into three stages"):
            attacks.apgd_multi_radius_machine(norm="l1", epsilon=12.0, steps=2)
