"""How arrays of PyTorch are turned, and turned back."""

import numpy as np
from absl.testing import parameterized

from jaxrobust.models.interface import renaming
from tests.support import sweeps

SHAPES = {
    renaming.same: (3, 2),
    renaming.conv_oihw: (5, 2, 3, 4),
    renaming.linear_oi: (5, 2),
    renaming.pointwise_oi: (5, 2, 1, 1),
    renaming.pointwise1_oi: (5, 2, 1),
    renaming.channels: (1, 5, 1, 1),
}


class TransformTest(parameterized.TestCase):
    def test_all_transforms_are_tried(self):
        values = vars(renaming).values()
        self.assertCountEqual(SHAPES, [v for v in values if isinstance(v, renaming.Transform)])

    @sweeps.rows(*zip(SHAPES))
    def test_the_way_back_gives_what_was_there(self, transform):
        array = np.arange(np.prod(SHAPES[transform])).reshape(SHAPES[transform])
        turned = transform.to_ours(array)
        np.testing.assert_array_equal(transform.to_torch(turned), array)

    def test_inputs_stand_before_outputs(self):
        """PyTorch's out, in, rows, columns are ours of rows, columns, in, out."""
        kernel = np.arange(120).reshape(5, 2, 3, 4)
        self.assertEqual(renaming.conv_oihw.to_ours(kernel)[2, 1, 1, 4], kernel[4, 1, 2, 1])
        for turn in (renaming.linear_oi, renaming.pointwise_oi, renaming.pointwise1_oi):
            matrix = np.arange(10).reshape(SHAPES[turn])
            self.assertEqual(turn.to_ours(matrix)[1, 4], matrix[4, 1].item())
