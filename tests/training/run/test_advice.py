"""What a run says about its config before it trains, and steps that follow the radius."""

import importlib
import json
from pathlib import Path
from unittest import mock

import jax
from absl.testing import parameterized

from jaxrobust.config import VERSION, phases
from jaxrobust.training import build
from jaxrobust.training.run import run as training_run
from jaxrobust.training.run import warnings
from tests.support import rows, sweeps
from tests.support.runs import quiet_run, tiny
from tests.support.steps import small_config


def published(name: str, **changes):
    """A config of the folder `configs`, changed."""
    config = importlib.import_module(f"configs.{name}").get_config()
    for key, value in changes.items():
        target, _, field = key.rpartition("__")
        setattr(config[target] if target else config, field, value)
    return config


def step_of(config) -> float:
    """The step in pixels that training's PGD or FGSM is built with."""
    with rows.making(config.attack.name) as made:
        build.training_attack(config, config.train.objective)
    return made.call_args.kwargs["step_size"]


class StepTest(parameterized.TestCase):
    @sweeps.rows(("test", "test[:100]", True), ("train[:100]", "test", False))
    def test_weights_that_are_chosen_on_what_is_reported(self, selection, test, told):
        splits = {"train": "train[100:]", "selection": selection, "test": test}
        config = small_config(**{f"data__{key}_split": split for key, split in splits.items()})
        lines = warnings.lines({"train": config})
        self.assertEqual(bool(lines), told)
        if told:
            self.assertRegex(
                lines[0], "shares images with data.test_split=test.* the record carries a flag"
            )
        self.assertEmpty(warnings.of_step(config, "train"))

    @sweeps.rows(
        ({}, []),
        (
            {"train": "all"},
            ["train_split=all with test_split=test", "train_split=all with selection"],
        ),
        ({"selection": "train[50:]"}, ["train_split=train[:90] with selection_split=train[50:]"]),
        ({"extra": ("digits", "train[:9]")}, []),
        (
            {"extra": ("digits", "train[95:]")},
            ["extra_split=train[95:] with selection_split=train["],
        ),
        ({"extra": ("digits", "test[:9]")}, ["extra_split=test[:9] with test_split=test"]),
        ({"extra": ("cifar10", "test[:9]")}, []),
        ({"extra": ("", "test[:9]")}, []),
    )
    def test_splits_that_share_images(self, changes, told):
        """Also those next to the data set, which are trained on too."""
        splits = {"train": "train[:90]", "selection": "train[90:]", "test": "test"} | changes
        extra, extra_split = splits.pop("extra", ("", "train"))
        config = small_config(**{f"data__{key}_split": split for key, split in splits.items()})
        config.unlock().data.update(name="digits", extra=extra, extra_split=extra_split)
        lines = warnings.lines({"pretrain": config, "train": config})  # each once
        said = [line.replace(" shares images", "").replace("data.", "") for line in lines]
        self.assertLen(said, len(told), said)
        for line, start in zip(said, told, strict=True):
            self.assertStartsWith(line, start)

    @sweeps.rows((4 / 255, 6 / 255), (8 / 255, 12 / 255))
    def test_xcit_takes_one_and_a_half_radii(self, epsilon, step):
        config = published("xcit_s12", attack__epsilon=epsilon)
        self.assertAlmostEqual(step_of(config), step, delta=1e-12)
        self.assertEmpty(warnings.lines({"train": config}))

    def test_pgd(self):
        changes = {"attack__name": "pgd", "attack__epsilon": 0.25}
        self.assertEqual(step_of(small_config(**changes, attack__relative_step=0.5)), 0.125)
        self.assertEqual(step_of(small_config(**changes, attack__step_size=0.03)), 0.03)
        self.assertEqual(
            step_of(small_config(**changes)), 2.5 * 0.25 / 3
        )  # as `attacks.pgd` has it

    def test_no_radius_leaves_no_room(self):
        self.assertIsNone(
            step_of(published("xcit_s12", attack__epsilon=0.0))
        )  # a step of 0 is none

    @sweeps.rows(
        (
            {"attack__step_size": 0.125, "attack__relative_step": 1.5},
            "step_size=0.125 and attack.relative_step=1.5 are both set.* attack.relative_step=0.5",
        ),
        ({"attack__relative_step": 0.0}, "attack.relative_step=0.0 must be above 0"),
        ({"attack__relative_step": float("nan")}, "attack.relative_step=nan must be above 0"),
    )
    def test_refusals(self, changes, message):
        config = small_config(attack__name="pgd", attack__epsilon=0.25, **changes)
        with self.assertRaisesRegex(ValueError, message):
            build.phase(config, "train", 1000, devices=jax.devices()[:1])

    def test_a_step_in_pixels_is_told(self):
        config = small_config(
            attack__name="fgsm", attack__step_size=1.5 * 4 / 255, attack__epsilon=8 / 255
        )
        (line,) = warnings.lines({"train": config})
        self.assertIn("attack.step_size=0.02353 is 0.75 times attack.epsilon=0.03137", line)
        self.assertIn("attack.relative_step=0.75", line)
        with config.unlocked():
            config.train.objective = "clean"
        self.assertEmpty(warnings.lines({"train": config}))

    @sweeps.rows("step_size", "relative_step")
    def test_a_step_that_nobody_reads_is_told(self, key):
        config = small_config(attack__name="apgd", **{f"attack__{key}": 1.5})
        (line,) = warnings.lines({"train": config})
        self.assertIn(f"attack.{key}=1.5 has no effect", line)

    def test_the_same_step_written_otherwise_is_the_same_run(self):
        new = json.loads(published("xcit_s12").to_json())
        old = json.loads(published("xcit_s12").to_json())
        old["attack"] |= {"relative_step": None, "step_size": 1.5 * 4 / 255}
        workdir = Path(self.create_tempdir())
        (workdir / "config.json").write_text(json.dumps({"version": VERSION} | old))
        training_run.claim(workdir, new, {})
        new["attack"]["relative_step"] = 2.0
        with self.assertRaisesRegex(ValueError, "attack.step_size: 0.0235.* there, 0.0313"):
            training_run.claim(workdir, new, {})


class RandomWeightsTest(parameterized.TestCase):
    """Adversarial training under heavy augmentation that starts from nothing."""

    def refused(self, config, first="train"):
        with self.assertRaisesRegex(
            ValueError,
            f"{first} would attack random weights under heavy augmentation, .*Start from clean "
            rf"weights \(init.weights=.*pretrain.epochs=100\), .*=basic, or, .*, set {first}.from_",
        ):
            warnings.check_start(config, first)

    @sweeps.rows("convnext_b_cvst", "convnext_t_cvst", "vit_b_cvst", "vit_s_cvst")
    def test_the_headline_commands_start_from_clean_weights(self, name):
        config = published(name)
        self.assertEqual(phases(config), ["pretrain", "train"])
        self.assertEqual((config.pretrain.objective, config.init.stem), ("clean", "fresh"))
        self.assertRegex(config.init.weights, "_in1k$")
        warnings.check_start(config, "pretrain")
        self.refused(published(name, init__weights=None))

    def test_the_ways_out(self):
        bare = {"init__weights": None, "pretrain__epochs": 0}
        self.refused(published("convnext_b_cvst", **bare))
        for change in (
            {"init__weights": "weights/b"},
            {"data__augmentation": "basic"},
            {"train__from_random": True},
            {"train__objective": "clean"},
        ):
            warnings.check_start(published("convnext_b_cvst", **(bare | change)), "train")

    @sweeps.rows("quickstart", "cifar10_convnext", "xcit_s12")
    def test_others_are_not_refused(self, name):
        config = published(name)
        warnings.check_start(config, phases(config)[0])

    @sweeps.rows(
        {"data__augmentation": "3-augment"},
        {"data__augmentation": "resized-crop|randaugment"},
        {"data__augmentation": "flip", "mixup__cutmix": 1.0},
        {"data__augmentation": "heavy", "mixup__mixup": 0.0, "mixup__cutmix": 0.0},
    )
    def test_what_heavy_is(self, **changes):
        self.refused(small_config(**changes))

    def test_a_run_that_goes_on_has_its_weights(self):
        config = tiny(data__augmentation="crop|randaugment", pretrain__epochs=0)
        workdir = Path(self.create_tempdir()) / "run"
        with mock.patch.object(training_run, "_phases"):
            with self.assertRaisesRegex(ValueError, "would attack random weights"):
                quiet_run(config, workdir)
            self.assertFalse(workdir.exists())
            with mock.patch.object(training_run, "steps", lambda folder: [3]):
                quiet_run(config, workdir)


class NumbersTest(parameterized.TestCase):
    """Ends of the ranges of what every run has, and what makes another run of it."""

    @sweeps.rows(
        *("evaluation.images", "test.images", "checkpoint.keep_every_epochs", "data.max_damaged"),
        *("mesh.fsdp", "alarm.every_steps", "trouble.skips", "trouble.rollbacks"),
        *(("evaluation.every_epochs", 1), ("checkpoint.every_epochs", 1)),
        *(("alarm.images", 1), ("log.every_steps", 1)),
    )
    def test_lowest(self, key, lowest=0):
        name = key.replace(".", "__")
        training_run.check_numbers(tiny(**{name: lowest}))
        with self.assertRaisesRegex(ValueError, rf"{key}={lowest - 1} must be at least {lowest}"):
            training_run.check_numbers(tiny(**{name: lowest - 1}))

    def test_seeds_rates_and_weights(self):
        for good in (
            *({"seed": 0}, {"seed": 2**32 - 1}, {"trouble__lr": 1.0}, {"trouble__lr": 1e-9}),
            *({"evaluation__weights": "raw"}, {"evaluation__weights": "ema"}),
        ):
            training_run.check_numbers(tiny(**good))
        for bad, said in (
            ({"seed": 2**32}, "seed=4294967296 must be from 0"),
            ({"trouble__lr": 0.0}, "trouble.lr=0.0 must be above 0, at most 1"),
            ({"trouble__lr": 1.001}, "trouble.lr=1.001 must be above 0, at most 1"),
            (
                {"evaluation__weights": "both"},
                "evaluation.weights='both' must be one of 'ema', 'raw'",
            ),
        ):
            with self.assertRaisesRegex(ValueError, said):
                training_run.check_numbers(tiny(**bad))

    @sweeps.rows(
        *("name", "dir", "train_split", "selection_split", "test_split", "classes", "extra"),
        "extra_split",
    )
    def test_what_makes_other_data(self, key):
        config = tiny()
        before = training_run._data_of(config)
        with config.unlocked():
            config.data[key] = "another"
        self.assertNotEqual(training_run._data_of(config), before)

    def test_what_does_not(self):
        before = training_run._data_of(tiny())
        for changes in ({"data__views": 2}, {"data__augmentation": "none"}, {"seed": 5}):
            self.assertEqual(training_run._data_of(tiny(**changes)), before)
        for changes in ({"model__num_classes": 7}, {"model__in_channels": 3}):
            self.assertNotEqual(training_run._data_of(tiny(**changes)), before)

    def test_what_is_free_to_change(self):
        old = {"test.images": 1, "log.every_steps": 5, "train.lr": 1, "checkpoint.every_epochs": 2}
        old |= {"checkpoint.keep_every_epochs": 0, "data.workers": 2, "data.name": "a"}
        new = {key: f"{value} more" for key, value in old.items()}
        found = training_run._differing(old, new, free=training_run._FREE)
        expected = ["checkpoint.every_epochs", "data.name", "train.lr"]
        self.assertEqual([line.partition(":")[0] for line in found], expected)
        self.assertEqual(training_run._differing({"a": 1}, {}), ["a: 1 there, None now"])
