"""AutoAttack against auto-attack a392200 (pyautoattack 0.2.0), and what the engine promises."""

import functools
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from jaxrobust.attacks.ensembles import VERSIONS, base, most_passes, named, plan
from jaxrobust.evaluation import autoattack
from jaxrobust.evaluation.engine import engine, slots
from jaxrobust.evaluation.engine.schedule import SlotRows
from jaxrobust.evaluation.network import checks
from tests.support import paths, sweeps
from tests.support.ensemble import GOLDEN, IMAGES, LABELS, NETS, QUICK, evaluate, quick
from tests.support.golden import norm_in_float64
from tools.bench import slice_programs

EPSILON = {"linf": 8 / 255, "l2": 0.5, "l1": 12.0}
REFERENCE = {"linf": "Linf", "l2": "L2", "l1": "L1"}


def on_devices(count):
    """The engine sees only so many of the 8 fake devices."""
    return mock.patch.object(engine, "local_devices", lambda: jax.local_devices()[:count])


class Promises(parameterized.TestCase):
    def check_promises(self, result, norm):
        fooled = result.clean & ~result.robust
        delta = result.images_adv.astype(np.float64) - IMAGES[: len(fooled)]
        norms = norm_in_float64(delta, norm)
        self.assertLessEqual(norms.max(), EPSILON[norm] * (1 + 1e-5) + 1e-6)
        self.assertEqual(norms[~fooled].max(initial=0), 0)
        self.assertBetween(result.images_adv.min(), 0, 1)
        self.assertBetween(result.images_adv.max(), 0, 1)
        predicted = np.argmax(NETS["conv"](jnp.asarray(result.images_adv)), axis=1)
        np.testing.assert_array_equal(predicted == LABELS[: len(fooled)], result.robust)
        np.testing.assert_array_equal(result.verdicts.reached, np.where(fooled, predicted, -1))


@pytest.mark.computes
class GoldenTest(Promises):
    """The verdicts on the images. Draws differ, so one image may too (the golden README)."""

    @sweeps.fast("linf")
    @parameterized.parameters(*EPSILON)
    def test_gradient_attacks(self, norm):
        n, names = 24, VERSIONS["standard"][:3]
        result = evaluate(
            NETS["conv"], IMAGES[:n], LABELS[:n], norm=norm, epsilon=EPSILON[norm], attacks=names
        )
        np.testing.assert_array_equal(result.clean, GOLDEN["clean_correct"][:n])
        after = f"{REFERENCE[norm]}_seed0_after_"
        self.assertLessEqual(np.sum(result.robust != GOLDEN[after + "fab_t"][:n]), 1)
        by_ce = GOLDEN["clean_correct"][:n] & ~GOLDEN[after + "apgd_ce"][:n]
        self.assertLessEqual(np.sum((result.fooled_by == "apgd-ce") != by_ce), 1)
        self.check_promises(result, norm)
        self.assertEqual(list(result.accuracy_after), list(names))
        self.assertEqual(result.accuracy_after["fab-t"], result.robust.mean())


@pytest.mark.matrix
class GoldenInFullTest(Promises):
    @parameterized.parameters(*itertools.product(EPSILON, (0, 1)))
    def test_cascade(self, norm, seed):
        result = evaluate(NETS["conv"], IMAGES, LABELS, norm=norm, epsilon=EPSILON[norm], seed=seed)
        np.testing.assert_array_equal(result.clean, GOLDEN["clean_correct"])
        standing = result.clean.copy()
        for name in VERSIONS["standard"]:
            standing &= result.fooled_by != name
            key = f"{REFERENCE[norm]}_seed{seed}_after_{name.replace('-', '_')}"
            self.assertLessEqual(np.sum(standing != GOLDEN[key]), 1, key)
            self.assertEqual(result.accuracy_after[name], standing.mean())
        self.check_promises(result, norm)

    @parameterized.parameters(*itertools.product(EPSILON, VERSIONS["standard"]))
    def test_each_attack_alone(self, norm, name):
        result = evaluate(
            NETS["conv"], IMAGES, LABELS, norm=norm, epsilon=EPSILON[norm], attacks=(name,)
        )
        expected = GOLDEN[f"{REFERENCE[norm]}_seed0_individual_{name.replace('-', '_')}"]
        allowed = 1 if name != "square" else 6 if norm == "l1" else 4
        self.assertLessEqual(np.sum(result.robust != expected), allowed)
        self.check_promises(result, norm)


@pytest.mark.computes
class CostTest(parameterized.TestCase):
    @pytest.mark.slow
    def test_no_more_passes_than_the_reference(self):
        # Per image and job, from section 11 of the facts: APGD 102 forward and 101 backward, FAB
        # 203 and 100, Square 2 plus its queries. Ours stop early besides.
        result = quick("conv", epsilon=4 / 255, overrides={"square": {"steps": 100}})
        costs = {c.attack: c for c in result.costs}
        survivors = int(result.robust.sum())
        self.assertGreater(survivors, 5)
        met = result.clean.sum()
        for name, jobs, forward, backward in (
            ("apgd-ce", 1, 102, 101),
            ("apgd-t", 9, 102, 101),
            ("fab-t", 9, 203, 100),
            ("square", 1, 103, 0),
        ):
            cost = costs[name]
            self.assertLessEqual(cost.forward, 1.02 * met * jobs * forward)
            self.assertLessEqual(cost.backward, 1.02 * met * jobs * backward)
            met -= cost.fooled
            self.assertGreaterEqual(cost.backward, 0.97 * met * jobs * backward)
        self.assertEqual(met, survivors)


@pytest.mark.computes
class RandomnessTest(parameterized.TestCase):
    def run_on(self, devices, batch, **changes):
        with on_devices(devices):
            return quick(n=24, batch_size=batch, **changes)

    @pytest.mark.slow
    def test_verdicts_do_not_depend_on_slots_or_devices(self):
        results = [self.run_on(d, b) for d, b in ((1, 1), (1, 7), (2, 14), (8, 64))]
        for r in results[1:]:
            np.testing.assert_array_equal(r.fooled_by, results[0].fooled_by)
        self.assertGreater(len(set(results[0].fooled_by)), 2)

    @pytest.mark.matrix
    def test_the_draws_are_bit_equal(self):
        for name in VERSIONS["plus"]:
            setting = autoattack_setting(name, restarts=2)
            states = [
                begin(setting, devices, batch) for devices, batch in ((1, 1), (1, 7), (8, 64))
            ]
            for state in states[1:]:
                jax.tree.map(
                    lambda a, b: np.testing.assert_array_equal(a[:1], b[:1]), states[0], state
                )

    def test_one_program_for_all_names_targets_and_restarts(self):
        """FAB's knows whether it aims, and its first restart begins elsewhere: four programs."""
        fab, apgd = autoattack_setting("fab-t", steps=7, eot=3), autoattack_setting("apgd-t")
        for targets, restarts, expected in ((0, 1, (0, 1)), (0, 2, (0, 2)), (1, 5, (1, 2)),
                                            (2, 2, (1, 2)), (9, 1, (1, 1))):  # fmt: skip
            given = {"targets": targets, "restarts": restarts}
            found = slots.program_of(fab._replace(**given))
            own = dict(zip(given, expected, strict=True))
            self.assertEqual(found, fab._replace(name="", steps=7, eot=3, **own))
            found = slots.program_of(apgd._replace(**given))
            self.assertEqual(found, apgd._replace(name="", targets=0, restarts=1))

    def test_a_restart_has_the_start_of_its_row(self):
        setting = slots.program_of(autoattack_setting("fab-t", restarts=5))
        first, second, third = (
            np.asarray(begin(setting, 1, 1, restart=r, name="fab-t").state.points) for r in range(3)
        )
        np.testing.assert_array_equal(first, IMAGES[:1])
        self.assertFalse((second == first).all())
        self.assertFalse((third == second).all())


def autoattack_setting(name, **changes):
    return base(name, "linf")._replace(**changes)


def begin(setting, devices, batch, target=1, restart=1, name=""):
    """Slots at the beginning of their jobs; the image is the same in all of them."""
    with on_devices(devices):
        runner = engine.make(NETS["lin"], slots=batch)
    full = functools.partial(np.full, runner.slots)
    rows = SlotRows(
        fresh=full(True),
        keep=full(True),
        images=np.repeat(IMAGES[:1], runner.slots, axis=0),
        labels=full(LABELS[0], np.int32),
        targets=full(target, np.int32),
        restarts=full(restart, np.int32),
        ids=full(5, np.uint32),
        first=full(0, np.int32),
    )
    root = np.array([0, 3], np.uint32)
    number = np.uint32(named(name or setting.name).number)
    return jax.tree.map(
        np.asarray,
        jax.jit(functools.partial(slots.begin, setting))(np.float32(0.1), root, number, rows),
    )


class NarrowTest(parameterized.TestCase):
    @parameterized.parameters(1, 2)
    @pytest.mark.slow
    def test_fewer_slots_go_on_with_what_is_left(self, devices):
        """If a network takes any batch, as soon as a quarter of the slots are idle."""

        def run(network=NETS["conv"]):
            how = {"norm": "l2", "epsilon": 0.1, "attacks": ("apgd-ce", "square")}
            steps = {"apgd-ce": {"steps": 30}, "square": {"steps": 200}}
            with on_devices(devices), mock.patch.object(engine, "CALL_SECONDS", 1e-3):
                return evaluate(network, IMAGES[6:9], LABELS[6:9], overrides=steps, **how)

        wide = run()
        with mock.patch.object(engine, "WORTH", 0.0):
            narrow, fixed = run(), run(lambda x: NETS["conv"](x.reshape(8, 32, 32, 3)))
        for other in (narrow, fixed):
            np.testing.assert_array_equal(other.fooled_by, wide.fooled_by)
            # Rounding depends on the batch.
            np.testing.assert_allclose(other.images_adv, wide.images_adv, atol=1e-4)
        idle = [sum(cost.idle for cost in run.costs) for run in (wide, narrow, fixed)]
        self.assertLess(idle[1], 0.7 * idle[0])
        self.assertGreater(idle[2], 0.9 * idle[0])


class EdgesTest(parameterized.TestCase):
    def test_no_images(self):
        result = quick(n=0)
        self.assertEqual(result.robust.shape, (0,))
        self.assertEqual(result.images_adv.shape, (0, 32, 32, 3))
        self.assertIn("robust 0 of 0", result.table())
        brief = result.table(brief=True).splitlines()
        self.assertEqual(brief[0].split(), ["attack", "fooled", "forward", "backward", "time"])
        self.assertNotIn("clean", " ".join(brief))

    @pytest.mark.slow
    def test_zero_radius_fools_nobody(self):
        names = ("apgd-t", "fab-t")
        for norm in EPSILON:
            result = quick(n=8, norm=norm, epsilon=0.0, attacks=names)
            np.testing.assert_array_equal(result.robust, result.clean)
            # So each makes all the passes that progress and its estimates count on.
            settings = plan(norm, "standard", names, {name: QUICK[name] for name in names})
            for cost, setting in zip(result.costs, settings, strict=True):
                most = result.clean.sum() * most_passes(setting, 10)
                self.assertEqual(cost.forward + cost.backward, most)

    def test_the_start_counts(self):
        """A network that knows one image by heart is fooled by the first random start."""
        known, path = jnp.asarray(IMAGES[:1]), Path(self.create_tempdir()) / "ledger.jsonl"

        def logits_fn(x):
            other = (x != known).any(axis=(1, 2, 3)).astype(jnp.float32)
            return jnp.stack([jnp.full_like(other, 0.5), other], axis=1)

        settings = {"norm": "linf", "epsilon": 0.1, "version": "custom", "attacks": ("apgd-ce",)}
        result = evaluate(logits_fn, IMAGES[:1], np.zeros(1, int), ledger=path, **settings)
        self.assertEqual(result.fooled_by.tolist(), ["apgd-ce"])
        self.assertEqual(json.loads(path.read_text().splitlines()[-1])["iterations"], 1)

    @parameterized.parameters(2, 3)
    @pytest.mark.matrix
    def test_few_classes(self, classes):
        logits_fn = lambda x: NETS["conv"](x)[:, :classes]  # noqa: E731
        labels = np.argmax(logits_fn(jnp.asarray(IMAGES[:16])), axis=1)
        with mock.patch("jaxrobust.evaluation.engine.autoattack.say") as say:
            result = autoattack(
                logits_fn, IMAGES[:16], labels, norm="linf", epsilon=8 / 255, overrides=QUICK
            )
        said = " ".join(call.args[0] for call in say.call_args_list)
        self.assertIn(f"{classes - 1} target classes instead of 9", said)
        self.assertIn("targeted DLR loss needs 4 classes; using the margin", said)
        self.assertTrue(result.clean.all())
        self.assertLess(result.robust.mean(), 1)
        for name in ("apgd-dlr", "fab") if classes == 2 else ("apgd-dlr", "apgd-t"):
            ball = {"norm": "linf", "epsilon": 32 / 255}
            how = {"version": "custom", "attacks": (name,), "overrides": {name: {"steps": 30}}}
            alone = evaluate(logits_fn, IMAGES[:16], labels, **ball, **how)
            self.assertLess(alone.robust.mean(), 0.8, name)

    @parameterized.parameters(jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit)
    @pytest.mark.slow
    def test_inside_another_mesh(self, kind):
        mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
        with jax.set_mesh(mesh):
            inside = quick(n=16)
        np.testing.assert_array_equal(inside.fooled_by, quick(n=16).fooled_by)


class VersionsTest(parameterized.TestCase):
    @pytest.mark.slow
    def test_plus(self):
        overrides = {n: {"steps": 8} for n in VERSIONS["plus"]} | {
            "fab": {"steps": 5, "restarts": 2}
        }
        result = quick(n=16, version="plus", overrides=overrides)
        self.assertEqual(tuple(result.accuracy_after), VERSIONS["plus"])
        restarts = {a["name"]: a["restarts"] for a in result.attacks}
        self.assertEqual(
            restarts, {"apgd-ce": 5, "apgd-dlr": 5, "fab": 2, "square": 1, "apgd-t": 1, "fab-t": 1}
        )

    def test_standard_l1(self):
        attacks_ = {a["name"]: a for a in quick(n=4, norm="l1", epsilon=1.0).attacks}
        self.assertEqual(attacks_["apgd-ce"]["machine"], "apgd-multi-radius")
        self.assertEqual(attacks_["apgd-ce"]["restarts"], 5)
        self.assertEqual(attacks_["apgd-t"]["targets"], 5)
        self.assertEqual(attacks_["fab-t"]["targets"], 9)

    @pytest.mark.skipif(not find_spec("pyautoattack"), reason=paths.PARITY)
    @pytest.mark.slow
    def test_rand_agrees_with_the_reference(self):
        import pyautoattack
        import torch

        def network(xp, x, noise):  # not linear, so that averaging over draws matters
            hidden = xp.tanh(x.reshape(len(x), -1) @ first)
            return hidden @ second + noise

        rng = np.random.default_rng(0)
        images = rng.random((128, 4, 4, 1), np.float32)
        first = rng.standard_normal((16, 32)).astype(np.float32)
        second = rng.standard_normal((32, 10)).astype(np.float32)
        labels = np.argmax(network(np, images, 0), axis=1)

        def ours(x, keys):
            return network(jnp, x, jax.vmap(lambda k: jax.random.normal(k, (10,)))(keys))

        steps = {"steps": 10}
        how = {"version": "rand", "overrides": dict.fromkeys(VERSIONS["rand"], steps)}
        result = evaluate(ours, images, labels, norm="linf", epsilon=0.06, **how)
        first, second = torch.tensor(first), torch.tensor(second)
        torch.manual_seed(0)
        theirs = torch.nn.Module()
        theirs.forward = lambda x: network(torch, x, torch.randn(len(x), 10))
        attack = pyautoattack.AutoAttack(theirs, norm="Linf", eps=0.06, version="rand", seed=0)
        attack.apgd = pyautoattack.autopgd_base.APGDAttack(
            theirs, n_restarts=1, n_iter=10, eps=0.06, norm="Linf", eot_iter=20, rho=0.75
        )
        x = torch.tensor(images.transpose(0, 3, 1, 2))
        _, predicted = attack.run_standard_evaluation(x, torch.tensor(labels), batch_size=128)
        expected = (predicted.numpy() == labels).mean()
        self.assertBetween(expected, 0.02, 0.6)
        # Two samples of 128 images: three standard errors of their difference.
        error = 3 * np.sqrt(2 * expected * (1 - expected) / 128)
        one = result.about["draws"]["one_draw"]
        self.assertAlmostEqual(one["robust"], expected, delta=error)
        # Most draws are a milder judge than one, which is asked again after each attack.
        self.assertGreaterEqual(result.robust.mean(), one["robust"])

    def test_rand_needs_a_keyed_network(self):
        with self.assertRaisesRegex(ValueError, r"must accept images and keys \[B\]"):
            quick(n=4, version="rand", overrides=None)
        with self.assertRaisesRegex(ValueError, "must accept images only"):
            evaluate(lambda x, k: x, IMAGES[:4], LABELS[:4], norm="linf", epsilon=0.1)
        with self.assertRaisesRegex(
            ValueError, "version='rand' does not support search_fn; leave it out"
        ):
            evaluate(
                lambda x, keys: NETS["lin"](x) + jax.vmap(jax.random.normal)(keys)[:, None],
                *(IMAGES[:4], LABELS[:4]),
                **{"norm": "linf", "epsilon": 0.1, "version": "rand", "search_fn": NETS["lin"]},
            )


class SearchTest(parameterized.TestCase):
    """A search with another network than the one that decides."""

    @pytest.mark.slow
    def test_bfloat16_search(self):
        weights_as = lambda x: x.astype(jnp.bfloat16).astype(jnp.float32)  # noqa: E731
        search = lambda x: weights_as(NETS["conv"](weights_as(x)))  # noqa: E731
        settings = {"epsilon": 8 / 255, "n": 24}
        plain, searched = quick("conv", **settings), quick("conv", search_fn=search, **settings)
        self.assertLessEqual(np.sum(plain.robust != searched.robust), 1)
        self.assertRegex(searched.flags["search-gap"], r"of \d+ survivors .* \d+ were fooled by")
        self.assertNotIn("search-gap", plain.flags)

    @pytest.mark.slow
    def test_a_search_that_sees_success_everywhere_proves_nothing(self):
        def liar(images):
            return -NETS["conv"](images)

        result = quick("conv", epsilon=0.0, search_fn=liar, n=24)
        np.testing.assert_array_equal(result.robust, result.clean)

    @pytest.mark.slow
    def test_square_ends_on_the_deciding_networks_word(self):
        # Too sure of success: as if rounding had moved the logits against the label.
        def eager(images):
            logits = NETS["conv"](images)
            return jnp.where(logits == logits.max(1, keepdims=True), logits - 3, logits)

        path = Path(self.create_tempdir()) / "ledger.jsonl"
        settings = {"attacks": ("square",), "overrides": {"square": {"steps": 300}}}
        settings |= {"epsilon": 6 / 255, "n": 24}
        searched = quick("conv", search_fn=eager, ledger=path, **settings)
        records = [json.loads(line) for line in path.read_text().splitlines()[1:]]
        spent = [r["iterations"] for r in records if not r["fooled"] and r["attack"] == "square"]
        self.assertNotEmpty(spent)
        self.assertEqual(set(spent), {301})  # the start and 300 queries
        plain = quick("conv", **settings)
        # Another margin accepts other windows, and draws decide at the edge.
        self.assertLessEqual(abs(int(searched.robust.sum() - plain.robust.sum())), 2)

    @pytest.mark.slow
    def test_all_are_attacked_again_if_one_of_a_sample_falls(self):
        blind = lambda x: jax.lax.stop_gradient(NETS["conv"](x))  # noqa: E731
        settings = {"epsilon": 8 / 255, "attacks": ("apgd-ce",), "n": 40}
        with mock.patch("jaxrobust.evaluation.engine.turns._SAMPLE", 4):
            result = quick("conv", search_fn=blind, **settings)
        np.testing.assert_array_equal(result.robust, quick("conv", **settings).robust)
        self.assertRegex(
            result.flags["search-gap"],
            r"of 4 survivors .*, [1-4] were .*, so all \d+ were attacked this way, and \d+ fell",
        )

    def test_survivors_fooled_in_full_precision_do_not_count_as_robust(self):
        blind = lambda x: jax.lax.stop_gradient(NETS["conv"](x))  # noqa: E731
        result = quick("conv", epsilon=8 / 255, search_fn=blind, attacks=("apgd-ce",), n=24)
        plain = quick("conv", epsilon=8 / 255, attacks=("apgd-ce",), n=24)
        np.testing.assert_array_equal(result.robust, plain.robust)
        self.assertIn("apgd-ce (full)", set(result.fooled_by))
        self.assertIn("search with logits_fn", result.flags["search-gap"])
        self.assertEqual(list(result.accuracy_after), ["apgd-ce", "full"])
        self.assertEqual(result.accuracy_after["full"], result.robust.mean())
        self.assertIn("zero-gradients", result.flags)


@pytest.mark.computes
class RefutedTest(parameterized.TestCase):
    """What a search found and the last forward pass does not confirm."""

    @sweeps.fast("square")
    @parameterized.parameters("apgd-ce", "fab-t", "square")
    def test_the_attack_goes_on(self, name):
        settings = {"epsilon": 16 / 255, "attacks": (name,), "n": 24}
        plain, refused, verified = quick("conv", **settings), set(), checks.verified

        def doubting(points, images, *arguments, **settings):
            sure, norms = verified(points, images, *arguments, **settings)
            seen = [image.tobytes() for image in images]
            sure &= [key in refused for key in seen]  # each image's first is refused
            refused.update(seen)
            return sure, norms

        with mock.patch("jaxrobust.evaluation.engine.outcome.checks.verified", doubting):
            result = quick("conv", **settings)
        fooled = plain.clean & ~plain.robust
        self.assertGreater(fooled.sum(), 3)
        self.assertLen(refused, fooled.sum())
        # All but one that only its last point fooled.
        self.assertGreaterEqual((fooled & ~result.robust).sum(), fooled.sum() - 1)
        differ = (result.images_adv != plain.images_adv).any(axis=(1, 2, 3))
        np.testing.assert_array_equal(differ, fooled)

    def test_what_is_never_confirmed_stands_and_is_said(self):
        calls = []

        def never(points, images, *arguments, **settings):
            calls.append(len(points))
            return np.zeros(len(points), bool), np.zeros(len(points))

        with mock.patch("jaxrobust.evaluation.engine.outcome.checks.verified", never):
            result = quick("conv", epsilon=8 / 255, attacks=("apgd-ce",), n=24)
        np.testing.assert_array_equal(result.robust, result.clean)
        self.assertRegex(
            result.flags["unconfirmed by apgd-ce"], r"^the search fooled \d+ images? that"
        )
        # 13 points each: a hit at step s is tried again from s + 1, s + 2, s + 4, s + 8 on.
        self.assertLessEqual(sum(calls), 5 * 24)


class MemoryTest(parameterized.TestCase):
    def test_untargeted_fab_keeps_one_gradient_whatever_the_number_of_classes(self):
        mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("slots",))
        (setting,) = plan("l2", "plus", ["fab"], None)
        temporary, image = [], (16, 16, 3)
        for classes in (10, 100):
            weights = jax.ShapeDtypeStruct((16 * 16 * 3, classes), np.float32)
            logits_fn = jax.tree_util.Partial(lambda w, x: x.reshape(len(x), -1) @ w, weights)
            step, arguments, _ = slice_programs.abstract_step(
                mesh, slots.program_of(setting), logits_fn, slots=32, image=image
            )
            memory = step.lower(*arguments).compile().memory_analysis()
            temporary.append(memory.temp_size_in_bytes)
        gradient = 4 * 32 * 16 * 16 * 3  # bytes; 90 more of them before, twice
        self.assertLess(temporary[1] - temporary[0], 3 * gradient)


class MessagesTest(parameterized.TestCase):
    @sweeps.rows(
        ({"norm": "linfty"}, "norm='linfty' is unknown; choose one of linf, l2, l1"),
        ({"epsilon": 8.0}, "larger than the pixel range .*; write 8/255"),
        ({"epsilon": -1}, "epsilon=-1.0 is not a valid radius"),
        (
            {"norm": "l0", "epsilon": 1.5},
            "epsilon=1.5 must be a whole number of pixels, such as 24",
        ),
        ({"norm": "l0", "epsilon": 0}, "pixels=0.0 must be an int >= 1"),
        (
            {"norm": "l0", "epsilon": 1e6},
            r"pixels=1e\+06 must be less than the .* pixels of an image",
        ),
        ({"version": "full"}, "version='full' is unknown; choose one of standard, plus, rand"),
        ({"version": "custom"}, "version='custom' needs attacks="),
        ({"attacks": ("apgd",)}, "attack 'apgd' is not in version 'standard'; choose from apgd-ce"),
        ({"attacks": ("fab",)}, "attack 'fab' is not in version 'standard'"),
        ({"attacks": ()}, "is empty or repeats an attack"),
        ({"attacks": "square"}, r"is a string; pass \('square',\)"),
        ({"overrides": {"square": {"queries": 5}}}, "square has no setting 'queries'; choose from"),
        ({"overrides": {"square": {"machine": "fab"}}}, "square has no setting 'machine'"),
        ({"overrides": {"square": {"eot": 2}}}, "square has no setting 'eot'"),
        ({"overrides": {"apgd-ce": {"targets": 2}}}, "apgd-ce has no setting 'targets'"),
        ({"overrides": {"apgd-ce": {"restarts": 0}}}, "apgd-ce: restarts=0 must be an int >= 1"),
        ({"overrides": {"apgd-ce": {"eot": 0}}}, "apgd-ce: eot=0 must be an int >= 1"),
        ({"overrides": {"apgd-t": {"targets": -1}}}, "apgd-t: targets=-1 must be an int >= 1"),
        ({"overrides": {"apgd-t": {"steps": "5"}}}, "apgd-t: steps='5' must be an int >= 1"),
        (
            {"overrides": {"fab": {}}},
            r"overrides names \['fab'\], which will not run; choose from \['apgd",
        ),
        (
            {"norm": "l1", "epsilon": 1.0, "overrides": {"apgd-t": {"steps": 4}}},
            "apgd-t: steps=4 must be an int >= 5",
        ),
        ({"seed": -1}, "seed=-1 must be an int from 0 to"),
        ({"seed": 1.5}, "seed=1.5 must be an int from 0 to"),
        ({"seed": 2**32}, "must be an int from 0 to"),
        ({"batch_size": 0}, "batch_size=0 must be an int >= 1"),
        ({"batch_size": "8"}, "batch_size='8' must be an int >= 1"),
        ({"ledger": "ledger.images"}, "name a file that ends in .jsonl"),
        ({"image_ids": [1, 1]}, "image_ids must be 4 distinct ints"),
        ({"image_ids": [1, 1, 2, 3]}, "image_ids must be 4 distinct ints"),
        ({"image_ids": [-1, 1, 2, 3]}, "image_ids must be 4 distinct ints"),
    )
    def test_settings(self, changes, message):
        with self.assertRaisesRegex(ValueError, message):
            quick(n=4, **({"overrides": None} | changes))

    @sweeps.rows(
        (lambda x: x.mean((1, 2, 3)), r"return logits f\[B, K\]"),
        (lambda x: x.reshape(x.shape[0], -1)[:, :1], "with K >= 2"),
        (lambda x: (NETS["lin"](x), x), "returns tuple for .* and nothing else"),
        (lambda x: np.asarray(x).reshape(len(x), -1), "write it with jax.numpy"),
        (lambda x: jnp.ones((x.shape[0], 3), jnp.int32), "return floating-point logits"),
    )
    def test_networks(self, function, message):
        with self.assertRaisesRegex(ValueError, message):
            evaluate(function, IMAGES[:4], LABELS[:4], norm="linf", epsilon=0.1)


def read(path):
    """The records of a ledger, in no order, without their places in the file of images."""
    lines = path.read_text().splitlines()[1:]
    drop = lambda r: {k: v for k, v in r.items() if k != "stored"}  # noqa: E731
    return sorted(json.dumps(drop(json.loads(line)), sort_keys=True) for line in lines)


@pytest.mark.computes
class LedgerTest(parameterized.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.folder = Path(cls.enterClassContext(tempfile.TemporaryDirectory()))
        cls.result = quick(ledger=cls.folder / "ledger.jsonl")

    def finished(self) -> Path:
        """A copy of the ledger of a finished evaluation."""
        copy = Path(self.create_tempdir()) / "copy"
        return shutil.copytree(self.folder, copy) / "ledger.jsonl"

    def test_one_record_per_image_and_attack(self):
        path, result = self.finished(), self.result
        records = [json.loads(line) for line in path.read_text().splitlines()]
        self.assertEqual(records[0]["identity"]["epsilon"], 2 / 255)
        met = int(result.clean.sum())
        for cost in result.costs:
            mine = [r for r in records[1:] if r["attack"] == cost.attack]
            self.assertLen({r["image"] for r in mine}, met)
            self.assertLen(mine, met)
            met -= cost.fooled
        fields = ["image", "attack", "fooled", "target", "restart", "iterations", "norm"]
        fields += ["reached", "seed", "flat"]
        self.assertEqual(set(records[-1]) - {"stored"}, set(fields))
        for r in records[1:]:
            i = r["image"]
            self.assertEqual(r["fooled"], result.fooled_by[i] == r["attack"])
            if r["fooled"]:
                delta = np.abs(result.images_adv[i].astype(np.float64) - IMAGES[i])
                self.assertAlmostEqual(r["norm"], delta.max(), places=12)
            self.assertEqual(r["reached"], result.verdicts.reached[i] if r["fooled"] else -1)

    @pytest.mark.slow
    def test_continues_after_any_interruption(self):
        directory = Path(self.create_tempdir())
        whole = quick(ledger=directory / "whole.jsonl")
        chance = random.Random(2)
        append, path, stops = engine.Jobs.collect, directory / "parts.jsonl", 0

        def fragile(*arguments):
            if stops < 12 and chance.random() < 0.2:
                raise ConnectionError("killed")
            return append(*arguments)

        while True:
            try:
                with mock.patch.object(engine.Jobs, "collect", fragile):
                    result = quick(ledger=path)
                break
            except ConnectionError:
                stops += 1
                if stops % 2:  # as a kill in the middle of a write leaves it
                    with path.open("a") as file:
                        file.write('{"image": 3, "att')
                    with path.with_suffix(".images").open("ab") as file:
                        file.write(b"123")
        self.assertGreater(stops, 3)
        self.assertEqual(read(path), read(directory / "whole.jsonl"))
        np.testing.assert_array_equal(result.images_adv, whole.images_adv)
        np.testing.assert_array_equal(result.fooled_by, whole.fooled_by)
        np.testing.assert_array_equal(result.verdicts.reached, whole.verdicts.reached)

    def test_images_that_are_not_square_have_no_one_size(self):
        self.assertEqual(self.result.record()["model"]["image_size"], self.result.about["image"][0])
        wide = self.result._replace(about={**self.result.about, "image": (8, 6, 3)})
        self.assertIsNone(wide.record()["model"]["image_size"])

    def test_an_older_one_learns_which_classes_were_reached(self):
        path, first = self.finished(), self.result
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for row in rows[1:]:
            del row["reached"]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        again = quick(ledger=path)
        fooled = first.clean & ~first.robust
        self.assertGreater(fooled.sum(), 1)
        np.testing.assert_array_equal(first.verdicts.reached >= 0, fooled)
        self.assertEqual({*first.verdicts.reached[~fooled]}, {-1})
        np.testing.assert_array_equal(first.verdicts.norms > 0, fooled)
        np.testing.assert_array_equal(again.verdicts.reached, first.verdicts.reached)

    def test_a_finished_one_computes_nothing(self):
        path, first = self.finished(), self.result
        before = path.read_bytes()
        again = quick(ledger=path)
        self.assertEqual(path.read_bytes(), before)
        self.assertEqual(sum(c.forward for c in again.costs), 0)
        np.testing.assert_array_equal(first.images_adv, again.images_adv)

    @sweeps.rows(
        ({"epsilon": 3 / 255}, r"epsilon is 0.0078\d* there, 0.0117\d* here"),
        ({"n": 20}, "its images or labels differ"),
        ({"overrides": None}, "attacks is"),
    )
    def test_refuses_another_evaluation(self, changes, message):
        path = self.finished()
        with self.assertRaisesRegex(ValueError, f"belongs to another evaluation: .*{message}"):
            quick(ledger=path, **changes)

    def test_neighbours_are_other_ledgers(self):
        directory = Path(self.create_tempdir())
        quick(n=4, ledger=directory / "a.4.jsonl")
        quick(n=5, ledger=directory / "a.jsonl")
        quick(n=5, ledger=directory / "a.jsonl")

    def test_lost_images_are_named(self):
        path = self.finished()
        path.with_suffix(".images").unlink()
        with self.assertRaisesRegex(ValueError, "lacks the adversarial image .*, remove .*jsonl"):
            quick(ledger=path)

    def test_damaged_images_are_refused(self):
        path = self.finished()
        images = path.with_suffix(".images")
        images.write_bytes(bytes(images.stat().st_size))
        with self.assertRaisesRegex(ValueError, "outside the ball: its .images file is damaged"):
            quick(ledger=path)


KILLED = """
import sys
sys.path.insert(0, {root!r})
import jax
jax.config.update("jax_compilation_cache_dir", {cache!r})
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
from tests.support.ensemble import quick
names = ("apgd-ce", "apgd-t")
quick("conv", n=128, epsilon=4 / 255, overrides=None, attacks=names, ledger={path!r})
"""


@pytest.mark.matrix
class KillTest(absltest.TestCase):
    def test_kill_9_at_twenty_random_moments(self):
        directory = Path(self.create_tempdir())
        root, chance = str(paths.ROOT), random.Random(1)

        def start(path):
            code = KILLED.format(root=root, cache=str(directory / "cache"), path=str(path))
            return subprocess.Popen([sys.executable, "-c", code], cwd=root, env=dict(os.environ))

        whole, parts = directory / "whole.jsonl", directory / "parts.jsonl"
        self.assertEqual(start(whole).wait(300), 0)
        killed, size = 0, lambda: parts.stat().st_size if parts.exists() else 0
        most = whole.stat().st_size // 10  # so that twenty kills are spread over all verdicts
        while killed < 20:
            process, wanted = start(parts), size() + chance.randrange(most)
            while process.poll() is None and size() < wanted:
                time.sleep(0.001)
            if process.poll() is not None:
                break  # it was already done
            process.send_signal(signal.SIGKILL)
            process.wait()
            killed += 1
        self.assertEqual(start(parts).wait(300), 0)
        self.assertGreaterEqual(killed, 5)
        self.assertEqual(read(parts), read(whole))
