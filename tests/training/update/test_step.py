import re
from functools import partial
from types import SimpleNamespace
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.testing import absltest, parameterized
from ml_collections import ConfigDict

from jaxrobust import attacks, models
from jaxrobust.config import base, network_of
from jaxrobust.doctor.programs import hlo
from jaxrobust.models.interface import network_inputs
from jaxrobust.runtime.devices import sharding
from jaxrobust.training import build
from jaxrobust.training.run import run
from jaxrobust.training.update import averages, memory, objectives, optim, step
from jaxrobust.types import Batch, Weights
from jaxrobust.weights.naming import convert
from tests.support import paths
from tests.support.steps import batch_of, small_config, standard


def moving(decay):
    return lambda average, params, stats, step: averages.ema(average, params | stats, decay)


def trained(config, devices, steps=3, size=8):
    phase = build.phase(config, "train", 80, devices=devices)
    history = []
    with jax.set_mesh(phase.mesh), standard():
        state = phase.init(jax.random.key(0))
        for i in range(steps):
            batch = sharding.global_arrays(
                phase.mesh, tuple(map(np.asarray, batch_of(size, seed=i)))
            )
            state, metrics = phase.step(state, Batch(*batch), build.control(phase.mesh))
            history.append(jax.device_get(metrics))
    return jax.device_get(state), history


class RowsTest(absltest.TestCase):
    def test_short_last_axes_are_joined_and_nothing_else_changes(self):
        shapes = {"a": (6, 5, 3, 3), "b": (3, 3, 5, 64), "c": (6,), "d": (6, 5), "e": (6, 5, 3, 16)}
        params = {
            name: jnp.arange(np.prod(of), dtype=float).reshape(of) for name, of in shapes.items()
        }
        given = {
            "params": params,
            "mean": params | {"var": jnp.ones((4, 2, 2, 2))},
            "count": jnp.int32(3),
        }
        found = step.in_rows(given, params)
        self.assertEqual(
            found["params"]["a"].shape, (1, 1, 6, 45)
        )  # a matrix is decayed, as it was
        np.testing.assert_array_equal(found["mean"]["a"].ravel(), params["a"].ravel())
        changed = {
            jax.tree_util.keystr(path)
            for (path, new), old in zip(
                jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(given), strict=True
            )
            if new.shape != old.shape
        }
        self.assertEqual(changed, {"['params']['a']", "['mean']['a']"})


class UnitRangeTest(absltest.TestCase):
    pixels = np.arange(256, dtype=np.uint8)
    quotients = np.arange(256, dtype=np.float32) / np.float32(255)  # as ToTensor divides

    def test_is_to_tensors_division_in_a_compiled_program(self):
        compiled = jax.jit(network_inputs.unit_range).lower(self.pixels).compile()
        np.testing.assert_array_equal(compiled(self.pixels), self.quotients)
        found = re.findall(r"\s(add|subtract|multiply|divide)\(", compiled.as_text())
        self.assertCountEqual(found, ["multiply", "multiply", "add"])  # nothing taken together


class TrainStepTest(parameterized.TestCase):
    def test_lowers_the_loss(self):
        phase = build.phase(small_config(train__lr=0.01), "train", 80, devices=jax.devices()[:1])
        with jax.set_mesh(phase.mesh), standard():
            state, losses = phase.init(jax.random.key(0)), []
            for _ in range(12):
                state, metrics = phase.step(state, batch_of(), build.control(phase.mesh))
                losses.append(float(metrics["loss"]))
        self.assertLess(np.mean(losses[-3:]), np.mean(losses[:3]) - 0.05)
        self.assertEqual(phase.step._cache_size(), 1)  # compiled once, not again for its own state

    @pytest.mark.slow
    def test_one_device_is_eight(self):
        one, many = (trained(small_config(), jax.devices()[:n]) for n in (1, 8))
        # Sums over the batch in another order: float32 rounding, amplified by Adam where a
        # gradient is near 0 (three updates of at most 1e-3 each).
        for a, b in zip(one[1], many[1], strict=True):
            np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-5)
        for name, value in one[0].params.items():
            self.assertLess(np.abs(value - many[0].params[name]).mean(), 2e-5, name)

    def test_the_state_of_known_weights_needs_no_draw(self):
        phase = build.phase(small_config(), "train", 80, devices=jax.devices()[:1])
        with jax.set_mesh(phase.mesh), standard():
            drawn = jax.device_get(phase.init(jax.random.key(3)))
            known = drawn.params, drawn.stats
            nothing = SimpleNamespace(state_of=phase.state_of, init=self.fail)
            asked = SimpleNamespace(phase=nothing, config=SimpleNamespace(seed=3))
            with absltest.mock.patch.object(run, "last", return_value=(None, None)):
                again = jax.device_get(run._state(asked, Weights(*known)))
        for one, other in zip(jax.tree.leaves(drawn), jax.tree.leaves(again), strict=True):
            if jnp.issubdtype(one.dtype, jax.dtypes.prng_key):
                one, other = jax.random.key_data(one), jax.random.key_data(other)
            np.testing.assert_array_equal(one, other)

    def test_everything_but_the_optimiser_is_strict(self):
        net = network_of(small_config())
        params, stats = jax.eval_shape(net.init, jax.random.key(0))
        attack = attacks.apgd(epsilon=0.1, steps=2)

        def gradient(params, stats, batch, objective):
            batch = Batch(network_inputs.unit_range(batch.images), batch.labels)
            x = attack(lambda x: net.apply(params, stats, x)[0], None, *batch)
            return jax.grad(lambda p: objective.loss(net, p, stats, batch, x, None)[0])(params)

        # Types are promoted, or refused, while a program is traced.
        for objective in (objectives.clean(), objectives.adversarial(), objectives.trades(6.0)):
            found = jax.eval_shape(
                partial(gradient, objective=objective), params, stats, batch_of()
            )
            self.assertEqual(found, params)

    @pytest.mark.slow
    def test_bfloat16_keeps_float32_parameters(self):
        config = small_config(model__dtype="bfloat16")
        state, history = trained(config, jax.devices()[:1], steps=2)
        self.assertTrue(all(p.dtype == np.float32 for p in state.params.values()))
        self.assertTrue(np.isfinite(history[-1]["loss"]))

    @parameterized.parameters(None, 1.5 / 255)
    @pytest.mark.slow
    def test_is_the_step_in_torch(self, step_size):
        try:
            import torch

            from jaxrobust.publish import torch_networks
            from tools.bench import torch_reference
        except ImportError:
            self.skipTest(paths.PARITY)
        torch.manual_seed(0)
        small = {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 96), "num_classes": 10}
        theirs = torch_networks.network("convnext_t", **small)
        with torch.no_grad():
            for name, p in theirs.named_parameters():
                p.mul_(5).add_(0.5 if "gamma" in name else 0)
        options = {k: small[k] for k in ("depths", "dims")}
        net = models.create("convnext_t", num_classes=10, image_size=32, **options)
        shapes = jax.eval_shape(net.init, jax.random.key(0))[0]
        arrays = convert.rename(
            models.torch_names("convnext_t"),
            torch_networks.state_arrays(theirs),
            {k: v.shape for k, v in shapes.items()},
        )
        params = {k: jnp.array(v) for k, v in arrays.items()}
        stats = net.init(jax.random.key(0))[1]
        tx = optim.adamw(lambda i: jnp.float32(1e-3), weight_decay=0.05, decay_mask="not-bias")
        optimizer = memory.remembering(tx)
        state = step.state_of(optimizer, jax.random.key(0), params, stats)
        mesh = sharding.make_mesh(jax.devices()[:1])
        spread = sharding.spread(mesh, params)
        attack = {"epsilon": 4 / 255, "steps": 3 if step_size else 2}
        if step_size:
            apgd_or_pgd = attacks.pgd(**attack, step_size=step_size, random_start=False)
        else:
            apgd_or_pgd = attacks.apgd(**attack)
        gradient_parts = step.GradientParts(net, apgd_or_pgd, objectives.adversarial())
        of_device = partial(
            step.device_gradients, parts=gradient_parts, spread=spread, microbatches=1
        )
        parts = step.StepParts(
            augment=lambda key, batch: batch,
            attack_options=lambda state, control: {},
            device_gradients=spread.each(of_device, copies=2, split=2, gradients=True),
            optimizer=optimizer,
            update_ema=moving(0.9),
        )
        train_step = jax.jit(partial(step.train_step, parts=parts))
        trainer = torch_reference.Trainer(
            theirs,
            lr=1e-3,
            weight_decay=0.05,
            ema_decay=0.9,
            epsilon=attack["epsilon"],
            attack_steps=attack["steps"],
            step_size=step_size,
        )
        losses = []
        for i in range(3):
            batch = batch_of(side=32, seed=i)
            x = torch.tensor(np.asarray(batch.images)).permute(0, 3, 1, 2).float().div(255)
            losses.append(trainer.step(x, torch.tensor(np.asarray(batch.labels)).long()))
            with standard():
                state, metrics = train_step(state, batch, build.control(mesh))
            # The sign of a gradient entry near 0 may differ between two float32 networks: a few
            # pixels of the attack then differ by eps, which the loss feels in the 5th digit.
            np.testing.assert_allclose(metrics["loss"], losses[-1], rtol=1e-4)
        updated = convert.rename(
            models.torch_names("convnext_t"),
            torch_networks.state_arrays(trainer.average),
            {k: v.shape for k, v in shapes.items()},
        )
        for name, value in updated.items():
            moved = np.abs(value - arrays[name]).mean()
            # Adam's first steps have the size lr whatever the gradient's: where that is rounding
            # noise so is the step. On average the moving averages agree to 2% of what they moved.
            self.assertLess(np.abs(state.ema[name] - value).mean(), 0.02 * moved + 1e-9, name)


class AugmentedStepTest(parameterized.TestCase):
    """MixUp, CutMix, erasing and smoothing inside the step."""

    @pytest.mark.slow
    def test_attacks_and_trains_on_the_augmented_batch(self):
        self.check("hard")

    @pytest.mark.slow
    def test_attack_aims_at_soft_labels(self):
        self.check("soft")

    def check(self, labels):
        changes = {"attack__start": "random", "attack__labels": labels, "mixup__group": 4}
        heavy = small_config(data__augmentation="heavy", **changes)
        phase, plain = (
            build.phase(config, "train", 80, devices=jax.devices()[:1], donate=False)
            for config in (heavy, small_config(**changes))
        )
        augment = build.batch_augmentation(heavy, "train", devices=1)
        with jax.set_mesh(phase.mesh), standard():
            state = phase.init(jax.random.key(0))._replace(step=jnp.int32(7))
            step_key = jax.random.fold_in(state.key, 7)
            *_, key = jax.random.split(step_key, 3)
            images, targets = jax.jit(augment)(
                key, Batch(network_inputs.unit_range(batch_of().images), batch_of().labels)
            )
            after, metrics = phase.step(state, batch_of(), build.control(phase.mesh))
            again, expected = plain.step(state, Batch(images, targets), build.control(plain.mesh))
        self.assertGreater(
            float(jnp.abs(images - network_inputs.unit_range(batch_of().images)).max()), 0.1
        )
        # Two compilations of one step: float32 rounding, which Adam amplifies.
        np.testing.assert_allclose(metrics["loss"], expected["loss"], rtol=1e-5)
        for name, value in again.params.items():
            np.testing.assert_allclose(after.params[name], value, atol=2e-5, err_msg=name)

    def test_keys_of_runs_that_began_before_augmentation(self):
        key = jax.random.fold_in(jax.random.key(1), 5)
        two, three = (jax.random.key_data(jax.random.split(key, n)) for n in (2, 3))
        np.testing.assert_array_equal(three[:2], two)

    @pytest.mark.slow
    def test_one_device_is_eight(self):
        config = small_config(
            data__augmentation="heavy", train__batch_size=16, mixup__group=2, erase__probability=0.9
        )
        one, many = (trained(config, jax.devices()[:n], steps=1, size=16) for n in (1, 8))
        np.testing.assert_allclose(one[1][0]["loss"], many[1][0]["loss"], rtol=1e-5)

    @pytest.mark.slow
    def test_adds_no_collective(self):
        texts = []
        for augmentation in ("none", "heavy"):
            config = small_config(
                data__augmentation=augmentation, train__batch_size=48, mixup__group=2
            )
            phase = build.phase(config, "train", 480, devices=jax.devices())
            with jax.set_mesh(phase.mesh), standard():
                lowered = phase.step.lower(*build.abstract_arguments(config, "train", phase))
            texts.append(lowered.compile().as_text())
        none, heavy = texts
        self.assertLen(COLLECTIVE.findall(heavy), len(COLLECTIVE.findall(none)))
        self.assertNotEmpty(COLLECTIVE.findall(none))
        for text in texts:
            self.assertEmpty(COLLECTIVE.findall("\n".join(loops(text))))
        self.assertIn("erf", " ".join(re.findall(r'op_name="[^"]*"', heavy)))
        # No device draws, or holds, more than its sixth part of the images or their groups.
        self.assertEmpty(re.findall(r"\w+\[(?:48|24)[,\]][^ ]*", heavy))

    @parameterized.named_parameters(
        ("adversarial", {}),
        ("clean", {"train__objective": "clean"}),
        ("mart", {"train__objective": "mart"}),
        ("heavy", {"data__augmentation": "heavy", "mixup__group": 2}),
        ("fsdp", {"mesh__fsdp": 0}),
    )
    def test_no_reduction_is_ready_before_the_gradients(self, changes):
        # A device that waits for the others holds one of the few threads of XLA's CPU: where the
        # largest of `stop` alone was ready at once, two devices on two cores took turns.
        config = small_config(train__batch_size=48, **changes)
        phase = build.phase(config, "train", 480, devices=jax.devices())
        with jax.set_mesh(phase.mesh), standard():
            lowered = phase.step.lower(*build.abstract_arguments(config, "train", phase))
        module = hlo.parse(lowered.compile().as_text())
        entry = module.computations[module.entry]
        reductions = [i for i in entry.values() if i.opcode.startswith("all-reduce")]
        self.assertGreaterEqual(len(reductions), 2)  # of the gradients, and of `stop`
        for reduction in reductions:
            self.assertTrue(
                any("transpose(jvp" in hlo.op_name(i) for i in before(entry, reduction)), reduction
            )


def before(entry, last):
    """All instructions of a computation whose results one of them needs."""
    found, waiting = {}, list(last.operands)
    while waiting:
        name = waiting.pop()
        if name in entry and name not in found:
            found[name] = entry[name]
            waiting += entry[name].operands
    return found.values()


COLLECTIVE = re.compile(
    r" (?:all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("
)


def loops(text: str) -> list[str]:
    """The bodies and conditions of all loops of a compiled program, with all that they call."""
    parts = {}
    for part in re.split(r"\n\n", text):
        if named := re.match(r"(?:ENTRY )?(%\S+) \(", part):
            parts[named[1]] = part
    waiting = re.findall(r"(?:body|condition)=(%[\w.-]+)", text)
    reached = set()
    while waiting:
        name = waiting.pop()
        if name not in reached:
            reached.add(name)
            waiting += [n for n in re.findall(r"%[\w.-]+", parts[name]) if n in parts]
    assert reached, "no loop at all"
    return [parts[name] for name in sorted(reached)]


class UpdateTest(absltest.TestCase):
    """One parameter, the gradient 2, and the rate 0.25."""

    def after(self, *, gradient=2.0, lr_scale=1.0, stop=0, number=0, weight=1.0):
        tx, params = optax.sgd(0.25), {"w": jnp.array([weight])}

        def gradients(params, stats, attack_options, batch, keys):
            drawn = jax.random.uniform(keys.attack[0]), jax.random.uniform(keys.net[0])
            metrics = {"loss": jnp.float32(1.0), "attack": drawn[0], "network": drawn[1]}
            return {"w": jnp.array([gradient])}, ({}, metrics)

        state = step.TrainState(
            jnp.int32(number), params, {}, params, tx.init(params), jax.random.key(0)
        )
        control = step.Control(jnp.array([0, stop]), jnp.float32(lr_scale))
        parts = step.StepParts(
            augment=lambda key, batch: batch,
            attack_options=lambda state, control: {},
            device_gradients=gradients,
            optimizer=memory.remembering(tx),
            update_ema=moving(0.5),
        )
        return step.train_step(state, batch_of(2), control, parts=parts)

    def test_update_and_average(self):
        state, metrics = self.after()
        self.assertEqual((state.step, state.params["w"], state.ema["w"]), (1, 0.5, 0.75))
        self.assertEqual((metrics["gradient_norm"], metrics["skipped"]), (2, 0))

    def test_a_rollback_lowers_the_rate(self):
        state, _ = self.after(lr_scale=0.5)
        self.assertEqual((state.params["w"], state.ema["w"]), (0.75, 0.875))

    def test_no_finite_gradient_under_a_finite_loss(self):
        state, metrics = self.after(gradient=np.inf)
        self.assertEqual((state.step, state.params["w"], state.ema["w"]), (1, 1, 1))
        self.assertEqual(metrics["skipped"], 1)

    def test_a_stop(self):
        state, metrics = self.after(stop=15)
        self.assertEqual((state.step, state.params["w"], state.ema["w"]), (0, 1, 1))
        self.assertEqual((metrics["stop"], metrics["skipped"]), (15, 0))

    def test_a_step_that_is_not_taken_changes_no_bit(self):
        for weight in (-0.0, 0.0, 1.1754944e-38, np.inf):
            for what in ({"stop": 15}, {"gradient": np.nan}):
                after = self.after(weight=weight, **what)[0].params["w"]
                self.assertEqual(after.tobytes(), np.array([weight], np.float32).tobytes())

    def test_every_step_draws_anew(self):
        drawn = {float(self.after(number=n)[1][k]) for n in (0, 1) for k in ("attack", "network")}
        self.assertLen(drawn, 4)


class ShareTest(parameterized.TestCase):
    @parameterized.parameters((1, 1, 4), (8, 1, 1), (8, 2, 2), (8, 8, 1))
    def test_gradients_are_the_mean_over_images(self, devices, fsdp, microbatches):
        """However they are shared out: over devices, groups of them, and parts of a batch."""
        images = np.random.default_rng(0).random((16, 2, 2, 8), np.float32)
        batch = Batch(jnp.asarray(images), jnp.arange(16, dtype=jnp.float32))
        params = {"split": jnp.zeros((8, 8)), "whole": jnp.zeros(3)}

        def attack(logits_fn, keys, images, labels):
            return images + (keys * labels)[:, None, None, None]

        def loss(net, params, stats, batch, images_adv, keys):
            self.assertEqual(images_adv.shape, (16 // devices // microbatches, 2, 2, 8))
            bright = batch.images.mean((1, 2, 3)) * batch.labels  # each image by its own label
            moved = (images_adv - batch.images).mean((1, 2, 3))
            mean = (bright + moved - keys).mean()
            value = mean * sum(p.sum() for p in params.values())
            return value, ({"mean": mean}, {"mean_label": batch.labels.mean()})

        objective = objectives.Objective(
            lambda logits_fn, batch: batch.labels, loss, lambda keys: (keys, keys)
        )
        parts = step.GradientParts(None, attack, objective)
        mesh = sharding.make_mesh(jax.devices()[:devices], fsdp=fsdp)
        with mock.patch.object(sharding, "SMALL", 64):
            spread = sharding.spread(mesh, params)
        of_device = partial(
            step.device_gradients, parts=parts, spread=spread, microbatches=microbatches
        )
        of_all = jax.jit(spread.each(of_device, copies=2, split=2, gradients=True))
        numbers = np.arange(16, dtype=np.float32)
        keys = step.ImageKeys(jnp.asarray(numbers), jnp.asarray(numbers**2))
        grads, (stats, metrics) = of_all(params, {"kept": jnp.float32(3)}, {}, batch, keys)
        mean = (images.mean((1, 2, 3)) * numbers).mean()  # the squares cancel
        # Squares of up to 225, next to a mean of about 4, leave 225 / 4 * 2**-24 = 3e-6 of it.
        self.assertEqual({name: value.shape for name, value in grads.items()},
                         {"split": (8, 8), "whole": (3,)})  # fmt: skip
        for value in (*grads.values(), stats["mean"]):
            np.testing.assert_allclose(value, np.full(value.shape, mean), rtol=1e-5)
        self.assertEqual((metrics["mean_label"], stats["kept"]), (7.5, 3))


class BatchNormTest(parameterized.TestCase):
    """Networks whose statistics move while they train."""

    @staticmethod
    def config(group=0, **changes):
        config = small_config(model__name="resnet50", **changes).unlock()
        options = {"depths": (1,), "width": 8, "small_stem": True, "bn_group": group}
        config.model.options = ConfigDict(options)
        return config.lock()

    def test_average_holds_the_statistics(self):
        config = self.config()
        phase = build.phase(config, "train", 80, devices=jax.devices()[:1], donate=False)
        with jax.set_mesh(phase.mesh), standard():
            states = [phase.init(jax.random.key(0))]
            for i in range(2):
                states.append(
                    phase.step(states[-1], batch_of(seed=i), build.control(phase.mesh))[0]
                )
        states = jax.device_get(states)
        for kind, weights in (("params", 0), ("stats", 1)):
            found = step.averaged(states[2])[weights]
            first, second, third = (getattr(state, kind) for state in states)
            self.assertEqual(found.keys(), first.keys())
            for name, value in found.items():
                by_hand = 0.81 * first[name] + 0.09 * second[name] + 0.1 * third[name]
                np.testing.assert_allclose(value, by_hand, rtol=1e-5, atol=1e-6, err_msg=name)
        self.assertGreater(np.abs(states[2].stats["bn1.mean"] - found["bn1.mean"]).max(), 1e-3)
        self.assertNotIn("normalize.mean", states[2].ema)

    @pytest.mark.slow
    def test_attack_sees_its_statistics_and_leaves_no_trace(self):
        self.check_statistics("running")

    @pytest.mark.slow
    def test_attack_sees_those_of_its_batch(self):
        self.check_statistics("batch")

    def check_statistics(self, statistics):
        config = self.config(attack__statistics=statistics)
        phase = build.phase(config, "train", 80, devices=jax.devices()[:1], donate=False)
        attack = attacks.apgd(epsilon=8 / 255, steps=3)

        apply = phase.net.apply

        @partial(jax.jit, static_argnames="train")
        def by_hand(params, stats, batch, train):
            def frozen(x):
                return apply(params, stats, x, train=train)[0]

            images_adv = attack(frozen, None, network_inputs.unit_range(batch.images), batch.labels)
            return apply(params, stats, images_adv, train=True)[1]

        with jax.set_mesh(phase.mesh), standard():
            state = phase.init(jax.random.key(0))
            # Far from any batch's statistics, so that the attacks of the two modes differ.
            stats = {
                k: s + 0.5 * ("mean" in k) * ("normal" not in k) for k, s in state.stats.items()
            }
            state = state._replace(stats=stats)
            after, _ = phase.step(state, batch_of(), build.control(phase.mesh))
            batch = statistics == "batch"
            same, other = (by_hand(state.params, stats, batch_of(), t) for t in (batch, not batch))
        for name, value in same.items():
            np.testing.assert_allclose(after.stats[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
        apart = max(np.abs(other[name] - value).max() for name, value in same.items())
        self.assertGreater(apart, 1e-3)


class BatchStatisticsOnDevicesTest(parameterized.TestCase):
    """Statistics of a device's two images."""

    groups = (2, 0)  # of one device and of eight

    # In a third attack on statistics of two images, rounding of the weights turns signs.
    @parameterized.parameters(("clean", "running", 3), ("adversarial", "batch", 2))
    @pytest.mark.slow
    def test_one_device_is_eight(self, objective, statistics, steps):
        changes = {"train__objective": objective, "attack__statistics": statistics}
        changes["train__batch_size"] = 16
        one, many = (
            trained(BatchNormTest.config(group, **changes), jax.devices()[:n], steps, size=16)
            for n, group in zip((1, 8), self.groups, strict=True)
        )
        for a, b in zip(one[1], many[1], strict=True):
            np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-5)
        for name, value in one[0].stats.items():
            # Sums in another order, and from the second step on weights that differ by as much.
            np.testing.assert_allclose(value, many[0].stats[name], rtol=1e-4, atol=1e-5)


@pytest.mark.matrix
class GroupedStatisticsOnDevicesTest(BatchStatisticsOnDevicesTest):
    """Statistics of each image."""

    groups = (1, 1)


class ProgramTest(absltest.TestCase):
    """What the compiler makes of the step."""

    def compiled(self, config):
        phase = build.phase(config, "train", 80, devices=jax.devices()[:1])
        arguments = build.abstract_arguments(config, "train", phase)
        with jax.set_mesh(phase.mesh), standard():
            return phase.step.lower(*arguments).compile()

    @pytest.mark.slow
    def test_more_steps_are_the_same_program(self):
        three, ten = (self.compiled(small_config(attack__steps=k)).as_text() for k in (3, 10))
        for operation in ("convolution", "dot", "while", "fusion"):
            counts = [len(re.findall(rf"= \S+ {operation}\(", text)) for text in (three, ten)]
            self.assertEqual(*counts, operation)
        self.assertGreater(three.count(" dot("), 0)
        self.assertIn("input_output_alias", three)  # the state is donated


@pytest.mark.slow
class FullSizeProgramTest(absltest.TestCase):
    """ConvNeXt-T + ConvStem at 224 pixels, K = 2: operations and memory of the compiled step."""

    def test_operations_and_memory(self):
        config = base().unlock()
        config.train.update(batch_size=8, epochs=3, warmup_epochs=1)
        programs = {}
        for objective in ("adversarial", "clean"):
            config.train.objective = objective
            phase = build.phase(config, "train", 80, devices=jax.devices()[:1])
            with jax.set_mesh(phase.mesh), standard():
                lowered = phase.step.lower(*build.abstract_arguments(config, "train", phase))
                programs[objective] = lowered.compile()
        net = network_of(config)
        params, stats = jax.eval_shape(net.init, jax.random.key(0))
        images = jax.ShapeDtypeStruct((8, 224, 224, 3), jnp.float32)
        forward = jax.jit(lambda p, s, x: net.apply(p, s, x)[0]).lower(params, stats, images)
        f = forward.compile().cost_analysis()["flops"]
        step_flops, clean_flops = (programs[o].cost_analysis()["flops"] for o in programs)
        attack = 2 * (step_flops - clean_flops - f) + f  # the loop's body is counted once
        self.assertBetween(attack / (5 * f), 0.95, 1.05)
        memory = [programs[o].memory_analysis().temp_size_in_bytes for o in programs]
        self.assertLess(memory[0] / memory[1], 1.15)


class EvalStepTest(absltest.TestCase):
    def test_counts_ignore_padding_and_do_not_depend_on_the_batch(self):
        config = small_config()
        net = network_of(config)
        params, stats = jax.jit(net.init)(jax.random.key(0))
        images, _ = batch_of()
        logits = jax.jit(net.apply)(params, stats, network_inputs.unit_range(images))[0]
        labels = logits.argmax(-1).astype(jnp.int32)
        mesh = sharding.make_mesh(jax.devices()[:1])
        evaluate = build.evaluation(config, mesh, steps=3)
        ids, mask = jnp.arange(8), jnp.arange(8) < 5
        counts = evaluate(params, stats, images, labels, mask, ids, jax.random.key(0))
        self.assertEqual((int(counts["count"]), int(counts["clean"])), (5, 5))
        order = jnp.array([3, 1, 4, 0, 2, 7, 6, 5])
        again = evaluate(
            params, stats, images[order], labels[order], mask[order], ids[order], jax.random.key(0)
        )
        for found, rows in ((again, order), (counts, jnp.arange(8))):
            np.testing.assert_array_equal(found.pop("mask"), mask[rows])
            np.testing.assert_array_equal(found.pop("answers"), labels[rows])
            np.testing.assert_array_equal(found.pop("labels"), labels[rows])
        self.assertEqual(jax.device_get(again), jax.device_get(counts))
