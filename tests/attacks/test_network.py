"""Networks and images that an attack alone cannot take: one sentence says what to do."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized
from flax import linen, nnx

from jaxrobust import attacks
from jaxrobust.attacks import refused_network
from tests.support import sweeps

Partial = jax.tree_util.Partial
IMAGES = np.random.default_rng(0).random((4, 4, 4, 1), np.float32)
LABELS = np.arange(4)
ATTACKS = {
    "pgd": attacks.pgd(norm="linf", epsilon=0.1, steps=1),
    "apgd": attacks.apgd(norm="linf", epsilon=0.1, steps=1),
    "fab": attacks.fab(norm="linf", epsilon=0.1, steps=1),
    "square": attacks.square(norm="linf", epsilon=0.1, queries=1),
}


class Linen(linen.Module):
    @linen.compact
    def __call__(self, x, train):
        x = linen.BatchNorm(use_running_average=not train)(x.reshape(x.shape[0], -1))
        return linen.Dense(10)(x if train else 2 * x)


class NNX(nnx.Module):
    def __init__(self):
        self.norm = nnx.BatchNorm(16, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.norm(x.reshape(x.shape[0], -1))


NET = Linen()
VARIABLES = NET.init(jax.random.key(0), IMAGES, False)
WEIGHTS = np.random.default_rng(1).standard_normal((16, 10)).astype(np.float32)


class NetworkTest(parameterized.TestCase):
    def run_it(self, name, logits_fn, images=IMAGES, *, jitted=False):
        attack = jax.jit(ATTACKS[name]) if jitted else ATTACKS[name]
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return attack(logits_fn, jax.random.key(0), images, jnp.asarray(LABELS))

    @sweeps.fast("fab")
    @parameterized.parameters(*ATTACKS)
    def test_keywords_of_a_partial(self, name):
        plain = self.run_it(name, lambda x: NET.apply(VARIABLES, x, False))
        found = self.run_it(name, Partial(NET.apply, VARIABLES, train=False))
        np.testing.assert_array_equal(found, plain)
        asks = "Python values; under your own jax.jit, bind them in the function: Partial"
        with self.assertRaisesRegex(
            ValueError, f"logits_fn uses the value .*train=False as {asks}"
        ):
            self.run_it(name, Partial(NET.apply, VARIABLES, train=False), jitted=True)
        said = Partial(lambda v, x: NET.apply(v, x, train=False), VARIABLES)  # as it says
        np.testing.assert_allclose(self.run_it(name, said, jitted=True), plain, atol=1e-6)

    @sweeps.fast("pgd")
    @parameterized.parameters(*ATTACKS)
    def test_one_image(self, name):
        message = "logits_fn takes a single image, not a batch; wrap it in jax.vmap"
        for one in (lambda x: x.reshape(16) @ WEIGHTS, lambda x: x.mean() * WEIGHTS[0]):
            with self.assertRaisesRegex(ValueError, message):
                self.run_it(name, one)
            self.assertEqual(self.run_it(name, jax.vmap(one)).shape, IMAGES.shape)

    @sweeps.rows(*ATTACKS)
    def test_training_mode(self, name):
        with self.assertRaisesRegex(
            ValueError, "changes its state .*evaluation mode, .* model.eval"
        ):
            self.run_it(name, NNX())

    @sweeps.rows(
        (RuntimeError("Dropout requires a key when running in non-deterministic mode."), True),
        (ValueError("You must pass a non-None PRNGKey to init and/or apply."), True),
        (type("InvalidRngError", (Exception,), {})("Dropout needs PRNG for dropout"), True),
        (type("ModifyScopeVariableError", (Exception,), {})("Cannot update mean"), True),
        (RuntimeError("a key is missing"), False),
    )
    def test_each_librarys_error_of_training_mode(self, error, known):
        """By the first line of their texts, and Flax's by the names of their types."""
        said = refused_network.remedy(error)
        self.assertEqual("put it into evaluation mode" in said, known, said)
        self.assertEqual(str(error).rstrip(".") in said, known, said)

    def test_an_iterator(self):
        """In a process of its own: what tests check of the types would refuse it first."""
        code = (
            "from jaxrobust import attacks\n"
            "for made in attacks.pgd(**HOW, steps=1), attacks.fab(**HOW), attacks.square(**HOW):\n"
            "    try:\n"
            "        made(lambda x: x[:, 0, 0], None, iter([[[[0.5]]]]), [0])\n"
            "    except ValueError as error:\n"
            "        print(error)\n"
        ).replace("HOW", "{'norm': 'linf', 'epsilon': 0.1}")
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        sentence = "images are of type list_iterator, not an array of numbers; pass one array, for"
        self.assertEqual(done.stdout.count(sentence), 3, done.stderr)

    def test_other_errors_are_the_networks(self):
        with self.assertRaises(ZeroDivisionError):
            self.run_it("pgd", lambda x: 1 / 0)
