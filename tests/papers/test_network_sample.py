"""The network and the images that an analysis looks at."""

from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
from absl.testing import absltest, parameterized

from jaxrobust import data
from jaxrobust.papers.networks import network_sample
from jaxrobust.papers.networks.network_sample import NetworkSample


class SeenTest(parameterized.TestCase):
    def seen(self, **flags) -> NetworkSample:
        """The sample of a function, which has no phases, and of digits."""
        file = Path(self.create_tempdir(), "own.py")
        file.write_text("def logits(x):\n    return x.reshape(len(x), -1)[:, :10]\n")
        named = {"function": f"{file}:logits", "dataset": "digits", "norm": "linf", "epsilon": 0.1}
        return network_sample.seen(named | flags)

    def test_a_function_and_some_images(self):
        sample = self.seen(n=3)
        self.assertRegex(sample.name, r"own\.py:logits$")  # and nothing behind it
        images, labels, ids, _ = data.load("digits", split="test", n=3, image_size=8)
        np.testing.assert_array_equal(sample.images, images)
        np.testing.assert_array_equal(sample.labels, labels)
        np.testing.assert_array_equal(sample.ids, ids)

    def test_0_is_all_images(self):
        self.assertLen(self.seen(n=0, split="test[:7]").images, 7)

    def test_no_number_of_images(self):
        for n in (-1, 100_001):
            with self.subTest(n=n), self.assertRaisesRegex(ValueError, f"--n={n} must be"):
                self.seen(n=n)

    def test_a_name_of_19_letters_is_cut_to_18(self):
        sample = self.seen(n=1)._replace(classes=("a" * 18, "b" * 19))
        self.assertEqual([sample.called(k) for k in range(3)], ["a" * 18, "b" * 17 + "…", "2"])


class EpochsTest(absltest.TestCase):
    """The weights that a run kept, by step."""

    def test_kept_ones_or_the_best_of_each_phase_with_the_same_network(self):
        folder, opened = Path("run"), []
        there = {
            folder / "pretrain" / "best": [4],
            folder / "train" / "epochs": [2, 5],
            folder / "train" / "best": [5],
            folder / "first" / "best": [9],
        }
        changes = {"first": {"model": "another"}, "pretrain": {}, "none": {}, "train": {}}
        config = mock.MagicMock(phases=[*changes])
        config.__getitem__.side_effect = lambda name: SimpleNamespace(changes=changes[name])
        net = SimpleNamespace(init=lambda key: ({"w": key}, {}), apply=None)
        subject = SimpleNamespace(create=mock.Mock(return_value=net), config=config)

        def files(place, **how):
            opened.append((place, how))
            return mock.Mock(restore=lambda step, abstract: ({"w": f"{place} {step}"}, abstract))

        with mock.patch.multiple(
            network_sample,
            Checkpoints=files,
            steps=lambda place: there.get(place, []),
            abstract_state=lambda shapes, place: shapes.params["w"].shape,
        ):
            found = network_sample.epochs(folder, subject, None)
            only = network_sample.epochs(folder, subject, "train")
            self.assertEqual(network_sample.epochs(folder, subject, "none"), [])
        names = [(4, "pretrain 4"), (6, "train 2"), (9, "train 5")]  # steps of all phases
        self.assertEqual([each[:2] for each in found], names)
        places = ["run/pretrain/best 4", "run/train/epochs 2", "run/train/epochs 5"]
        self.assertEqual([each[2].args for each in found], [({"w": p}, ()) for p in places])
        self.assertEqual([each[:2] for each in only], [(2, "train 2"), (5, "train 5")])
        read = {"read_only": True}  # a run may still be writing there
        both = [(folder / "pretrain" / "best", read), (folder / "train" / "epochs", read)]
        self.assertEqual(opened, [*both, both[1]])
        self.assertEqual({call.args for call in subject.create.call_args_list}, {("float32",)})
