"""The training attack, and its radius while that grows."""

from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from jaxrobust import attacks
from jaxrobust.evaluation.engine import accuracy
from jaxrobust.runtime.devices import cpus
from jaxrobust.runtime.files import jsonl
from jaxrobust.training import build
from jaxrobust.training.update import inner
from tests.support import rows, sweeps
from tests.support.runs import final_state, one_phase, quiet_run, stop_after
from tests.support.steps import batch_of, small_config, standard

EPSILON = 0.125


def network(images):
    """Logits of a few sums of pixels."""
    weights = jnp.sin(jnp.arange(images[0].size * 3.0)).reshape(-1, 3)
    return jnp.tanh(images.reshape(len(images), -1) @ weights)


class RadiusTest(parameterized.TestCase):
    def test_grows_by_epochs(self):
        shares = [inner.share(step, 4, 3) for step in range(16)]
        expected = np.repeat([0, 1 / 3, 2 / 3, 1], 4)
        np.testing.assert_array_equal(shares, expected)
        self.assertEqual(inner.share(0, 4, 0), 1)

    def test_grows_after_a_delay(self):
        shares = [inner.share(step, 4, 3, 2) for step in range(24)]
        expected = np.repeat([0, 0, 0, 1 / 3, 2 / 3, 1], 4)
        np.testing.assert_array_equal(shares, expected)
        self.assertEqual([inner.share(step, 1, 0, 2) for step in range(4)], [0, 0, 1, 1])

    @sweeps.rows(
        ("pgd", "adversarial", "linf", 0.25),
        ("apgd", "trades", "linf", 0.25),
        ("fgsm", "adversarial", "linf", 0.25),
        ("pgd", "trades", "l2", 0.0),
        ("apgd", "adversarial", "l2", 1.0),
        ("fgsm", "trades", "l2", 1.0),
    )
    def test_is_the_attack_of_that_radius_with_the_step_of_the_whole(
        self, name, objective, norm, share
    ):
        config = small_config(
            attack__name=name, attack__norm=norm, attack__epsilon=EPSILON,
            attack__start="random", attack__warmup_epochs=4,
        )  # fmt: skip
        rng = np.random.default_rng(0)
        images = jnp.asarray(rng.random((3, 4, 4, 1), np.float32))
        targets = jax.nn.softmax(jnp.asarray(rng.normal(size=(3, 3)), jnp.float32))
        keys = attacks.image_keys(jax.random.key(1), 3)
        grown = inner.training_attack(config, objective)
        found = grown(network, keys, images, targets, epsilon_share=jnp.float32(share))
        how = {"norm": norm, "epsilon": share * EPSILON, "random_start": True}
        how["loss"] = "kl" if objective == "trades" else "ce"
        expected = {
            "pgd": lambda: attacks.pgd(steps=3, step_size=2.5 * EPSILON / 3, **how),
            "apgd": lambda: attacks.apgd(steps=3, **how),
            "fgsm": lambda: attacks.fgsm(step_size=EPSILON, **how),
        }[name]()(network, keys, images, targets)
        np.testing.assert_array_equal(found, expected)
        moved = float(jnp.abs(found - images).max())
        self.assertEqual(moved > 0, share > 0)

    def test_steps_of_the_config_are_not_scaled(self):
        config = small_config(
            attack__name="pgd", attack__relative_step=1.5, attack__warmup_epochs=2
        )
        with rows.making("pgd") as made:
            attack = inner.training_attack(config, "adversarial")
            attack(None, None, jnp.zeros((2, 4, 4, 3)), None, epsilon_share=0.5)
        np.testing.assert_allclose(made.call_args.kwargs["epsilon"], np.full(2, 4 / 255), rtol=1e-6)
        self.assertEqual(made.call_args.kwargs["step_size"], 1.5 * 8 / 255)

    @sweeps.rows(("pgd", "pgd", 3, 5), ("apgd", "apgd", 3, 5), ("fgsm", "pgd", 1, 3))
    def test_a_stronger_attack_has_so_many_steps_more(self, name, stronger, few, many):
        config = small_config(attack__name=name, attack__steps=3)
        for more, made_by, steps in ((0, name, few), (2, stronger, many)):
            with rows.making(made_by) as made:
                inner.training_attack(config, "adversarial", extra_steps=more)
            self.assertEqual(made.call_args.kwargs["steps"], steps)

    @sweeps.rows(
        ("image", {}, False),
        ("random", {}, True),
        ("uniform", {}, attacks.Noise(False)),
        ("uniform-boxed", {}, attacks.Noise(False, projected=True)),
        ("gauss", {"relative_step": 0.25}, attacks.Noise(True, 2 / 255)),
        ("gauss-boxed", {"start_std": 0.001}, attacks.Noise(True, 0.001, projected=True)),
    )
    def test_starts(self, start, changes, expected):
        config = small_config(attack__name="pgd", attack__start=start)
        config.attack.update(changes)
        with rows.making("pgd") as made:
            inner.training_attack(config, "adversarial")
        self.assertEqual(made.call_args.kwargs["random_start"], expected)

    @sweeps.rows(
        ({"start": "gaus"}, "attack.start='gaus' must be one of 'image', 'random', 'uniform'"),
        ({"start": "uniform"}, "is only for attack.name='fgsm', 'pgd'.*; APGD starts at"),
        ({"name": "pgd", "start": "gauss"}, "needs attack.start_std, its standard deviation in"),
        (
            {"name": "pgd", "start": "uniform", "norm": "l1", "epsilon": 12.0},
            "start needs linf and l2, not l1",
        ),
        ({"start": "random", "start_std": 0.1}, "start_std=0.1 has no effect .*; leave it out, or"),
        (
            {"name": "pgd", "start": "gauss", "start_std": 0.0},
            "std=0.0 does not change the image; pass",
        ),
        ({"warmup_epochs": -1}, "attack.warmup_epochs=-1 must be at least 0 and below"),
        ({"warmup_epochs": 3}, "below train.epochs=3, so that the radius reaches"),
        ({"delay_epochs": -1}, "attack.delay_epochs=-1 must be at least 0, and with"),
        ({"delay_epochs": 2, "warmup_epochs": 1}, "with attack.warmup_epochs=1 below train"),
        ({"delay_epochs": 2, "epsilon": 0.0}, "delay_epochs=2 has no effect with attack.epsilon=0"),
        ({"warmup_epochs": 2, "epsilon": 0.0}, "with attack.epsilon=0; set attack.warmup_epochs=0"),
    )
    def test_refuses(self, changes, message):
        config = small_config()
        config.attack.update(changes)
        with self.assertRaisesRegex(ValueError, message):
            build.phase(config, "train", 80, devices=jax.devices()[:1])

    @sweeps.rows("adversarial", "trades", "mart")
    def test_trades_alone_refuses_to_start_at_the_image(self, objective):
        config = small_config(train__objective=objective)
        if objective != "trades":
            inner.training_attack(config, objective)
            return
        with self.assertRaisesRegex(ValueError, "loss is zero; set attack.start='random', "):
            inner.training_attack(config, objective)


class ProgramTest(parameterized.TestCase):
    def lowered(self, config):
        phase = build.phase(config, "train", 80, devices=jax.devices()[:1])
        arguments = build.abstract_arguments(config, "train", phase)
        probe = build.probe(config, "train", phase)
        with jax.set_mesh(phase.mesh):
            return [f.lower(*arguments).as_text() for f in (phase.step, probe)]

    @parameterized.parameters(
        ({"attack__name": "apgd"},),
        ({"attack__name": "pgd", "train__objective": "trades", "attack__start": "random"},),
    )
    @pytest.mark.slow
    def test_one_for_every_length(self, changes):
        with standard():
            short, long = (
                self.lowered(
                    small_config(attack__warmup_epochs=n, alarm__every_steps=5000, **changes)
                )
                for n in (1, 2)
            )
            never = self.lowered(small_config(alarm__every_steps=5000, **changes))
        self.assertEqual(short, long)
        self.assertNotEqual(short, never)

    @pytest.mark.slow
    def test_one_for_every_epoch(self):
        config = small_config(attack__warmup_epochs=2, attack__steps=1)
        with standard():
            phase = build.phase(config, "train", 80, devices=jax.devices()[:1])
            with jax.set_mesh(phase.mesh):
                state = phase.init(jax.random.key(0))
                losses = []
                for share in (0.0, 0.5, 1.0):
                    control = build.control(phase.mesh, epsilon_share=share)
                    copied = jax.tree.map(jnp.copy, state)  # a step donates it
                    losses.append(float(phase.step(copied, batch_of(), control)[1]["loss"]))
            self.assertEqual(phase.step._cache_size(), 1)
        self.assertLess(losses[0], losses[1])
        self.assertLess(losses[1], losses[2])

    @mock.patch.object(cpus, "kind", lambda: cpus.KINDS[1])  # whose step may be in a program
    def test_the_radius_of_before_is_a_constant(self):
        """Without a warm-up the program reads no share: it is the one of before that key."""
        config = small_config(attack__steps=1)
        with standard():
            phase = build.phase(config, "train", 80, devices=jax.devices()[:1])
            traced = jax.make_jaxpr(phase.step)(*build.abstract_arguments(config, "train", phase))
        (call,) = traced.eqns
        share = call.params["jaxpr"].jaxpr.invars[-1]
        used = [v for eqn in call.params["jaxpr"].jaxpr.eqns for v in eqn.invars]
        self.assertFalse(any(v is share for v in used))


class ResumeTest(absltest.TestCase):
    @pytest.mark.slow
    def test_goes_on_in_the_middle(self):
        """Stopped in the second of three epochs of growth, of four steps each."""
        self.enter_context(
            mock.patch.object(
                accuracy, "count", return_value={"clean": 0.5, "robust": 0.25, "images": 80}
            )
        )
        folder = Path(self.create_tempdir())
        config = one_phase(train__epochs=4, attack__warmup_epochs=3, attack__name="pgd")
        said = quiet_run(config, folder / "whole")
        stop_after(6, lambda: quiet_run(config, folder / "stopped"))
        quiet_run(config, folder / "stopped")
        whole, stopped = (final_state(folder / name, config)[0] for name in ("whole", "stopped"))
        states = (state._replace(key=jax.random.key_data(state.key)) for state in (whole, stopped))
        jax.tree.map(np.testing.assert_array_equal, *states)
        for name in ("whole", "stopped"):
            rows = [row for row in jsonl.read(folder / name / "metrics.jsonl") if "loss" in row]
            expected = np.repeat([0, 1 / 3, 2 / 3, 1], 4) * config.attack.epsilon
            np.testing.assert_allclose([row["epsilon"] for row in rows], expected)
        self.assertIn("epsilon 8.5/255", said)
