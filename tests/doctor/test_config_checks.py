"""Each fault in a config that has it, and nothing in those of the package."""

import functools
import json
import os
from unittest import mock

import jax
import jax.numpy as jnp
import pytest
from absl.testing import parameterized

from jaxrobust.config import Values, network_of, plain
from jaxrobust.doctor import command
from jaxrobust.doctor.config_checks import CONFIG_CHECKS, PlannedRun
from jaxrobust.doctor.findings import RED, SKIPPED, YELLOW, examined
from jaxrobust.models.kernels.cuda import hopper
from jaxrobust.types import Classifier
from tests.support import config_lines, sweeps
from tests.support.runs import tiny
from tools.generate import refresh_configs

TWICE = """
import jax.numpy as jnp
from jaxrobust import models
from jaxrobust.types import Classifier

def make(num_classes, image_size, in_channels):
    net = models.create("convnext_n", num_classes=num_classes, image_size=image_size,
                        depths=(1,), dims=(8,))
    mean = jnp.asarray([[[[0.485, 0.456, 0.406]]]])
    def apply(params, stats, images, **how):
        return net.apply(params, stats, (images - mean) / 0.225, **how)
    return Classifier(net.init, apply)
"""

# What is to be said of the rows of `configs/`: papers trained so, but for the average and for what
# a study asks.
REMARKS = {
    "augmentation_study:heavy-few": {"warm-up": YELLOW},
    "augmentation_study:heavy-warmup": {"warm-up": YELLOW},
    "generated_data:wrn_28_10,images=1m": {"batch-statistics": YELLOW},
    "generated_data:wrn_28_10,images=20m": {"batch-statistics": YELLOW},
    "generated_data:wrn_70_16,images=50m,data=cifar100": {"batch-statistics": YELLOW},
    "revisiting_at:convnext_b_cvst,batch=4096": {"ema-horizon": YELLOW},
    "transfer:xcit_s12,data=cifar100": {"batch-statistics": YELLOW},
    "transfer:xcit_s12,data=cifar10,start=random": {"batch-statistics": YELLOW},
    "transfer:xcit_s12,data=caltech": {"one-step": YELLOW},
}


# Studies that ask what such a fault costs, here one step from the image at 8/255.
ASKED = "cifar_study:run=one-step"


@functools.cache
def shaped(model):
    """The network of a config's section, as text, whose weights are drawn as zeros of their shapes:
    it is traced once for all lines that have it.
    """
    section = json.loads(model, object_hook=Values)
    net = network_of(Values(model=section))
    shapes = jax.eval_shape(net.init, jax.random.key(0))

    def init(key):
        return jax.tree.map(lambda like: jnp.zeros(like.shape, like.dtype), shapes)

    return Classifier(init, net.apply)


class Traced(PlannedRun):
    @property
    def net(self):
        return shaped(json.dumps(plain(self.config)["model"] | {"num_classes": 10}))


# Changes of a tiny config, whose radius is 0.1.
HEAVY = {"data__augmentation": "crop|randaugment", "pretrain__epochs": 0}
PGD = {"attack__name": "pgd", "attack__steps": 2}
ONE = {"attack__steps": 1, "attack__epsilon": 8 / 255}


def faults(config, devices=1):
    found = examined(CONFIG_CHECKS, PlannedRun(config, devices))
    return {f.check.name: f for f in found if f.result.level in (RED, YELLOW)}


class ConfigTest(parameterized.TestCase):
    def check_only(self, name, level, config, devices=1):
        found = faults(config, devices)
        self.assertEqual({k: f.result.level for k, f in found.items()}, {name: level}, found)
        return found[name]

    @sweeps.rows(*refresh_configs.names())
    @pytest.mark.slow
    def test_published(self, name):
        found = faults(refresh_configs.load(name), devices=8)
        levels = {k: f.result.level for k, f in found.items()}
        self.assertEqual(levels, REMARKS.get(name, {}), str(found))

    def test_no_line_of_a_family_is_red(self):
        lines = config_lines.lines()
        self.assertGreater(len(lines), 900)
        asked = [line for line in lines if line.startswith(ASKED)]
        self.check_lines([*lines[::12], *asked[:3]])

    @pytest.mark.slow
    def test_no_line_of_all_families_is_red(self):
        self.check_lines(config_lines.lines())

    def check_lines(self, lines):
        """Runs of papers, by all checks; what one of them traces, it traces once."""
        red, unknown = {}, []
        for line in lines:
            for found in examined(CONFIG_CHECKS, Traced(refresh_configs.load(line), 8)):
                if found.result.level == RED:
                    red[line] = f"{found.check.name}: {found.result.sentence}"
                if found.result.level == SKIPPED and found.check.name == "ema-horizon":
                    unknown.append(line)
        asked = {line for line in red if line.startswith(ASKED) and "one-step:" in red[line]}
        self.assertEmpty({line: said for line, said in red.items() if line not in asked})
        self.assertNotEmpty(asked)
        # Of files of one's own nobody knows how many images there are.
        own = ("extra=500k", "generated_data:")
        self.assertEmpty([line for line in unknown if not any(word in line for word in own)])

    @pytest.mark.slow
    def test_every_network_of_a_family_can_be_made(self):
        made = {
            json.dumps(plain(refresh_configs.load(line))["model"]) for line in config_lines.lines()
        }
        self.assertGreater(len(made), 150)
        for model in made:
            with self.subTest(model):
                self.assertIsNotNone(shaped(model))

    def test_lines_come_when_they_are_known(self):
        lines = []
        command.of_config(tiny(), devices=1, name="tiny", tell=lines.append)
        self.assertEqual(lines[0], "tiny on 1 device")
        self.assertEqual([f.check for f in lines[1:-1]], [*CONFIG_CHECKS])
        self.assertStartsWith(lines[-1], f"{len(CONFIG_CHECKS)} checks: ")
        with mock.patch.dict(os.environ, {hopper.FLAG: "1"}):
            command.of_config(tiny(), devices=1, name="tiny", tell=(noted := []).append)
        self.assertEqual(noted[:2], [hopper.NOTE, lines[0]])

    @sweeps.rows(
        ("heavy-augmentation", RED, "random weights do not learn", HEAVY),
        ("step-rule", RED, "the radius is never reached", PGD | {"attack__step_size": 0.02}),
        ("step-rule", RED, "overshoots the ball", PGD | {"attack__relative_step": 3.0}),
        ("step-rule", YELLOW, "attack.relative_step=0.6", PGD | {"attack__step_size": 0.06}),
        ("step-rule", YELLOW, "has no effect", {"attack__steps": 2, "attack__step_size": 0.06}),
        ("one-step", RED, "leaks the label", ONE | {"attack__start": "image"}),
        ("one-step", YELLOW, "leaks the label", ONE | {"attack__start": "random"}),
        ("ema-horizon", RED, "set train.ema_decay=0.167", {"train__ema_decay": 0.99}),  # 12 steps
        ("ema-horizon", YELLOW, "set train.ema_decay=0.167", {"train__ema_decay": 0.9}),
        ("warm-up", RED, "", {"train__warmup_epochs": 3}),
        ("warm-up", YELLOW, "", {"train__warmup_epochs": 2}),
        ("batch-and-mesh", RED, "train.batch_size=64 cannot be split over 200", {}, 200),
        ("batch-and-mesh", RED, "use 200 or 400", {}, 200),
        ("batch-and-mesh", YELLOW, "over 3 devices: using 63 instead, the near", {}, 3),
        (
            "image-size",
            RED,
            "digits has images of 8 px; the network takes 16",
            {"model__image_size": 16},
        ),
        (
            "image-size",
            RED,
            "digits have 1 channel, but the network expects 3",
            {"model__in_channels": 3},
        ),
        ("image-size", RED, "set model.in_channels=1", {"model__in_channels": 3}),
    )
    def test_one_fault(self, name, level, words, changes, devices=1):
        seen = self.check_only(name, level, tiny(**changes), devices).result
        self.assertIn(words, " ".join((seen.sentence, seen.cause, seen.remedy)))

    @sweeps.rows(
        {"train__epochs": 5, "pretrain__epochs": 5},
        {"train__ema_decay": 0.5},
        {"train__ema_decay": 0.9999, "evaluation__weights": "raw"},  # which nobody evaluates
    )
    def test_healthy(self, **changes):
        self.assertEmpty(faults(tiny(**changes)))

    def test_normalised_twice(self):
        file = self.create_tempfile("nets.py", TWICE)
        own = {"model__name": f"{file.full_path}:make", "model__options": {}}
        config = tiny(**own, model__image_size=32, model__in_channels=3, data__name="fake")
        for normalize in ("keep", "none", "imagenet"):
            self.assertNotIn("normalised-twice", faults(config))
            with config.unlocked():
                config.init.normalize = normalize
        found = faults(config)["normalised-twice"]
        self.assertEqual(found.result.level, RED)
        self.assertIn("contains the mean of imagenet", found.result.sentence)

    def test_steps_of_data_that_is_not_here(self):
        config = tiny(data__name="cifar10", data__dir="/nowhere", data__train_split="train[:1%]")
        found = examined(CONFIG_CHECKS, PlannedRun(config))
        (ema,) = [f for f in found if f.check.name == "ema-horizon"]
        self.assertIn("of 21", ema.result.sentence)  # 3 epochs of 500 images, 64 at a time
        steps = [PlannedRun(tiny(train__batch_size=n)).steps("train") for n in (64, 100)]
        self.assertEqual(steps, [12, 6])
        for images, steps in ((None, None), (1280, 60)):  # 20 batches of 64, 3 epochs
            config.data.update(extra="cifar10", extra_share=0.5, epoch_images=images)
            self.assertEqual(PlannedRun(config).steps("train"), steps)

    def test_data_that_is_not_here(self):
        config = tiny(data__name="folder:/nowhere", data__train_split="train")
        found = examined(CONFIG_CHECKS, PlannedRun(config))
        skipped = {f.check.name for f in found if f.result.level == SKIPPED}
        self.assertEqual(skipped, {"ema-horizon", "image-size"})
