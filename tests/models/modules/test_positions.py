import itertools

import numpy as np
from absl.testing import parameterized

from jaxrobust.models.modules.positions import resized
from tests.support import parity, paths, sweeps

STORED = np.load(parity.MODELS / "pos_embed_interp.npz")


class ResizedTest(parameterized.TestCase):
    @sweeps.rows(192, 256, 288, 320, 384)
    def test_golden(self, side):
        theirs = STORED[f"to_{side}"]
        ours = resized(STORED["pos_embed"], theirs.shape)
        self.assertEqual(ours.dtype, np.float32)
        np.testing.assert_array_equal(ours[:, 0], STORED["pos_embed"][:, 0])
        # Theirs computed the points between patches in float32: 24 * 6e-8 of a patch, where
        # neighbors differ by about the largest entry. It is as far from its own float64.
        self.assertLess(parity.relative(ours, theirs), 3e-6)

    @sweeps.rows(*itertools.product((192, 256, 448), (0, 1), (7, 14)))
    def test_is_torchs_in_float64(self, side, classes, old):
        try:
            import torch
        except ImportError:
            self.skipTest(paths.PARITY)
        new = side // 16
        embedding = np.random.default_rng(side).normal(size=(1, old * old + classes, 3))
        grid = torch.tensor(embedding[:, classes:].reshape(1, old, old, 3).transpose(0, 3, 1, 2))
        theirs = torch.nn.functional.interpolate(
            grid, scale_factor=((new + 0.1) / old,) * 2, mode="bicubic", align_corners=False
        )
        ours = resized(embedding, (1, new * new + classes, 3))
        np.testing.assert_array_equal(ours[:, :classes], embedding[:, :classes])
        theirs = theirs.numpy().transpose(0, 2, 3, 1).reshape(1, -1, 3)
        self.assertLess(parity.relative(ours[:, classes:], theirs), 1e-13)

    def test_without_class_row_is_the_grid_of_the_one_with(self):
        embedding = STORED["pos_embed"]
        grid, both = resized(embedding[:, 1:], (1, 324, 4)), resized(embedding, (1, 325, 4))
        np.testing.assert_array_equal(grid, both[:, 1:])

    @sweeps.rows(
        ((1, 197, 8), (1, 325, 4)),  # another width
        ((1, 196, 4), (1, 325, 4)),  # the class row is missing
        ((1, 197, 4), (1, 324, 4)),  # one too many
        ((1, 198, 4), (1, 325, 4)),  # class and distillation token
        ((1, 197, 4), (1, 200, 4)),  # no square
        ((197, 4), (1, 325, 4)),
        ((1, 197, 4), (325, 4)),
    )
    def test_what_is_no_embedding_stays(self, have, wanted):
        array = np.ones(have, np.float32)
        self.assertIs(resized(array, wanted), array)
