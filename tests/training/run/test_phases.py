"""Phases with a resolution, a radius, data or a start of their own, one after the other."""

import json
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from jaxrobust.config import VERSION, base, completed, of_phase, phase, phases, plain
from jaxrobust.training.run import run as training_run
from jaxrobust.types import Weights
from jaxrobust.weights import start
from jaxrobust.weights.trained import runs
from tests.support import result_lines, sweeps
from tests.support.runs import final_state, quiet_run, run_of_class, stop_after, tiny

SHORT = {"epochs": 1, "batch_size": 64, "warmup_epochs": 0, "ema_decay": 0.5, "lr": 0.01}
LOW = {"model": {"image_size": 4}, "data": {"augmentation": "resized-crop"}}


def three(**changes):
    """Low resolution, then the whole one, then a larger radius from the first or the second."""
    config = tiny(log__every_steps=1).unlock()
    config.phases = ("low", "train", "larger")
    config.train.update(**SHORT)
    config.low = phase(**SHORT)
    config.low.changes = LOW
    config.larger = phase(**SHORT)
    config.larger.changes = {"attack": {"epsilon": 0.2, "steps": 1}}
    for key, value in changes.items():
        section, _, name = key.rpartition("__")
        setattr(config[section] if section else config, name, value)
    return config.lock()


def best(workdir: Path, name: str) -> Weights:
    """The best weights of a phase, as they are stored."""
    with jax.numpy_dtype_promotion("standard"):
        return jax.device_get(runs.run_weights(workdir, name)[1])


@pytest.mark.slow
class RunTest(absltest.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.workdir, cls.said = run_of_class(cls, three())

    @pytest.mark.slow
    def test_each_has_its_own(self):
        for name in ("low", "train", "larger"):
            self.assertIn(f"{name}: step 0 of 4, adversarial", self.said)
        rows = result_lines.read(self.workdir)
        self.assertEqual([row["weights"].split(",")[0] for row in rows], ["low", "train", "larger"])
        self.assertEqual([row["attacks"][0]["epsilon"] for row in rows], [0.1, 0.1, 0.2])
        self.assertEqual(rows[0]["preprocessing"], "bicubic-4-crop-4")
        self.assertEqual(rows[1]["preprocessing"], "none")

    def test_others_see_the_last_one_or_the_one_they_name(self):
        self.assertEqual(runs.run_config(self.workdir).attack.epsilon, 0.2)
        self.assertEqual(runs.run_config(self.workdir, "train").attack.epsilon, 0.1)
        self.assertEqual(runs.run_config(self.workdir, "low").model.image_size, 4)
        with self.assertRaisesRegex(ValueError, "--phase=small is unknown; choose one of low, tr"):
            runs.run_config(self.workdir, "small")

    @pytest.mark.slow
    def test_stops_at_any_boundary_end_in_the_same_bits(self):
        straight, _ = final_state(self.workdir, of_phase(three(), "larger"), "larger")
        workdir = Path(self.create_tempdir()) / "run"
        for after in (4, 1, 4):  # at the end of a phase, after its end, at the end of the next
            stop_after(after, lambda: quiet_run(three(), workdir))
        quiet_run(three(), workdir)
        again, _ = final_state(workdir, of_phase(three(), "larger"), "larger")
        jax.tree.map(
            np.testing.assert_array_equal,
            *(jax.tree.map(np.asarray, (s.params, s.opt_state)) for s in (straight, again)),
        )


class StartTest(parameterized.TestCase):
    @pytest.mark.slow
    def test_from_an_earlier_one_by_its_name(self):
        seen = {}
        real = training_run._run_phase

        def noted(run, weights):
            seen[run.name] = weights
            return real(run, weights)

        workdir = Path(self.create_tempdir()) / "run"
        with mock.patch.object(training_run, "_run_phase", noted):
            quiet_run(three(larger__start="low"), workdir)
        self.assertIsNone(seen["low"])
        for name in ("train", "larger"):
            for key, value in best(workdir, "low").params.items():
                np.testing.assert_array_equal(seen[name].params[key], value)

    @pytest.mark.slow
    def test_other_classes_get_a_new_head(self):
        own = {"data": {"name": "fake:8x8x1:4", "train_split": "train[:128]"}}
        own["data"] |= {"selection_split": "train[:32]", "test_split": "train[:32]"}
        own["model"] = {"num_classes": 4}
        config = three(larger__changes=own, larger__head="fresh")
        workdir = Path(self.create_tempdir()) / "run"
        quiet_run(config, workdir)
        before, after = best(workdir, "train").params, best(workdir, "larger").params
        self.assertEqual((before["head.fc.bias"].size, after["head.fc.bias"].size), (10, 4))
        self.assertEqual(result_lines.read(workdir)[-1]["dataset"], "fake:8x8x1:4")
        noted = (workdir / "data.json").read_text()
        self.assertIn('"data.train_split.records": 256', noted)
        self.assertIn('"larger.data.train_split.records": 128', noted)


class ChecksTest(parameterized.TestCase):
    @sweeps.rows(
        ({"phases": ("low", "small")}, r"names 'small', but .*; add config.small = phase"),
        ({"phases": ("low", "low")}, "names 'low' twice; rename the second"),
        ({"phases": ("model",)}, "names 'model', but the config has no such section"),
        ({"phases": ()}, r"phases=\(\): there is nothing to train"),
        ({"low__head": "fresh"}, "low.head='fresh': the first phase .*; set init.head"),
        ({"low__normalize": "half"}, "low.normalize='half': the first .*; set init.normalize"),
        ({"low__start": "train"}, "low.start='train': the first phase .*; set init.weights"),
        ({"train__start": "larger"}, "train.start='larger': .*one that runs, low$"),
        ({"larger__changes": {"attack": {"epsilom": 1}}}, "epsilom is not a key; did you mean ep"),
        (
            {"larger__changes": {"seed": 1}},
            r"larger.changes.seed is not a key; one of model, data, ",
        ),
        ({"larger__changes": {"attack": 3}}, "larger.changes.attack is a section, but 3 is a"),
        (
            {"larger__changes": {"attack": {"steps": {"a": 1}}}},
            "steps is a value, not a section",
        ),
        ({"larger__changes": {"model": {"num_classes": 4}}}, "larger.head=fresh for a new"),
        ({"larger__changes": {"model": {"name": "vit_s", "options": {}}}}, "weights of convnext_n"),
        ({"low__changes": {"model": {"image_size": 1}}}, "image_size=1"),
    )
    def test_refused_before_anything_is_written(self, changes, message):
        workdir = Path(self.create_tempdir()) / "run"
        with self.assertRaisesRegex(ValueError, message):
            quiet_run(three(**changes), workdir)
        self.assertFalse(workdir.exists())

    def test_phases_without_epochs_do_not_happen(self):
        config = three(train__epochs=0)
        self.assertEqual(phases(config), ["low", "larger"])
        start.check_phases(config, phases(config))

    def test_a_run_of_before_gets_the_defaults(self):
        """Of a config.json whose keys are older than those of phases."""
        old = plain(base())
        for name in ("pretrain", "train"):
            for key in ("from_random", "start", "stem", "head", "changes"):
                del old[name][key]
        del old["phases"]
        self.assertEqual(completed(old), plain(base()))

    def test_a_run_of_before_keeps_its_tensorboard(self):
        for asked, now in ((True, "tensorboard"), (False, "")):
            old = plain(base())
            old["log"] = {"every_steps": 50, "tensorboard": asked}
            self.assertEqual(completed(old)["log"], {"every_steps": 50, "to": now})

    def test_a_run_of_before_goes_on(self):
        workdir = Path(self.create_tempdir())
        config = plain(tiny())
        old = {key: value for key, value in config.items() if key != "phases"}
        new_keys = ("changes", "schedule", "optimizer", "nesterov", "warmup_lr")
        old["train"] = {key: value for key, value in old["train"].items() if key not in new_keys}
        old["log"] = {"every_steps": 3, "tensorboard": True}
        (workdir / "config.json").write_text(json.dumps({"version": VERSION} | old))
        training_run.claim(workdir, config, {})
        with self.assertRaisesRegex(ValueError, "train.lr: 0.01 there, 0.5 now"):
            training_run.claim(workdir, plain(tiny(train__lr=0.5)), {})
