"""Runs whose batches hold views of an image, or images of a second source."""

import json
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import pytest
from absl.testing import parameterized

from jaxrobust.data.prepare import generated as shards
from jaxrobust.evaluation.engine import accuracy
from jaxrobust.runtime.files import jsonl
from jaxrobust.training.run import splits
from tests.support import sweeps
from tests.support.runs import final_state, one_phase, quiet_run, stop_after


class ExtraTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        reached = {"clean": 0.5, "robust": 0.25, "images": 80}
        self.enter_context(mock.patch.object(accuracy, "count", return_value=reached))
        self.folder = Path(self.create_tempdir())
        self.generated = f"npz:{self.write('generated.npz')}"

    def write(self, name, *, number=160, classes=10, shape=(8, 8), seed=0):
        """A file of generated images, as they are published."""
        rng = np.random.default_rng(seed)
        images = rng.integers(0, 256, (number, *shape), np.uint8)
        np.savez(self.folder / name, image=images, label=np.arange(number) % classes)
        return self.folder / name

    def whole_and_stopped(self, config):
        """The last states of a run in one go and of one that was stopped after three updates."""
        quiet_run(config, self.folder / "whole")
        stop_after(3, lambda: quiet_run(config, self.folder / "stopped"))
        quiet_run(config, self.folder / "stopped")
        return (final_state(self.folder / name, config)[0] for name in ("whole", "stopped"))

    @pytest.mark.slow
    def test_goes_on_in_the_middle_of_an_epoch(self):
        """256 digits and 160 generated images, 32 of each in a batch: 5 steps an epoch."""
        config = one_phase(data__extra=self.generated, data__views=2, train__epochs=2)
        whole, stopped = self.whole_and_stopped(config)
        self.assertEqual(whole.step, 10)
        states = (state._replace(key=jax.random.key_data(state.key)) for state in (whole, stopped))
        jax.tree.map(np.testing.assert_array_equal, *states)
        rows = [r for r in jsonl.read(self.folder / "stopped/metrics.jsonl") if "loss" in r]
        self.assertEqual([row["step"] for row in rows], list(range(1, 11)))
        about = json.loads((self.folder / "whole/data.json").read_text())
        self.assertEqual(about["data.extra.records"], 160)
        with self.subTest("other generated images are another run"):
            self.write("generated.npz", seed=1)
            with self.assertRaisesRegex(ValueError, "data.extra.files_sha256"):
                quiet_run(config, self.folder / "stopped")

    @sweeps.fast()
    @parameterized.parameters(False, True)
    def test_goes_on_with_shards_in_the_same_bits(self, soft):
        """Stopped in the middle of an epoch; labels are classes, or their probabilities."""
        images = np.random.default_rng(5).integers(0, 256, (160, 8, 8, 1), np.uint8)
        label = np.random.default_rng(6).dirichlet(np.ones(10), 160).astype(np.float32)
        label = label if soft else label.argmax(1)
        np.savez(self.folder / "files.npz", image=images, label=label)
        words = [str(self.folder / "files.npz"), "--out", str(self.folder / "shards")]
        shards.prepare(shards.parse([*words, "--rows", "50", *["--soft"] * soft]))
        config = one_phase(data__extra=f"generated:{self.folder / 'shards'}", train__epochs=2)
        whole, stopped = self.whole_and_stopped(config)
        self.assertEqual(whole.step, 10)
        for name, array in whole.params.items():
            np.testing.assert_array_equal(array, stopped.params[name], name)

    def test_length_of_an_epoch(self):
        """256 digits and 160 generated images, 32 of each in a batch: 5 steps, or as one says."""
        for asked, rows in ((None, 320), (640, 640), (200, 200)):
            config = one_phase(data__extra=self.generated, data__epoch_images=asked)
            source = splits.opened(config, "train_split")
            self.assertEqual(splits.examples(config, "train", source), rows)

    @sweeps.rows(
        ({"extra": "npz:none.npz"}, "none.npz"),
        ({"extra": "digits", "extra_split": "nowhere"}, "nowhere"),
        ({"extra_share": 1.5}, "data.extra_share=1.5 must be between 0 and 1"),
        (
            {"epoch_images": 256},
            "epoch_images=256 is only valid with a second image source; leave it out",
        ),
        (
            {"epoch_images": 63, "extra": "digits", "extra_split": "train"},
            "epoch_images=63 is less than train.batch_size=64; an epoch needs at least one step",
        ),
        ({"views": 3}, "data.views=3 does not divide the 64 rows of data.name in a batch"),
        ({"views": 2, "first_view": "flop"}, "unknown augmentation 'flop'"),
    )
    def test_refuses(self, changes, message):
        config = one_phase(**{f"data__{key}": value for key, value in changes.items()})
        with self.assertRaisesRegex(ValueError, message):
            quiet_run(config, self.folder / "run")
        self.assertFalse((self.folder / "run").exists())

    @sweeps.fast(0, 4)
    @parameterized.parameters(
        ({"classes": 11}, r"generated.npz.* has 11 classes, but .* has 10; give .* the same"),
        ({"classes": 7}, r"generated.npz.* has 7 classes, but .*'digits'.* has 10; give"),
        ({"shape": (8, 8, 3)}, "has 3 channels, but .* has 1; give .* the same classes"),
        ({"shape": (9, 9)}, "has 9x9 images"),
        ({"number": 30}, "a batch of 64 needs 32 images of .* which has 30; use a smaller"),
    )
    def test_refuses_a_source_that_does_not_fit(self, changes, message):
        self.write("generated.npz", **changes)
        with self.assertRaisesRegex(ValueError, message):
            quiet_run(one_phase(data__extra=self.generated), self.folder / "run")
        self.assertFalse((self.folder / "run").exists())
