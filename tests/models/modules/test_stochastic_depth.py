"""The keys of stochastic depth and of dropout: no two places of a block draw alike."""

import itertools

import jax
import numpy as np
from absl.testing import absltest, parameterized

from jaxrobust.models.modules.draws import Drop, branches, dropouts


class KeysTest(parameterized.TestCase):
    @parameterized.parameters(False, True)
    def test_all_places_draw_apart(self, of_images):
        key = jax.random.key(0)
        drop = Drop(jax.random.split(key, 3) if of_images else key, 0.5)
        places = [*branches(drop, 2), *dropouts(drop, 3, 0.1, paths=2)]
        keys = [np.asarray(jax.random.key_data(place.keywords["key"])) for place in places]
        for one, other in itertools.combinations(keys, 2):
            self.assertTrue((one != other).any(-1).all())
        self.assertEqual([place.keywords["rate"] for place in places], [0.5, 0.5, 0.1, 0.1, 0.1])

    def test_nothing_is_drawn_in_evaluation_or_at_rate_zero(self):
        drop = Drop(jax.random.key(0), 0.5)
        x = np.ones((2, 3), np.float32)
        for place in (*branches(None, 2), *dropouts(None, 1, 0.1, paths=2)):
            self.assertIs(place(x), x)
        self.assertIs(dropouts(drop, 1, 0, paths=2)[0](x), x)


if __name__ == "__main__":
    absltest.main()
