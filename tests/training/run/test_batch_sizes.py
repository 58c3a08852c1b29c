"""Batches that the devices do not divide become the nearest that they do, and the run says so."""

import json
from pathlib import Path
from unittest import mock

from absl.testing import absltest, parameterized

from jaxrobust.training.run import run as training_run
from jaxrobust.training.run import warnings
from tests.support import sweeps
from tests.support.runs import quiet_run, tiny


def sizes(devices, **changes):
    """The batches of both phases on so many devices."""
    config, said = warnings.fitted_batches(tiny(**changes), devices)
    return config.pretrain.batch_size, config.train.batch_size, len(said)


class NearestTest(parameterized.TestCase):
    @sweeps.rows(
        # (batch, devices, what else, the batch that it becomes)
        (1408, 256, {}, 1536),  # 5.5 images each: of two as near, the larger
        (864, 256, {}, 768),  # 3.4
        (864, 256, {"mixup__mixup": 0.8}, 1024),  # 3 would leave one without another to mix with
        (64, 3, {}, 63),
        (64, 3, {"train__microbatches": 4}, 60),
        (64, 3, {"mixup__group": 4, "erase__probability": 0.3}, 63),  # neither mixes images
        (64, 3, {"model__options": {"bn_group": 5}, "train__microbatches": 2}, 60),
        (60, 8, {"mixup__cutmix": 1.0, "mixup__group": 4, "train__microbatches": 2}, 64),
        (64, 8, {"mixup__cutmix": 1.0, "mixup__group": 6}, 64),  # divided: `build` refuses the rest
        (768, 256, {"mixup__mixup": 0.8}, 1024),  # 3 each, of which one would stay alone
        (384, 16, {"train__microbatches": 16}, 512),  # 24 each, in 16 parts
        (60, 1, {"train__microbatches": 8}, 60),  # nor does one device: `build` says it
        (64, 200, {}, 64),  # 200 is too far away, as `build.divides` will say
    )
    def test_nearest(self, batch, devices, changes, expected):
        _, train, said = sizes(devices, train__batch_size=batch, pretrain__epochs=0, **changes)
        self.assertEqual((train, said), (expected, int(batch != expected)))

    def test_each_phase_has_its_own(self):
        found = sizes(3, pretrain__batch_size=65, train__batch_size=63)
        self.assertEqual(found, (66, 63, 1))

    def test_the_config_that_is_given_stays(self):
        given = tiny()
        changed, _ = warnings.fitted_batches(given, 3)
        self.assertEqual((given.train.batch_size, changed.train.batch_size), (64, 63))
        self.assertIs(warnings.fitted_batches(given, 8)[0], given)

    def test_what_is_said(self):
        _, (pretrain, train) = warnings.fitted_batches(tiny(train__lr=0.003), 3)
        self.assertEqual(
            train,
            "train.batch_size=64 cannot be split over 3 devices: using 63 instead, the nearest "
            "size that fits, without changing train.lr=0.003",
        )
        self.assertStartsWith(pretrain, "pretrain.batch_size=64 cannot be split over 3 devices")
        _, (said,) = warnings.fitted_batches(
            tiny(mixup__mixup=0.8, pretrain__epochs=0, train__batch_size=192), 64
        )
        self.assertStartsWith(
            said,
            "train.batch_size=192 cannot be split over 64 devices into parts of 3 images, as "
            "2 belong together: using 256",
        )


class RunTest(absltest.TestCase):
    def test_a_run_says_it_and_its_record_has_the_batch_that_is_used(self):
        workdir = Path(self.create_tempdir().full_path) / "run"
        with mock.patch.object(training_run, "_phases") as trained:
            said = quiet_run(tiny(train__batch_size=60), workdir)  # on 8 devices
        self.assertIn("train.batch_size=60 cannot be split over 8 devices: using 64", said)
        written = json.loads((workdir / "config.json").read_text())
        self.assertEqual(written["train"]["batch_size"], 64)
        config, _, given, parts, *_ = trained.call_args.args
        self.assertEqual(config.train.batch_size, 64)
        self.assertEqual(given["train"]["batch_size"], 64)  # of which a record's config hash is
        batch = parts["train"].phase.total_steps, parts["train"].config.train.batch_size
        self.assertEqual(batch, (3 * 256 // 64, 64))
