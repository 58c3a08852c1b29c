"""An objective is a row: what is added by one call trains, is counted and is examined."""

import subprocess
import sys
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from ml_collections import ConfigDict

from jaxrobust import attacks
from jaxrobust.config import network_of
from jaxrobust.doctor import config_checks
from jaxrobust.doctor.findings import YELLOW
from jaxrobust.training import build
from jaxrobust.training.update import alarm, averages, inner, objectives
from tests.support import steps
from tests.support.paths import ROOT
from tests.support.runs import tiny


def halves(phase, attack):
    """The mean of clean and adversarial cross-entropy."""
    del phase
    clean, robust = objectives.clean(), objectives.adversarial(attack.labels)

    def loss(net, params, stats, batch, images_adv, key):
        one, (stats, known) = clean.loss(net, params, stats, batch, images_adv, key)
        other, (stats, more) = robust.loss(net, params, stats, batch, images_adv, key)
        return (one + other) / 2, (stats, known | more)

    return robust._replace(loss=loss)


class RowsTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.enter_context(mock.patch.dict(objectives.ROWS))
        objectives.add("halves", objectives.ObjectiveRow(halves, both=True))

    def config(self, **changes):
        return steps.small_config(train__objective="halves", **changes)

    def test_what_it_minimises(self):
        config, batch = self.config(), steps.batch_of()
        net, images = network_of(config), batch.images.astype(jnp.float32) / 255
        params, stats = jax.jit(net.init)(jax.random.key(0))
        made = objectives.named("halves").make(config.train, config.attack)
        shown = batch._replace(images=images)
        value, (_, metrics) = made.loss(net, params, stats, shown, images[::-1], None)
        one, other = (
            own.loss(net, params, stats, shown, images[::-1], None)[0]
            for own in (objectives.clean(), objectives.adversarial())
        )
        self.assertAlmostEqual(float(value), float(one + other) / 2, places=6)
        self.assertSameElements(metrics, ("clean", "robust"))

    @pytest.mark.slow
    def test_it_trains(self):
        config, batch = self.config(attack__name="fgsm"), steps.batch_of()
        phase = build.phase(config, "train", 24, devices=jax.devices()[:1], donate=False)
        state = phase.init(jax.random.key(0))
        with jax.numpy_dtype_promotion("standard"):  # of optax
            after, metrics = phase.step(state, batch, build.control(phase.mesh))
        self.assertContainsSubset(("clean", "robust", "loss"), metrics)
        name = "head.fc.kernel"
        self.assertGreater(float(jnp.abs(after.params[name] - state.params[name]).max()), 0)

    def test_its_passes_are_counted(self):
        config = self.config()
        flops = build.flops_per_image(config, "train") / build.forward_flops(config)
        self.assertEqual(flops, (2 * 3 + 1) + 6)
        own, mart = (
            alarm.check_cost(
                steps.small_config(train__objective=name, alarm__every_steps=10**6),
                "train",
                images=8,
            )
            for name in ("halves", "mart")
        )
        self.assertEqual(own, mart)

    def test_its_checks_are_those_of_its_row(self):
        config = self.config(train__bn_momentum=(1.0, 0.01))
        with self.assertRaisesRegex(ValueError, "objective='halves' changes them twice"):
            averages.running_statistics(config.train, "train")
        for name, meant in (("halve", "halves"), ("trades-awq", "trades-awp"), ("hatt", "hat")):
            said = rf"unknown objective '{name}'; did you mean {meant}\?"
            with self.assertRaisesRegex(ValueError, said):
                build.phase(steps.small_config(train__objective=name), "train", 24)

    def test_a_key_of_its_own(self):
        """It is checked where its objective is used; a config that lacks it is told so."""
        row = objectives.ObjectiveRow(halves, both=True, weights=("thirds_beta",))
        objectives.add("thirds", row)
        config = steps.small_config()
        with config.unlocked():
            config.train.thirds_beta = -1.0
        build.phase(config, "train", 24)
        config.train.objective = "thirds"
        with self.assertRaisesRegex(ValueError, "train.thirds_beta=-1.0 must be at least 0"):
            build.phase(config, "train", 24)
        said = r"train.thirds_beta, which the config does not set; add it as in phase\(thirds_beta="
        with self.assertRaisesRegex(ValueError, said):
            build.phase(steps.small_config(train__objective="thirds"), "train", 24)

    def test_an_attack_at_probabilities(self):
        row = objectives.ROWS["trades"]._replace(weights=())
        objectives.add("mine", row)
        with self.assertRaisesRegex(ValueError, "objective='mine' cannot .* attack.start='image'"):
            inner.training_attack(steps.small_config(), "mine")
        config = tiny(train__objective="mine", attack__start="random", attack__statistics="batch")
        config.unlock().model.update(name="resnet18")
        config.model.options = ConfigDict({"depths": (1, 1, 1, 1)})
        look = next(
            own.look for own in config_checks.CONFIG_CHECKS if own.name == "batch-statistics"
        )
        self.assertEqual(look(config_checks.PlannedRun(config)).level, YELLOW)

    def test_an_inner_loss_that_is_not_the_outer_one(self):
        """The distance to the clean outputs, as FARE's attack raises, under a cross-entropy."""
        targets = lambda logits_fn, batch: logits_fn(batch.images)  # noqa: E731
        away = lambda outputs, clean: ((outputs - clean) ** 2).sum(-1)  # noqa: E731
        make = lambda phase, attack: objectives.adversarial()._replace(attack_targets=targets)  # noqa: E731
        row = objectives.ObjectiveRow(make, attack_loss=away, of_probabilities=True)
        objectives.add("fare", row)
        config = steps.small_config(
            train__objective="fare", attack__name="pgd", attack__start="random"
        )
        build.phase(config, "train", 24)
        batch, rng = steps.batch_of(), np.random.default_rng(0)
        images = batch.images.astype(jnp.float32) / 255
        weights = jnp.asarray(rng.normal(size=(images[0].size, 10)), jnp.float32)
        network = lambda images: images.reshape(len(images), -1) @ weights  # noqa: E731
        clean = targets(network, batch._replace(images=images))
        points = inner.training_attack(config, "fare")(network, jax.random.key(0), images, clean)
        settings = {"epsilon": 8 / 255, "steps": 3, "loss": away}
        expected = attacks.pgd(**settings)(network, jax.random.key(0), images, clean)
        np.testing.assert_array_equal(points, expected)
        self.assertGreater(float(away(network(points), clean).min()), 0)
        with self.assertRaisesRegex(ValueError, "'cw' does not fit objective='fare', which defin"):
            build.phase(steps.small_config(train__objective="fare", attack__loss="cw"), "train", 24)

    def test_optional_ones_are_imported_when_asked_for(self):
        code = (
            "import sys, jaxrobust.training.run.run, jaxrobust.doctor.command\n"
            "from jaxrobust.doctor.estimate import account\n"
            "from jaxrobust.training.update import objectives\n"
            "from jaxrobust.zoo import names\n"
            "rows = [*names.OBJECTIVES.values(), *names.SEVERAL_NORMS.values()]\n"
            "loaded = lambda: {row.split(':')[0] for row in rows} & set(sys.modules)\n"
            "print(*loaded())\n"
            "objectives.named('hat')\n"
            "print(*loaded())"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
        )
        expected = ["", "jaxrobust.zoo.objectives.hat_examples"]
        self.assertEqual(done.stdout.splitlines(), expected)

    def test_a_name_that_is_there(self):
        with self.assertRaisesRegex(ValueError, "the objective mart already exists"):
            objectives.add("mart", objectives.ROWS["mart"])
