"""What stored weights say of their network, and who has the last word."""

from types import SimpleNamespace
from unittest import mock

import numpy as np
from absl.testing import parameterized

from jaxrobust.models.published import IMAGENET_MEAN, IMAGENET_STD, PUBLISHED
from jaxrobust.weights.naming import networks
from jaxrobust.weights.naming.networks import Request
from jaxrobust.weights.store.artifact import WeightFacts
from tests.support import sweeps

IMAGENET, NONE, HALF = (IMAGENET_MEAN, IMAGENET_STD), ((0.0,), (1.0,)), ((0.5,), (0.5,))
HUB = {"mean": [0.5], "std": [0.25]}
INSIDE = next(name for name, row in PUBLISHED.items() if row.normalised)
BARE = next(name for name, row in PUBLISHED.items() if not row.normalised)


def stored(normalize=(0.0, 1.0), **arrays) -> SimpleNamespace:
    return SimpleNamespace(arrays=arrays, normalize=normalize)


class NormalisationTest(parameterized.TestCase):
    @sweeps.rows(
        ({}, {}, None, "none is stored: raw"),
        ({}, {"normalize": "imagenet"}, IMAGENET, "--normalize"),
        ({}, {"normalize": "none"}, NONE, "--normalize"),
        ({"published": BARE}, {}, NONE, f"RobustBench's {BARE}"),
        ({"published": BARE}, {"normalize": "half"}, HALF, "--normalize"),
        ({"settings": HUB}, {}, ((0.5,), (0.25,)), "the hub's config.json"),
        ({"settings": HUB, "published": BARE}, {}, NONE, f"RobustBench's {BARE}"),
        ({"settings": HUB}, {"raw": True}, None, "none is stored: raw"),
        ({"settings": HUB}, {"init_stem": True}, None, "none is stored: raw"),
        ({"settings": {"mean": [0.5]}}, {}, None, "none is stored: raw"),
    )
    def test_of_arrays_without_one(self, facts, request, values, said):
        found = networks.normalisation(stored(), WeightFacts(**facts), Request(**request))
        self.assertEqual(found[0], values)
        self.assertStartsWith(found[1], said)

    def test_of_a_published_network(self):
        board = PUBLISHED[INSIDE].board
        facts = WeightFacts(published=INSIDE)
        found, _ = networks.normalisation(stored(), facts, Request())
        self.assertEqual(found, (board.mean, board.std))

    def test_what_is_stored_stays(self):
        own = stored(**{"normalize.std": np.ones(3)})
        facts = WeightFacts(published=INSIDE, settings=HUB)
        found = networks.normalisation(own, facts, Request())
        self.assertEqual(found, (None, "stored with the weights"))
        with self.assertRaisesRegex(ValueError, "holds its own mean and std; leave --normalize"):
            networks.normalisation(own, facts, Request(normalize="none"))

    def test_what_files_with_such_names_assume(self):
        _, said = networks.normalisation(stored((0.5, 0.5)), WeightFacts(), Request())
        self.assertEqual(said, "the convention for files with these names")


class SizesTest(parameterized.TestCase):
    def sizes(self, width=None, mean=None, channels=None, facts=None, **request):
        own = stored(**({} if mean is None else {"normalize.mean": np.zeros(mean)}))
        with mock.patch.object(networks.convert, "in_channels", return_value=channels):
            return networks._sizes(own, width, WeightFacts(**(facts or {})), Request(**request))

    @sweeps.rows(
        ({}, (1000, 224, 3)),
        ({"width": 1000}, (1000, 224, 3)),
        ({"facts": {"num_classes": 10, "image_size": 32}, "width": 10}, (10, 32, 3)),
        ({"width": 10, "keep_head": True}, (10, 224, 3)),
        ({"width": 10, "num_classes": 7}, (7, 224, 3)),
        ({"facts": {"image_size": 32}, "image_size": 64}, (1000, 64, 3)),
        ({"facts": {"num_classes": 10}, "width": 10, "num_classes": 7}, (7, 224, 3)),
        ({"channels": 1}, (1000, 224, 1)),
        ({"channels": 3, "mean": 1}, (1000, 224, 3)),  # a mean for all channels
        ({"mean": 1}, (1000, 224, 1)),
        ({"channels": 1, "init_stem": True}, (1000, 224, 3)),
    )
    def test_the_request_then_the_facts_then_the_usual(self, given, expected):
        self.assertEqual(self.sizes(**given), expected)

    def test_another_head_is_refused(self):
        with self.assertRaisesRegex(ValueError, "its head has 10 classes, not 1000; --num_classes"):
            self.sizes(width=10)
