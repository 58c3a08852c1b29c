"""Flags do not depend on masks, offsets and scales of logits, and find faults behind them."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized

from jaxrobust.evaluation.bundles import claims
from jaxrobust.evaluation.network import fingerprint, reliability, tracing
from jaxrobust.pytorch import agreement
from jaxrobust.runtime.devices import sharding
from jaxrobust.types import unmasked
from tests.support import sweeps

WEIGHTS = np.random.default_rng(0).standard_normal((16, 10)).astype(np.float32)
IMAGES = np.random.default_rng(1).random((128, 4, 4, 1), np.float32)


def healthy(x):
    """Compute logits f32[B,10] between -8 and 8."""
    return 2 * (x.reshape(len(x), -1) - 0.5) @ WEIGHTS


LABELS = np.asarray(healthy(IMAGES)).argmax(1)


def compiled(logits_fn):
    """Compile a network as the engine does: for batches of 16."""
    program = jax.jit(logits_fn)

    def forward(images):
        padded = np.pad(images, ((0, -len(images) % 16), *[(0, 0)] * 3))
        parts = [np.asarray(program(part)) for part in np.split(padded, len(padded) // 16)]
        return np.concatenate(parts)[: len(images)]

    return forward


def flags_of(logits_fn, images=IMAGES, labels=LABELS):
    return reliability.check_network(compiled(logits_fn), logits_fn, images, labels)


LOWEST = float(np.finfo(np.float32).min)
MASKS = (-1e9, -1e4, -1e30, LOWEST)


def masked(value, times=2):
    """Append masked classes, as of a data set that has a part of the network's classes."""
    return lambda z: jnp.pad(z, ((0, 0), (0, times)), constant_values=value)


def added(value):
    """Mask classes as `logits + mask` does, which leaves a rest of the logits."""
    return lambda z: jnp.concatenate([z, z[:, :3] + value], axis=1)


CHANGES = {
    "as it is": lambda z: z,
    **{f"masked {value:.0e}": masked(value) for value in MASKS},
    **{f"added {value:.0e}": added(value) for value in MASKS},
    "mostly masked": masked(-1e9, 90),
    "two masks": lambda z: masked(LOWEST)(masked(-1e9, 30)(z)),
    "one masked twice as low": lambda z: masked(-2e9, 1)(masked(-1e9, 1)(z)),
    "offset 1e4": lambda z: z + 1e4,
    "offset 1e6": lambda z: z + 1e6,
    "offset -1e6": lambda z: z - 1e6,
    "small and offset": lambda z: 0.05 * z + 1e6,
    "scaled 1e-6": lambda z: 1e-6 * z,
    "scaled 1e6": lambda z: 1e6 * z,
    "scaled 1e-6, masked": lambda z: masked(-1e9)(1e-6 * z),
    "masked, scaled 1e-6": lambda z: 1e-6 * masked(-1e9)(z),
    "constant class -30": masked(-30.0, 1),
    "constant class -1e6": masked(-1e6, 1),
    "log-softmax, masked": lambda z: masked(-1e9)(jax.nn.log_softmax(z)),
}
CORNERS = ("as it is", "masked -1e+09", f"added {LOWEST:.0e}", "two masks", "offset -1e6")
CORNERS += ("scaled 1e-6, masked", "masked, scaled 1e-6", "scaled 1e6")


def blind(x):
    """Compute logits that know nothing of images."""
    return healthy(jnp.zeros_like(x))


def noisy(x):
    """Compute such logits with rounding of float32, which differs between images."""
    z = jnp.arange(10.0)[None] * jnp.ones((len(x), 1))
    moves = jnp.sin(1e3 * healthy(x)[:, :1])
    return z * (1 + 1e-7 * moves) + 1e-9 * moves


def in_train_mode(x):
    """Normalize a batch by its own statistics."""
    z = healthy(x)
    return z - z.mean(axis=0, keepdims=True)


class ScalesTest(parameterized.TestCase):
    @sweeps.rows(*CHANGES)
    def test_healthy_networks(self, change):
        """`constant-logits` fired on every masked network: its scale was that of the mask."""
        self.assertEmpty(flags_of(lambda x: CHANGES[change](healthy(x))))

    @sweeps.rows(1e6, 1e9, 1e30)
    def test_a_large_constant_class(self, value):
        """It wins everywhere, but the others still see their images."""
        flags = flags_of(lambda x: masked(value, 1)(healthy(x)))
        self.assertNotIn("constant-logits", flags)

    @sweeps.rows(1e-6, 1.0, 1e6)
    def test_two_classes_of_which_one_is_constant(self, scale):
        labels = (np.asarray(healthy(IMAGES))[:, 0] > 0).astype(int)
        flags = flags_of(
            lambda x: jnp.pad(scale * healthy(x)[:, :1], ((0, 0), (1, 0))), IMAGES, labels
        )
        self.assertEmpty(flags)

    @sweeps.rows(*((blind, change) for change in CHANGES), *((noisy, change) for change in CORNERS))
    def test_blind_networks(self, network, change):
        flags = flags_of(lambda x: CHANGES[change](network(x)))
        self.assertIn("all 64 images have the same logits", flags["constant-logits"])

    @sweeps.rows(*CORNERS)
    def test_networks_in_train_mode(self, change):
        """Behind a mask of -1e9 logits could move by a million."""
        flags = flags_of(lambda x: CHANGES[change](in_train_mode(x)))
        self.assertIn("batch-dependent", flags)

    @sweeps.rows(*CORNERS)
    def test_random_networks(self, change):
        """Behind a mask only answers that changed showed; here none does."""
        network, rng = compiled(lambda x: CHANGES[change](healthy(x))), np.random.default_rng(0)
        noise = rng.random((64, 1)) * np.arange(10) / 10
        images, labels = IMAGES[:64], LABELS[:64]
        scale = {"scaled 1e-6": 1e-6, "scaled 1e6": 1e6}
        size = next((scale[name] for name in scale if name in change), 1.0)

        def forward(images):
            logits = np.array(network(images), np.float64)
            own = np.arange(len(logits)), logits.argmax(axis=1)
            logits[own] += size * (1 + noise[: len(logits), 0] + rng.random(len(logits)))
            return logits

        passes = [forward(images) for _ in range(3)]
        self.assertIn("randomized", reliability._randomized(passes, labels))
        self.assertEmpty(reliability._randomized([passes[0]] * 3, labels))

    @sweeps.rows(*MASKS)
    def test_masked_probabilities(self, value):
        flags = flags_of(lambda x: masked(value)(jax.nn.softmax(healthy(x))))
        self.assertIn("softmax", flags)

    @sweeps.rows(*MASKS)
    def test_masked_logits_behind_a_relu(self, value):
        flags = flags_of(lambda x: masked(value)(jax.nn.relu(healthy(x) - 1)))
        self.assertIn("before any ReLU", flags["constant-logits"])

    def test_guesses_among_the_classes_that_are_left(self):
        """A third is chance among three classes, of however many that are masked."""
        few = LABELS < 3
        guess = lambda x: masked(-1e9, 97)(jnp.sin(99 * healthy(x)[:, 3:6]))  # noqa: E731
        self.assertIn("among 3 classes", flags_of(guess, IMAGES[few], LABELS[few])["low-accuracy"])

    @sweeps.rows(*MASKS)
    def test_margins_of_bundles(self, value):
        """Every image was at the boundary, whose width is a share of the logits' spread."""
        logits = np.random.default_rng(0).standard_normal((20, 10)).astype(np.float32)
        labels = np.arange(20) % 10
        wide = np.pad(logits, ((0, 0), (0, 3)), constant_values=value)
        expected = claims.margin(logits, labels)
        np.testing.assert_allclose(claims.margin(wide, labels), expected)
        np.testing.assert_array_equal(claims._unmasked(wide), unmasked(wide))

    @sweeps.rows(*MASKS)
    def test_fingerprints_of_other_versions(self, value):
        """Beside a masked class no difference of the others counted."""
        facts = []
        for sign in (1, -1):
            network = jax.tree_util.Partial(lambda s, x: masked(value)(s * healthy(x)), sign)
            taken = tracing.argument("", network, sharding.make_mesh())
            own = fingerprint.of_network(taken, IMAGES, batch=8)
            facts.append(fingerprint.resolved(own._asdict()) | {"arrays": "", "gradient": ""})
        self.assertEqual(fingerprint.difference(facts[0], facts[0]), "")
        self.assertIn("its logits", fingerprint.difference(*facts))

    @sweeps.rows(*MASKS)
    def test_agreement_of_masked_modules(self, value):
        """Any two networks agreed to a share of -1e9."""
        logits = np.random.default_rng(0).standard_normal((2, 10))
        wide, other = (
            np.pad(z, ((0, 0), (0, 3)), constant_values=value) for z in (logits, -logits)
        )
        gradient = np.ones((2, 4))
        self.assertGreater(agreement._apart((other, gradient), (wide, gradient))[0], 1)
