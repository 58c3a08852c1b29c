"""Reliability checks: each defect in a network that has it, and silence for healthy networks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from jaxrobust.evaluation.network import checks, reliability
from jaxrobust.types import Threat
from tests.support import faults, paths, sweeps
from tests.support.faults import colours, healthy
from tests.support.golden import golden_nets, load


def normalise(x, mean=faults.MEAN, std=faults.STD):
    return (x - jnp.asarray(mean)[None, None, None]) / jnp.asarray(std)[None, None, None]


def compiled(logits_fn, batch=16):
    """What the engine does: one program for a fixed batch, padded, for any number of images."""
    program = jax.jit(logits_fn)

    def forward(images):
        assert isinstance(images, np.ndarray) and images.dtype == np.float32
        padded = np.pad(images, ((0, -len(images) % batch), (0, 0), (0, 0), (0, 0)))
        parts = [np.asarray(program(p)) for p in np.split(padded, len(padded) // batch)]
        return np.concatenate(parts)[: len(images)]

    return forward


def flags_of(logits_fn, data=None, *, batch=16):
    images, labels = data or colours()
    return reliability.check_network(compiled(logits_fn, batch), logits_fn, images, labels)


class SlopesTest(absltest.TestCase):
    def test_only_what_has_an_answer_lacks_a_gradient(self):
        """Below zero: not finite. An image without finite logits is another fault."""
        probe = {"logits": [[-1.0], [1.0], [1.0]], "gradients": [[-1.0], [2.0], [0.0]]}
        self.assertEmpty(reliability.check_slopes(probe))
        probe["gradients"][1] = [-1.0]
        (text,) = reliability.check_slopes(probe).values()
        self.assertIn("the input gradients of 1 of 3 noisy images", text)


class NetworkTest(parameterized.TestCase):
    def check_only(self, flags, name, *words):
        self.assertEqual(list(flags), [name], flags)
        for word in words:
            self.assertIn(word, flags[name])

    @sweeps.rows(1, 7, 16, 128)
    def test_healthy(self, batch):
        self.assertEmpty(flags_of(healthy, batch=batch))

    @sweeps.rows(0, 1, 2, 31, 32, 65)
    def test_few_images(self, count):
        self.assertEmpty(flags_of(healthy, colours(count)))

    def test_equal_images_may_have_equal_logits(self):
        images, labels = colours(1)
        self.assertEmpty(flags_of(healthy, (images.repeat(3, axis=0), labels.repeat(3))))

    @parameterized.parameters("conv", "lin")
    def test_healthy_golden_networks(self, name):
        path = paths.SHARED / "golden/data.npz"
        if not path.exists():
            self.skipTest(paths.NO_SHARED)
        data = load(path)
        images = data["images_u8"].astype(np.float32) / np.float32(255)
        self.assertEmpty(flags_of(golden_nets()[name], (images, data["labels"])))

    def test_a_function_of_one_batch_size(self):
        def logits_fn(x):
            return healthy(x.reshape(16, 4, 4, 3))

        images, labels = colours()
        flags = reliability.check_network(
            compiled(logits_fn), logits_fn, images, labels, batch_size=16
        )
        self.assertEmpty(flags)

    # --- randomness ---

    @sweeps.rows(1e-2, 3.0)
    def test_random_noise(self, size):
        rng = np.random.default_rng(0)

        def noise(h):
            return (size * rng.normal(size=h.shape)).astype(np.float32)

        def logits_fn(x):
            z = healthy(x)
            return z + jax.pure_callback(noise, jax.ShapeDtypeStruct(z.shape, z.dtype), z)

        flags = flags_of(logits_fn)
        self.check_only(
            flags, "randomized", "5 passes over the same 64 images", "use version='rand'"
        )

    def test_a_difference_of_what_is_no_number(self):
        inf, nan = np.inf, np.nan
        a = np.array([1.5, nan, nan, inf, inf, -inf, 1.0, inf, -inf])
        b = np.array([1.0, nan, 1.0, inf, -inf, inf, inf, 1.0, 1.0])
        found = reliability._difference(a, b)
        self.assertEqual(found.tolist(), [0.5, 0, inf, 0, inf, -inf, -inf, inf, -inf])

    def test_noise_of_rounding_is_not_random(self):
        rng = np.random.default_rng(0)
        forward = compiled(healthy)
        images, labels = colours()
        shaky = lambda x: (z := forward(x)) + 1e-6 * rng.normal(size=z.shape)  # noqa: E731
        self.assertEmpty(reliability.check_network(shaky, healthy, images, labels))

    def retraced(self, logits_fn):
        self.check_only(
            flags_of(logits_fn), "retraced", "tracing logits_fn twice", "not draw NumPy or Python"
        )

    def test_numpy_noise_in_an_array(self):
        rng = np.random.default_rng(0)
        self.retraced(lambda x: healthy(x) + rng.normal(0, 0.1, (1, 10)).astype(np.float32))

    def test_numpy_dropout_in_a_jitted_function(self):
        """Its second trace would come from the cache, and its constants are inside."""
        rng = np.random.default_rng(0)

        @jax.jit
        def logits_fn(x):
            return healthy(x) * (1 + 0.5 * rng.integers(0, 2, (1, 10))).astype(np.float32)

        self.retraced(logits_fn)
        self.retraced(lambda x: logits_fn(x) + 1)  # other than its argument: found again

    def test_numpy_noise_in_a_loop(self):
        rng = np.random.default_rng(0)

        def logits_fn(x):
            noise = lambda i, z: z + rng.normal(0, 0.1, (1, 10)).astype(np.float32)  # noqa: E731
            return jax.lax.fori_loop(0, 3, noise, healthy(x))

        self.retraced(logits_fn)

    @sweeps.rows(lambda f: f, jax.jit, jax.vmap)
    def test_running_statistics_that_leak(self, transformed):
        """A tracer of the first trace is a constant of the second, or makes it fail (vmap)."""
        state = {"mean": jnp.zeros(3)}

        def logits_fn(x):
            def centre(h):
                state["mean"] = 0.9 * state["mean"] + 0.1 * h.reshape(-1, 3).mean(0)
                return h + 0 * h.sum() * state["mean"].sum()

            return faults.inner(transformed(centre)(normalise(x)))

        images, labels = colours()
        flags = reliability.check_network(compiled(healthy), logits_fn, images, labels)
        self.check_only(flags, "retraced", "tracing logits_fn twice", "or change state")

    # --- train mode ---

    @sweeps.rows(7, 16, 64, 128)
    def test_batch_norm_in_train_mode(self, batch):
        """Also where all images fit into one batch, whose order does not matter."""
        flags = flags_of(faults.train_mode, batch=batch)
        self.assertIn("batch-dependent", flags)
        self.assertIn("train=False", flags["batch-dependent"])
        self.assertNotIn("randomized", flags)

    @sweeps.rows((0.03, True), (1e-4, False))
    def test_a_little_of_the_others_is_told_from_rounding(self, share, told):
        def logits_fn(x):
            z = healthy(x)
            return z + share * z.mean(0, keepdims=True)

        self.assertEqual("batch-dependent" in flags_of(logits_fn), told)

    def test_dropout_by_position(self):
        def logits_fn(x):
            z = healthy(x)
            return jnp.where(jax.random.bernoulli(jax.random.key(0), 0.9, z.shape), z, 0)

        self.check_only(flags_of(logits_fn), "batch-dependent", "logits span", "train=False")

    def test_nan_is_no_movement(self):
        images, labels = colours()
        logits_fn = lambda x: healthy(x).at[:, 9].set(jnp.nan)  # noqa: E731
        self.assertEqual(set(flags_of(logits_fn, (images, labels))), {"nan-logits", "low-accuracy"})

    # --- outputs ---

    def test_softmax(self):
        flags = flags_of(lambda x: jax.nn.softmax(healthy(x)))
        self.check_only(flags, "softmax", "return the logits before the softmax")

    def test_log_softmax_is_harmless(self):
        self.assertEmpty(flags_of(lambda x: jax.nn.log_softmax(healthy(x))))

    def test_masked_classes(self):
        """-inf switches a class off, but margins to it are infinite: no attack follows them."""
        flags = flags_of(lambda x: jnp.pad(healthy(x), ((0, 0), (0, 1)), constant_values=-jnp.inf))
        self.assertEqual(set(flags), {"nan-logits", "low-accuracy"})
        self.assertIn("64 of 64 images", flags["nan-logits"])
        self.assertIn("-1e9, not -inf", flags["nan-logits"])

    def test_constant_network(self):
        flags = flags_of(lambda x: healthy(jnp.zeros_like(x)))
        self.assertEqual(set(flags), {"constant-logits", "low-accuracy"})
        self.assertIn("all 64 images have the same logits", flags["constant-logits"])
        self.assertIn("check that the weights are loaded", flags["constant-logits"])

    def test_logits_behind_a_relu(self):
        images, labels = colours(64)
        flat = int((np.asarray(healthy(images)) <= 1).all(axis=1).sum())
        self.assertBetween(flat, 1, 30)
        flags = flags_of(lambda x: jax.nn.relu(healthy(x) - 1), (images, labels))
        self.assertIn(f"equal for {flat} of 64 images", flags["constant-logits"])
        self.assertIn("before any ReLU", flags["constant-logits"])

    # --- accuracy ---

    def test_other_order_of_classes(self):
        images, labels = colours()
        flags = flags_of(healthy, (images, (labels + 1) % 10))
        self.check_only(flags, "low-accuracy", "0 of 64", "the order of the classes")

    def test_wrong_everywhere_but_few_images(self):
        images, labels = colours(31)
        flags = flags_of(healthy, (images, (labels + 1) % 10))
        self.check_only(
            flags, "low-accuracy", "0 of 31", "too few to tell this network from guessing"
        )

    def test_sorted_data(self):
        """A network that knows nine classes of ten, on data that starts with the tenth."""
        logits_fn = lambda x: healthy(x) - 1e3 * np.eye(10, dtype=np.float32)[:1]  # noqa: E731
        images, labels = colours(2000)
        order = np.argsort(labels, kind="stable")
        images, labels = images[order], labels[order]
        self.assertTrue((labels[:64] == 0).all())
        self.assertEmpty(flags_of(logits_fn, (images, labels)))

    @sweeps.rows(*reliability._NORMALISATIONS)
    def test_double_normalisation(self, name):
        constants = reliability._NORMALISATIONS[name]
        flags = flags_of(lambda x: healthy(normalise(x, *constants)))
        self.assertIn("normalization is undone", flags.pop("double-normalization"))
        self.assertLessEqual(flags.keys(), {"low-accuracy"})

    @pytest.mark.slow
    def test_double_normalisation_of_a_trained_network(self):
        """The golden network of CIFAR-10, on the images that it gets right."""
        path = paths.SHARED / "golden/data.npz"
        if not path.exists():
            self.skipTest(paths.NO_SHARED)
        data = load(path)
        conv = golden_nets()["conv"]
        images = data["images_u8"].astype(np.float32) / np.float32(255)
        right = np.asarray(conv(images)).argmax(1) == data["labels"]
        known = images[right], data["labels"][right]
        self.assertEmpty(flags_of(conv, known))
        flags = flags_of(lambda x: conv(normalise(x)), known)
        self.check_only(flags, "double-normalization", "ImageNet", "remove one of the two")

    def test_guessing_is_not_called_double_normalisation(self):
        """It guesses one class on bright images, another, as rare, on pale ones."""

        def logits_fn(x):
            bright = (jnp.ptp(x, axis=(1, 2, 3)) > 0.3).astype(x.dtype)[:, None]
            eye = jnp.eye(10)
            return bright * eye[:1] + (1 - bright) * eye[1:2] + 0.01 * healthy(x) / 1e3

        images, _ = colours(64)
        labels = np.arange(64) % 8 + 1
        flags = flags_of(logits_fn, (images, labels))
        self.assertEqual(set(flags) - {"low-accuracy"}, set())

    def test_grey_images(self):
        images, labels = colours()
        grey = images.mean(axis=3, keepdims=True)
        flags = flags_of(lambda x: healthy(jnp.repeat(x, 3, axis=3)), (grey, labels))
        self.assertLessEqual(flags.keys(), {"low-accuracy"})


class ImagesTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.images, self.labels = colours(8)

    def test_accepted(self):
        checks.check_images(self.images, self.labels)
        checks.check_images(jnp.asarray(self.images), jnp.asarray(self.labels, jnp.int32))
        checks.check_images(jnp.asarray(self.images, jnp.bfloat16), self.labels, classes=10)
        checks.check_images(self.images.astype(np.float64), list(map(int, self.labels)))
        checks.check_images(self.images[:0], self.labels[:0], classes=10)
        checks.check_images(self.images[:0], [])
        checks.check_images(np.zeros((2, 3, 4, 4), np.float32), [0, 1])  # 3 pixels high
        checks.check_images(np.zeros((1, 1, 32, 3), np.float32), [0])

    @sweeps.rows(
        (lambda x: x[0], r"shape \(4, 4, 3\); pass \[N, H, W, C\]: one image as images\[None\]"),
        (lambda x: (255 * x).astype(np.uint8), "uint8; .* divide by 255"),
        (lambda x: (255 * x).astype(np.int32), r"int32; pass float32 in \[0, 1\]"),
        (lambda x: 255 * x, r"span \[\d+\.?\d*, \d+\.?\d*\], not \[0, 1\]; .* divide by 255"),
        (lambda x: np.asarray(normalise(x)), "normalized already; .* let logits_fn normalize"),
        (lambda x: 2 * x - 1, "normalized already"),
        (lambda x: x * 1.0001 + (1.00005 - x.max()), r"np\.clip\(images, 0, 1\)"),
        (lambda x: np.where(np.arange(8)[:, None, None, None] < 3, np.nan, x), "3 of 8 images"),
        (lambda x: np.where(x > 0.5, np.inf, x), "inf"),
        (lambda x: np.zeros((8, 3, 32, 32), np.float32), r"images\.transpose\(0, 2, 3, 1\)"),
        (lambda x: np.zeros((8, 1, 28, 28), np.float32), "look channels-first"),
    )
    def test_refused_images(self, change, message):
        with self.assertRaisesRegex(ValueError, message):
            checks.check_images(change(self.images), self.labels)

    @sweeps.rows(
        (lambda y: y.astype(np.float32), r"float32; pass integers: labels.astype\('int32'\)"),
        (lambda y: y > 3, "bool; pass integers"),
        (lambda y: np.eye(10)[y], r"one-hot rows, labels\.argmax\(axis=1\)"),
        (lambda y: y[:7], r"shape \(7,\) for 8 images"),
        (lambda y: y[0], r"shape \(\) for 8 images"),
        (lambda y: y - 10, "a label is -.*; drop images without a label"),
        (lambda y: y - y.min() + 991, "a label is 99.*has 10 classes, 0 to 9"),
        (lambda y: np.clip(y, 1, 9) + (y == y.max()) * (10 - y.max()), "from 0: labels - 1"),
    )
    def test_refused_labels(self, change, message):
        with self.assertRaisesRegex(ValueError, message):
            checks.check_images(self.images, change(self.labels), classes=10)


class ResultTest(parameterized.TestCase):
    def test_gradients(self):
        zero = np.zeros(200, bool)
        self.assertEmpty(reliability.check_gradients(zero))
        self.assertEmpty(reliability.check_gradients(zero[:0]))
        zero[:2] = True
        self.assertEmpty(reliability.check_gradients(zero))  # 1% is not more than 1%
        zero[2] = True
        flags = reliability.check_gradients(zero)
        self.assertEqual(list(flags), ["zero-gradients"])
        self.assertIn("3 of 200 images (1.5%)", flags["zero-gradients"])
        self.assertIn("trust only Square and a transfer attack", flags["zero-gradients"])

    def test_gradients_of_a_saturated_softmax(self):
        """The real thing: cross-entropy of float32 probabilities has no gradient left."""

        def loss(x, scale):
            p = jax.nn.softmax(scale * healthy(x))
            return jnp.log(jnp.take_along_axis(p, labels[:, None], axis=1) + 1e-12).sum()

        images, labels = (jnp.asarray(a) for a in colours(64))
        for scale, expected in ((0.1, []), (100, ["zero-gradients"])):
            zero = (jax.grad(loss)(images, scale) == 0).all(axis=(1, 2, 3))
            self.assertEqual(list(reliability.check_gradients(np.asarray(zero))), expected)

    @sweeps.rows(
        (dict(clean=0.8, ce=0.5, square=0.497), True),
        (dict(clean=0.8, ce=0.5, square=0.4985), False),  # within 0.002
        (dict(clean=0.8, ce=0.5, fab=0.4, square=0.4), False),
        (dict(square=0.1, clean=0.8, ce=0.5), True),  # whatever the order
        (dict(clean=0.8, square=0.1), False),  # nothing to compare with
        (dict(clean=0.8, ce=0.5, fab=0.4), False),
        ({}, False),
    )
    def test_cascade(self, accuracy_after, flagged):
        flags = reliability.check_cascade(accuracy_after)
        self.assertEqual(list(flags), ["square-improves"] * flagged)
        if flagged:
            self.assertIn(f"from 50.00% to {accuracy_after['square']:.2%}", str(flags))
            self.assertIn("adaptive attack", flags["square-improves"])

    @sweeps.rows("linf", "l2", "l1")
    def test_verified(self, norm):
        rng = np.random.default_rng(0)
        images = rng.uniform(0.3, 0.7, (9, 4, 4, 3))
        delta = rng.normal(size=images.shape)
        order = {"linf": np.inf, "l2": 2, "l1": 1}[norm]
        norms = np.linalg.norm(delta.reshape(9, -1), order, axis=1)
        delta *= 0.1 / norms[:, None, None, None]
        adversarial = images + delta
        adversarial[1] = images[1] + 1.01 * delta[1]
        adversarial[2, 0, 0, 0] = np.nan
        adversarial[3, 0, 0, 0] = np.inf
        adversarial[4], images[4] = -1e-6, 0  # outside the box, inside the ball
        adversarial[5], images[5] = 1 + 1e-9, 1  # in float32 it would be inside
        adversarial[6] = images[6]
        labels = np.arange(9) % 3
        logits = np.eye(3)[(labels + 1) % 3]
        logits[7] = np.eye(3)[labels[7]]
        found, norms = checks.verified(adversarial, images, labels, logits, Threat(norm, 0.1))
        np.testing.assert_array_equal(found, [1, 0, 0, 0, 0, 0, 1, 0, 1])
        self.assertEqual(norms.dtype, np.float64)
        self.assertEqual(norms[6], 0)
        np.testing.assert_allclose(norms[[0, 1, 7, 8]], [0.1, 0.101, 0.1, 0.1], atol=1e-6)

    def test_verified_tolerance(self):
        images = np.zeros((4, 1, 1, 1))
        adversarial = np.array([1.000009, 1.000012, 0.5, 1]).reshape(4, 1, 1, 1) / 2
        epsilon = 0.5 - 1e-6
        found, _ = checks.verified(
            adversarial, images, np.zeros(4), np.eye(2)[[1, 1, 1, 0]], Threat("l2", epsilon)
        )
        np.testing.assert_array_equal(found, [True, False, True, False])

    def test_verified_nothing(self):
        empty = np.zeros((0, 4, 4, 3)), np.zeros((0, 4, 4, 3)), np.zeros(0), np.zeros((0, 3))
        found, norms = checks.verified(*empty, Threat("l1", 1))
        self.assertEqual((found.shape, found.dtype, norms.shape), ((0,), bool, (0,)))

    @sweeps.rows(
        (0, 0, 0.95, 0.0, 1.0),
        (0, 10, 0.95, 0.0, 1 - 0.025 ** (1 / 10)),  # closed form
        (10, 10, 0.95, 0.025 ** (1 / 10), 1.0),
        (1, 2, 0.9, 1 - 0.95**0.5, 0.95**0.5),
        (35, 128, 0.95, None, None),
        (5000, 10000, 0.99, None, None),
    )
    def test_binomial_interval(self, successes, n, level, low, high):
        found = checks.binomial_interval(successes, n, level)
        if low is None:  # the definition: at the ends, the tails have half of 1 - level each
            from scipy.stats import binom

            tails = binom.sf(successes - 1, n, found[0]), binom.cdf(successes, n, found[1])
            np.testing.assert_allclose(tails, (1 - level) / 2, rtol=1e-9)
        else:
            np.testing.assert_allclose(found, (low, high), rtol=1e-12)

    def test_binomial_interval_refuses(self):
        with self.assertRaisesRegex(ValueError, "successes=3 of n=2; pass counts"):
            checks.binomial_interval(3, 2)
        with self.assertRaisesRegex(ValueError, "95% is 0.95"):
            checks.binomial_interval(1, 2, 95)
