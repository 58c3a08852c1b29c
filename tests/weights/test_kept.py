"""Weights that a run kept next to its best ones."""

import json
from pathlib import Path
from unittest import mock

import jax
import numpy as np
from absl.testing import absltest

from jaxrobust.config import VERSION, network_of
from jaxrobust.types import Weights
from jaxrobust.weights.store import hashes
from jaxrobust.weights.trained import kept
from tests.support import runs


class KeptTest(absltest.TestCase):
    def setUp(self):
        super().setUp()
        config = runs.tiny()
        self.workdir = Path(self.create_tempdir())
        own = {"version": VERSION} | json.loads(config.to_json())
        (self.workdir / "config.json").write_text(json.dumps(own))
        params, stats = jax.jit(network_of(config).init)(jax.random.key(0))
        moved = {name: array + 1 for name, array in params.items()}
        self.both = kept.Kept(params, stats, moved, stats)
        kept.keep(self.workdir, "train", 6, self.both, steps_per_epoch=4)

    def test_both_weights_and_the_epoch_that_ended(self):
        self.assertEqual(kept.steps_of(self.workdir, "train"), [6])
        epoch, both = kept.read(self.workdir, "train", 6)
        self.assertEqual(epoch, 1.5)
        for which in kept.WHICH:
            for part, expected in zip(both.of(which), self.both.of(which), strict=True):
                self.assertEqual(part.keys(), expected.keys())
                for name in part:
                    np.testing.assert_array_equal(part[name], expected[name])

    def test_what_is_not_kept_is_named(self):
        with self.assertRaisesRegex(ValueError, r"train/\w+ has no step 4 \(any more\)"):
            kept.read(self.workdir, "train", 4)


class SelectionTest(absltest.TestCase):
    """The file of the choice, and the weights that it names."""

    def setUp(self):
        super().setUp()
        self.workdir = Path(self.create_tempdir())
        own = {"version": VERSION} | json.loads(runs.tiny().to_json())
        (self.workdir / "config.json").write_text(json.dumps(own))
        self.chosen = {"phase": "train", "step": 6, "epoch": 1.5, "weights": "ema"}
        self.chosen |= {"image_size": 8, "weights_sha256": "0" * 64}

    def write(self, **changes):
        whole = {"schema": 1, "chosen": self.chosen, "candidates": [], "dataset": "digits"}
        whole |= {"split": "train[256:]", "attack": {"name": "apgd-ce"}}
        (self.workdir / kept.SELECTION).write_text(json.dumps(whole | changes))

    def test_the_choice(self):
        self.write(chosen=self.chosen | {"more": 1})
        found = kept.selected(self.workdir)
        self.assertEqual(found._asdict(), self.chosen)
        self.assertEqual(found.words, "train, epoch 1.5, ema")
        self.assertEqual(found._replace(epoch=30.0).words, "train, epoch 30, ema")
        on = {"dataset": "digits", "split": "train[256:]", "attack": "apgd-ce"}
        self.assertEqual(kept.chosen_on(self.workdir), on)
        self.write(attack="all", split=None)
        on = {"dataset": "digits", "split": None, "attack": None}
        self.assertEqual(kept.chosen_on(self.workdir), on)

    def test_what_is_no_run_is_no_place_to_choose_in(self):
        self.write()
        (self.workdir / "config.json").unlink()
        with self.assertRaisesRegex(ValueError, "is not a run: config.json is missing"):
            kept.selected(self.workdir)

    def test_refusals(self):
        with self.assertRaisesRegex(ValueError, "no weights are selected in .*jaxrobust select"):
            kept.selected(self.workdir)
        for changes, message in (
            ({"chosen": None}, "selection.json is not finished; to continue"),
            ({"schema": 2}, "selection.json has schema 2, but this code reads 1"),
            ({"schema": 0}, "selection.json has schema 0, but this code reads 1"),
            ({"chosen": {"phase": "train"}}, "selection.json is damaged .*step"),
        ):
            self.write(**changes)
            with self.assertRaisesRegex(ValueError, message):
                kept.selected(self.workdir)
        (self.workdir / kept.SELECTION).write_text('{"schema": 1, "chosen": null}')
        with self.assertRaisesRegex(ValueError, "damaged .*candidates.*remove it and select again"):
            kept.selected(self.workdir)

    def test_the_weights_are_those_that_were_chosen(self):
        raw, ema = Weights({"w": np.ones(2)}, {}), Weights({"w": np.zeros(2)}, {})
        both = kept.Kept(*raw, *ema)
        sized = []

        def at_size(workdir, phase, weights, size):
            sized.append(size)
            return weights

        with (
            mock.patch.object(kept, "read", lambda workdir, phase, step: (1.5, both)),
            mock.patch.object(kept, "at_size", at_size),
        ):
            for which, weights in (("raw", raw), ("ema", ema)):
                sha256 = hashes.weights_sha256(*weights)
                self.chosen |= {"weights": which, "weights_sha256": sha256}
                chosen = kept.ChosenWeights(**self.chosen)
                words, found = kept.selected_weights(self.workdir, chosen)
                self.assertEqual(words, f"train, epoch 1.5, {which}")
                np.testing.assert_array_equal(found.params["w"], weights.params["w"])
            kept.selected_weights(self.workdir, chosen, image_size=8)
            kept.selected_weights(self.workdir, chosen, image_size=16)
            self.assertEqual(sized, [8, 8, 8, 8, 16])  # hashed as chosen, then of the other size
            with self.assertRaisesRegex(
                ValueError, "of train, epoch 1.5, raw are not the s.*sha256"
            ):
                kept.selected_weights(self.workdir, chosen._replace(weights="raw"))
