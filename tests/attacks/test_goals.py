"""Attacks on any task: losses, targets and outputs of one's own, and networks of any library."""

import functools

import equinox
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from flax import linen, nnx

from jaxrobust import attacks
from tests.support import paths, sweeps

try:
    import torch
except ImportError:
    torch = None

EPSILON, STEPS, CLASSES, VOID = 0.1, 20, 4, 255
DRAW = np.random.default_rng(0)
IMAGES = DRAW.random((3, 10, 10, 3))
MASKS = DRAW.integers(0, CLASSES, (3, 10, 10))
MASKS[DRAW.random(MASKS.shape) < 0.2] = VOID
KERNEL = DRAW.standard_normal((3, 3, 3, CLASSES))


def segment(images):
    """Return logits f[B,10,10,4] of each pixel."""
    dims = ("NHWC", "HWIO", "NHWC")
    logits = jax.lax.conv_general_dilated(
        images, jnp.asarray(KERNEL, images.dtype), (1, 1), "SAME", dimension_numbers=dims
    )
    return jnp.tanh(logits)


def pixel_loss(outputs, targets):
    """Return the mean cross-entropy of the pixels that have a class, f[B]."""
    logs = jax.nn.log_softmax(outputs, axis=-1)
    counted = targets != VOID
    picked = jnp.take_along_axis(logs, jnp.where(counted, targets, 0)[..., None], -1)[..., 0]
    return -jnp.mean(picked, (1, 2), where=counted)


def share_right(outputs, targets):
    """Return the share of right pixels among those that have a class, f[B]."""
    counted = targets != VOID
    right = (outputs.argmax(-1) == targets).astype(outputs.dtype)
    return jnp.mean(right, (1, 2), where=counted)


SEGMENTATION = attacks.Goal(pixel_loss, share_right, lambda score: score <= 0.3)


def embed(images):
    """Return a dict of features, such as an encoder with several heads has."""
    weights = jnp.asarray(KERNEL.reshape(27, CLASSES), images.dtype)
    return {"features": jnp.tanh(images.reshape(len(images), -1)[:, :27] @ weights)}


class SegmentationTest(parameterized.TestCase):
    @absltest.skipIf(torch is None, paths.PARITY)
    @parameterized.parameters("linf", "l2")
    def test_pgd_is_that_of_pytorch(self, norm):
        """Points, losses and scores of each step in float64, with masks that ignore pixels."""
        epsilon = {"linf": 0.1, "l2": 1.0}[norm]
        kernel = torch.from_numpy(KERNEL.transpose(3, 2, 0, 1).copy())
        clean = torch.from_numpy(IMAGES.transpose(0, 3, 1, 2).copy())
        masks = torch.from_numpy(MASKS)
        at, points, losses, scores = clean, [], [], []
        for _ in range(STEPS):
            at = at.detach().requires_grad_()
            logits = torch.nn.functional.conv2d(at, kernel, padding=1).tanh()
            loss = torch.stack(
                [
                    torch.nn.functional.cross_entropy(one[None], mask[None], ignore_index=VOID)
                    for one, mask in zip(logits, masks, strict=True)
                ]
            )
            (g,) = torch.autograd.grad(loss.sum(), at)
            losses.append(loss.detach().numpy())
            right = (logits.argmax(1) == masks) & (masks != VOID)
            scores.append((right.double().sum((1, 2)) / (masks != VOID).sum((1, 2))).numpy())
            size = g.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
            at = at.detach() + 2.5 * epsilon / STEPS * (g.sign() if norm == "linf" else g / size)
            delta = at - clean
            if norm == "linf":
                delta = delta.clamp(-epsilon, epsilon)
            else:
                length = delta.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
                delta = delta * (epsilon / length).clamp(max=1)
            at = (clean + delta).clamp(0, 1)
            points.append(at.numpy().transpose(0, 2, 3, 1))
        with jax.enable_x64(True):
            machine = attacks.pgd_machine(
                norm=norm, epsilon=epsilon, steps=STEPS, loss=SEGMENTATION
            )

            def step(state, _):
                done = attacks.advance(machine, lambda x, draw: segment(x), state)
                values = machine.loss(state, done.outputs), machine.score(state, done.outputs)
                return done.state, (machine.query(done.state), *values)

            state = machine.init(jnp.asarray(IMAGES), jnp.asarray(MASKS))
            _, found = jax.lax.scan(step, state, length=STEPS)
        for ours, theirs in zip(found, (points, losses, scores), strict=True):
            np.testing.assert_allclose(ours, np.stack(theirs), rtol=1e-9, atol=1e-9)

    def test_apgd_keeps_its_latest_success(self):
        state = attacks.apgd_run(
            segment,
            jnp.float32(IMAGES),
            MASKS,
            norm="linf",
            epsilon=EPSILON,
            steps=10,
            loss=SEGMENTATION,
        )
        scores = share_right(segment(state.x_best_adv), MASKS)
        np.testing.assert_array_equal(np.asarray(scores) <= 0.3, ~np.asarray(state.correct))
        self.assertTrue((~state.correct).any())

    def test_square_stops_where_the_goal_is_reached(self):
        images = jnp.float32(IMAGES)
        easy = attacks.Goal(pixel_loss, share_right, lambda score: score <= 0.9)
        settings = {"norm": "linf", "epsilon": EPSILON, "queries": 12, "key": jax.random.key(0)}
        state = attacks.square_run(segment, images, MASKS, **settings, loss=easy)
        self.assertEqual(state.iteration.tolist(), [1, 1, 1])
        state = attacks.square_run(segment, images, MASKS, **settings, loss=pixel_loss)
        self.assertEqual(state.iteration.tolist(), [13, 13, 13])
        self.assertTrue((-state.margin_best >= pixel_loss(segment(images), MASKS)).all())


class InfoTest(parameterized.TestCase):
    @sweeps.rows("pgd", "apgd", "fgsm", "mim", "square")
    def test_loss_score_and_steps_of_the_points(self, name):
        settings = {"square": {"queries": 5}, "fgsm": {}}.get(name, {"steps": 3})
        attack = getattr(attacks, name)(epsilon=EPSILON, loss=SEGMENTATION, info=True, **settings)
        images = jnp.float32(IMAGES)
        points, info = jax.jit(functools.partial(attack, segment))(jax.random.key(0), images, MASKS)
        outputs = segment(points)
        np.testing.assert_allclose(info.loss, pixel_loss(outputs, MASKS), rtol=1e-5)
        np.testing.assert_allclose(info.score, share_right(outputs, MASKS), rtol=1e-5)
        steps = {"pgd": 3, "mim": 3, "fgsm": 1, "apgd": 4, "square": info.steps[0]}[name]
        self.assertEqual(info.steps.tolist()[0], steps)

    def test_without_a_score_and_without_images(self):
        attack = attacks.pgd(epsilon=EPSILON, steps=1, loss=pixel_loss, info=True)
        _, info = attack(segment, jax.random.key(0), jnp.float32(IMAGES), MASKS)
        self.assertIsNone(info.score)
        points, info = attack(segment, None, jnp.zeros((0, 10, 10, 3)), MASKS[:0])
        self.assertEqual((points.shape, info.loss.shape), ((0, 10, 10, 3), (0,)))


class TargetsTest(absltest.TestCase):
    def test_a_tree_of_outputs_and_of_targets(self):
        """The embedding of an image, pushed away from that of the clean one."""
        images = jnp.float32(IMAGES)
        targets = jax.tree.map(np.asarray, embed(images))
        away = lambda outputs, targets: (  # noqa: E731
            jnp.sum((outputs["features"] - targets["features"]) ** 2, axis=1)
        )
        attack = attacks.apgd(epsilon=EPSILON, steps=5, random_start=True, loss=away)
        points = attack(embed, jax.random.key(0), images, targets)
        self.assertGreater(float(away(embed(points), targets).min()), 0.01)
        for seeds in (jax.random.split(jax.random.key(1), 2),):  # and under vmap over seeds
            many = jax.vmap(lambda key: attack(embed, key, images, targets))(seeds)
            self.assertEqual(many.shape, (2, *images.shape))

    def test_no_targets(self):
        energy = lambda outputs, targets: -jax.nn.logsumexp(outputs, axis=(1, 2, 3))  # noqa: E731
        attack = attacks.pgd(epsilon=EPSILON, steps=2, random_start=False, loss=energy)
        images = jnp.float32(IMAGES)
        points = attack(segment, None, images, None)
        self.assertTrue((energy(segment(points), None) > energy(segment(images), None)).all())


class NetworksTest(parameterized.TestCase):
    """NNX, Linen and Equinox as they are, inside and outside of `jit`; those in training mode."""

    IMAGES, LABELS = jnp.float32(DRAW.random((2, 4, 4, 3))), jnp.int32([0, 1])
    attack = staticmethod(attacks.pgd(epsilon=EPSILON, steps=2, random_start=False))

    def linen_pair(self):
        class Net(linen.Module):
            @linen.compact
            def __call__(self, x):
                return linen.Dense(3)(x.reshape(len(x), -1))

        net = Net()
        return net, net.init(jax.random.key(0), self.IMAGES)

    def test_linen(self):
        net, variables = self.linen_pair()
        expected = self.attack(lambda x: net.apply(variables, x), None, self.IMAGES, self.LABELS)
        points = self.attack((net, variables), None, self.IMAGES, self.LABELS)
        np.testing.assert_array_equal(points, expected)
        inside = jax.jit(lambda v, x: self.attack((net, v), None, x, self.LABELS))
        np.testing.assert_allclose(inside(variables, self.IMAGES), expected, atol=1e-6)

    def test_nnx(self):
        net = nnx.Sequential(lambda x: x.reshape(len(x), -1), nnx.Linear(48, 3, rngs=nnx.Rngs(0)))
        points = self.attack(net, None, self.IMAGES, self.LABELS)
        inside = nnx.jit(lambda net, x: self.attack(net, None, x, self.LABELS))
        np.testing.assert_allclose(inside(net, self.IMAGES), points, atol=1e-6)
        self.assertGreater(float(jnp.abs(points - self.IMAGES).max()), EPSILON / 2)

    def test_equinox(self):
        class Net(equinox.Module):
            linear: equinox.nn.Linear

            def __call__(self, x):
                return jax.vmap(self.linear)(x.reshape(len(x), -1))

        net = Net(equinox.nn.Linear(48, 3, key=jax.random.key(0)))
        points = self.attack(net, None, self.IMAGES, self.LABELS)
        inside = jax.jit(lambda net, x: self.attack(net, None, x, self.LABELS))
        np.testing.assert_allclose(inside(net, self.IMAGES), points, atol=1e-6)

    def refused(self, network, words):
        with self.assertRaisesRegex(ValueError, words):
            self.attack(network, None, self.IMAGES, self.LABELS)

    def test_no_network(self):
        self.refused(np.zeros(3), "the network is of type ndarray; pass a function, an NNX module")
        self.refused(
            self.linen_pair()[0], r"is of type Net; pass a function, .*\(linen_module, variables"
        )
        self.refused((1, 2), "is of type tuple")

    def test_training_mode(self):
        head = nnx.Linear(48, 3, rngs=nnx.Rngs(0))
        flat = lambda x: x.reshape(len(x), -1)  # noqa: E731
        dropout = nnx.Sequential(flat, nnx.Dropout(0.5, rngs=nnx.Rngs(0)), head)
        self.refused(dropout, r"model.eval\(\) in NNX")
        norm = nnx.Sequential(flat, nnx.BatchNorm(48, rngs=nnx.Rngs(0)), head)
        self.refused(norm, r"model.eval\(\) in NNX")
        norm.eval()
        self.attack(norm, None, self.IMAGES, self.LABELS)


class WrongCallsTest(parameterized.TestCase):
    """A sentence for each loss, target or output that does not fit."""

    def call(self, name="apgd", network=segment, targets=MASKS, **settings):
        steps = {"square": {"queries": 3}, "fab": {"steps": 2}}.get(name, {"steps": 2})
        attack = getattr(attacks, name)(epsilon=EPSILON, **steps, **settings)
        return attack(network, jax.random.key(0), jnp.float32(IMAGES), targets)

    @sweeps.rows("apgd", "pgd", "mim", "square")
    def test_losses(self, name):
        mean = lambda outputs, targets: pixel_loss(outputs, targets).mean()  # noqa: E731
        by_pixel = lambda outputs, targets: outputs.max(-1)  # noqa: E731
        for loss, words in (
            (mean, r"the loss has shape \(\) for 3 images; return one number for each"),
            (by_pixel, r"the loss has shape \(3, 10, 10\) for 3 images"),
            (lambda outputs, targets: pixel_loss(outputs, targets)[:2], r"has shape \(2,\)"),
            ("cee", "loss='cee' is unknown; choose one of ce, dlr, .*or pass a function"),
            ("ce", r"returns \(3, 10, 10, 4\), but this attack needs logits \[B, C\]; for another"),
        ):
            labels = np.zeros(3, int) if isinstance(loss, str) else MASKS
            with self.assertRaisesRegex(ValueError, words):
                self.call(name, loss=loss, targets=labels)

    def test_scores(self):
        for score, words in (
            (lambda outputs, targets: 0.5, r"the score has shape \(\) for 3 images"),
            (lambda outputs, targets: outputs[..., 0], r"the score has shape \(3, 10, 10\)"),
        ):
            with self.assertRaisesRegex(ValueError, words):
                self.call(loss=attacks.Goal(pixel_loss, score))

    def test_targets_and_outputs(self):
        for change, words in (
            ({"targets": MASKS[:2]}, r"targets of shape \(2, 10, 10\) do not fit 3 images"),
            ({"targets": {"a": MASKS, "b": 3}}, r"targets of shape \(\) do not fit 3 images"),
            ({"targets": [MASKS, "words"]}, "targets"),
            ({"network": lambda x: {}}, "returns nothing for 3 images"),
            (
                {"network": lambda x: (segment(x), x.mean())},
                r"returns \(3, 10, 10, 4\), \(\) for 3",
            ),
            ({"network": lambda x: segment(x)[:1]}, r"returns \(1, 10, 10, 4\) for 3 images"),
        ):
            loss = change.pop("loss", lambda outputs, targets: jnp.zeros(3))
            with self.assertRaisesRegex(ValueError, words):
                self.call(loss=loss, **change)

    def test_votes_are_logits(self):
        """Integers of a network without gradients, as before losses were functions."""
        votes = lambda images: jnp.int32(10 * images.mean((1, 2)))  # noqa: E731
        images, labels = jnp.float32(IMAGES), jnp.zeros(3, jnp.int32)
        attack = attacks.square(epsilon=EPSILON, queries=3)
        found = attack(votes, jax.random.key(0), images, labels)
        self.assertLessEqual(float(jnp.abs(found - images).max()), EPSILON + 1e-6)

    def test_fab_needs_logits(self):
        with self.assertRaisesRegex(ValueError, r"but this attack needs logits \[B, C\]"):
            self.call("fab", targets=np.zeros(3, int))
        for loss in (pixel_loss, "ce"):
            with self.assertRaisesRegex(
                ValueError, "FAB does not accept a loss, .* use attacks.apgd.loss="
            ):
                attacks.fab(epsilon=EPSILON, loss=loss)


SETTINGS = {
    "apgd": {"epsilon": EPSILON, "steps": 2},
    "pgd": {"epsilon": EPSILON, "steps": 2},
    "fgsm": {"epsilon": EPSILON},
    "mim": {"epsilon": EPSILON, "steps": 2},
    "square": {"epsilon": EPSILON, "queries": 3},
    "fab": {"epsilon": EPSILON, "steps": 2},
    "ddn": {"steps": 2},
    "fmn": {"steps": 2},
    "sparse_rs": {"pixels": 3, "queries": 3},
    "sparse_pgd": {"pixels": 3, "steps": 2},
}
SEARCHES = ("square", "sparse_rs")
SPARSE = ("sparse_rs", "sparse_pgd")
IN_BALLS = ("apgd", "pgd", "fgsm", "mim", "square", "fab")  # whose radius is set
BY_LABELS = ("square", "fab", "fmn", "sparse_rs")  # which take no soft targets by default
WITH_LOSS = tuple(name for name in SETTINGS if name != "fab")
STOP = ("apgd", "square", *SPARSE, "ddn", "fmn")  # which ask a goal whether it is reached
POINTS, LABELS = np.float32(IMAGES[:, :6, :6]), np.int32([0, 1, 2])
WEIGHTS = np.float32(DRAW.standard_normal((108, CLASSES)))
NAN = np.where(POINTS > 0.9, np.float32(np.nan), POINTS)


def classify(images):
    """Return logits f[B,4]."""
    return images.reshape(len(images), -1) @ WEIGHTS


def unbatched(image):
    """Return logits f[4] of a single image."""
    return image.reshape(108) @ WEIGHTS


def right(outputs, targets):
    """Return 1 where the label is the largest logit, f[B]."""
    return (outputs.argmax(1) == targets).astype(jnp.float32)


def label_loss(outputs, targets):
    """Return the cross-entropy, f[B]."""
    return attacks.ce_loss(outputs, targets)


def goal(loss=label_loss, score=right, **settings):
    """What an attack is built with."""
    return {"loss": attacks.Goal(loss, score, **settings)}


# What is passed instead of a network, its images, labels and key -> what is said.
NETWORKS = (
    (None, "the network is of type NoneType; pass a function, an NNX module"),
    (WEIGHTS, "the network is of type ndarray; pass a function"),
    ((classify, WEIGHTS), "the network is of type tuple; pass a function"),
    (
        lambda x: classify(x).argmax(1),
        r"returns \(3,\), but this attack needs logits \[B, C\]; for",
    ),
    (lambda x: classify(x)[..., None], r"returns \(3, 4, 1\), but this attack needs logits"),
    (lambda x: classify(x).mean(0), r"returns \(4,\), but this attack needs logits"),
    (
        lambda x: (classify(x), x),
        r"returns \(3, 4\), \(3, 6, 6, 3\) in a tuple, but this attack nee",
    ),
    (
        lambda x: {"logits": classify(x)},
        r"returns \(3, 4\) in a dict, but this attack needs logits",
    ),
    (lambda x: [classify(x)], r"returns \(3, 4\) in a list, but this attack needs logits"),
    (lambda x: None, r"returns nothing, but this attack needs logits"),
    (lambda x: "cat", r"returns \(\), but this attack needs logits"),
    (
        lambda x: classify(x)[:2],
        r"returns \(2, 4\) for 3 images; return arrays whose first axis is",
    ),
    (
        lambda x: np.asarray(x).max((1, 2)),
        "turns its images into NumPy arrays; write it with jax.n",
    ),
    (
        lambda x: classify(x if x.sum() > 0 else -x),
        "uses the value of an array in Python .* jnp",
    ),
    (unbatched, "takes a single image, not a batch; wrap it in jax.vmap"),
)
ONE_HOT = np.eye(CLASSES, dtype=np.float32)[LABELS]
DATA = (
    (
        {"labels": LABELS[:2]},
        r"labels of shape \(2,\) do not fit 3 images; pass i32\[B\] or f\[B, C",
    ),
    ({"labels": LABELS[0]}, r"labels of shape \(\) do not fit 3 images"),
    (
        {"labels": LABELS[:, None]},
        r"labels are int32 of shape \(3, 1\); pass class labels as integ",
    ),
    ({"labels": np.float32(LABELS)}, "labels are float32 of shape .*pass class labels as integers"),
    ({"labels": LABELS > 0}, r"labels are bool of shape \(3,\); pass class labels as integers"),
    (
        {"labels": np.int32(ONE_HOT)},
        r"labels are int32 of shape \(3, 4\); .* soft targets as floats",
    ),
    ({"labels": LABELS + 2}, r"labels\[2\]=4 is outside the 4 classes of the logits; pass numbers"),
    ({"labels": LABELS - 1}, r"labels\[0\]=-1 is outside the 4 classes of the logits"),
    ({"labels": None}, "labels are of type NoneType, not an array of numbers"),
    ({"labels": ["cat", "dog", "cat"]}, "labels are of type list, not an array of numbers"),
    ({"labels": {"class": LABELS}}, "labels are of type dict, not an array of numbers"),
    ({"images": None}, "images are of type NoneType, not an array of numbers"),
    ({"images": "cat.png"}, "images are of type str, not an array of numbers"),
    ({"images": [POINTS[0], POINTS[1, :2]]}, "images are of type list, not an array of numbers"),
    (
        {"images": np.uint8(255 * POINTS)},
        "images are uint8, but attacks need floats .* divide uint8 ima",
    ),
    ({"images": LABELS, "labels": POINTS}, "images are int32, but attacks need floats"),
    ({"images": POINTS[0]}, r"do not fit 6 images; .*; for a single image, pass images\[None\]"),
    (
        {"images": NAN},
        "images contain NaN or infinite pixels; remove these images",
    ),
    ({"images": np.full_like(POINTS, np.inf)}, "images contain NaN or infinite pixels"),
)
KEYS = (
    (None, "a random start needs a key; pass jax.random.key"),
    (0, r"key=0 is not a JAX key; pass jax.random.key\(seed\)"),
    ("seed", "key='seed' is not a JAX key"),
    (np.ones(2), "is not a JAX key"),
    (
        jax.random.split(jax.random.key(0), 2),
        r"keys of shape \(2,\) do not fit 3 images; pass one or",
    ),
)
# Settings -> the attacks that have them, and what is said.
REFUSED = (
    ({"epsilon": -0.1}, IN_BALLS, "epsilon=-0.1 is not a valid radius; pass a finite number >= 0"),
    (
        {"epsilon": 8.0},
        IN_BALLS,
        r"epsilon=8.0 is larger than the pixel range \[0, 1\]; write 8/255",
    ),
    ({"epsilon": np.nan}, IN_BALLS, "epsilon=nan is not a valid radius"),
    ({"epsilon": "8/255"}, IN_BALLS, "epsilon='8/255' is not a number; pass one without quotes"),
    ({"epsilon": None}, IN_BALLS, "epsilon=None is not a number"),
    ({"epsilon": [0.1, 0.2]}, IN_BALLS, r"epsilon=\[0.1, 0.2\] is not a number"),
    (
        {"epsilon": jnp.full(2, 0.1)},
        ("apgd", "pgd", "mim", "square", "fab"),
        r"epsilon of shape \(2,\) does not fit 3 images; pass one radius, or one for each image",
    ),
    (
        {"epsilon": jnp.full(3, 0.1)},
        ("fgsm",),
        "with one radius per image, pass step_size too",
    ),
    *(
        (
            {"steps": steps},
            ("apgd", "pgd", "mim", "fab", "ddn", "fmn"),
            "must be an int >= 1",
        )
        for steps in (0, -1, 2.5, "2", True, None)
    ),
    *(({"queries": n}, SEARCHES, "must be an int >= 1") for n in (0, 1.5)),
    ({"norm": "l3"}, (*IN_BALLS, "fmn"), "norm='l3' is unknown; choose one of "),
    ({"norm": 2}, (*IN_BALLS, "fmn"), "norm=2 is unknown; choose one of "),
    ({"norm": "l0"}, IN_BALLS, "norm='l0' is unknown; choose one of linf, l2, l1"),
    ({"pixels": 0}, SPARSE, "pixels=0 must be an int >= 1"),
    ({"pixels": 0.1}, SPARSE, "pixels=0.1 must be an int"),
    ({"pixels": 36}, SPARSE, "pixels=36 must be less than the 36 pixels of an image"),
    (
        {"step_size": 0},
        ("pgd", "fgsm", "mim", "fmn"),
        "step_size=0 must be a finite number > 0",
    ),
    ({"step_size": 2.0}, ("pgd", "fgsm", "mim"), "step_size=2.0 is larger than the pixel range"),
    ({"gamma": 1.0}, ("ddn", "fmn"), "gamma=1.0 must be between 0 and 1, such as 0.05"),
    ({"init_epsilon": 0}, ("ddn",), "init_epsilon=0 must be above 0, such as 1.0"),
    ({"decay": -1}, ("mim",), "decay=-1 must be a number >= 0, such as 1.0"),
    (
        {"random_start": "random"},
        ("apgd", "pgd", "fgsm", "mim", "fab"),
        r"random_start='random' must be True, False or attacks.Noise\(",
    ),
    *(
        ({"loss": loss}, WITH_LOSS, "is unknown; choose one of ce, dlr, .* or pass a function")
        for loss in ("cee", None, 3, ["ce", "dlr"])
    ),
    (
        {"loss": "dlr-targeted"},
        WITH_LOSS,
        "needs a target class per image, which this attack does not accept; use apgd_run",
    ),
    (
        {"loss": "kl"},
        WITH_LOSS,
        r"targets of shape \(3,\) do not fit logits of shape \(3, 4\); pass t",
    ),
    (
        {"loss": label_loss},
        ("ddn", "fmn"),
        r"does not define .*; pass loss=attacks.Goal\(loss, score",
    ),
)
COUNT = "return one number for each image, f\\[B\\], such as a mean over all axes but the first"
READS = "reads the values of arrays while it is traced; write it with jax.numpy, and use jnp.where"
GOALS = (
    (goal(lambda o, t: label_loss(o, t).mean()), rf"the loss has shape \(\) for 3 images; {COUNT}"),
    (goal(lambda o, t: o), rf"the loss has shape \(3, 4\) for 3 images; {COUNT}"),
    (goal(lambda o, t: label_loss(o, t)[:2]), r"the loss has shape \(2,\) for 3 images"),
    (goal(lambda o, t: None), "the loss is of type NoneType for 3 images; return one float for"),
    (
        goal(lambda o, t: 1 - right(o, t).astype(int)),
        "the loss is of type int32 for 3 images; return",
    ),
    (
        goal(lambda o, t: o.argmax(1) != t),
        r"the loss is of type bool for 3 images; return one float",
    ),
    (
        goal(lambda o, t: jax.lax.complex(*[label_loss(o, t)] * 2)),
        "the loss is of type complex64 for 3 images",
    ),
    (
        goal(lambda o, t: [0.0, 0.0, 0.0]),
        "the loss is of type list for 3 images; return one float fo",
    ),
    (goal(lambda o, t: np.asarray(o).max(1)), f"the loss {READS}"),
    (goal(lambda o, t: o.max(1) if o.sum() > 0 else o.min(1)), f"the loss {READS}"),
    (
        goal(lambda o: o.max(1)),
        r"loss=.* must be a function of outputs and targets \(too many posi",
    ),
    (
        goal(lambda o, t, c: o.max(1)),
        r"must be a function of outputs and targets \(missing a requi",
    ),
    (goal("ce"), "loss='ce' must be a function of outputs and targets"),
    (goal(score=lambda o, t: 0.5), rf"the score has shape \(\) for 3 images; {COUNT}"),
    (goal(score=lambda o, t: right(o, t).mean()), r"the score has shape \(\) for 3 images"),
    (goal(score=lambda o, t: o), r"the score has shape \(3, 4\) for 3 images"),
    (goal(score=lambda o, t: None), "the score is of type NoneType for 3 images"),
    (goal(score=lambda o, t: [0, 0, 1]), "the score is of type list for 3 images"),
    (goal(score=lambda o, t: np.asarray(o).max(1)), f"the score {READS}"),
    (goal(score=lambda o: o.max(1)), "Goal.score=.* must be a function of outputs and targets"),
    (goal(score="accuracy"), "Goal.score='accuracy' must be a function of outputs and targets"),
    (goal(done=None), "Goal.done=None must be a function of score"),
    (goal(done=lambda score, targets: score <= 0), "Goal.done=.* must be a function of score"),
)
DONE = (
    (
        lambda score: score,
        r"Goal.done is of type float32 for 3 images; return one bool for each imag",
    ),
    (
        lambda score: (score <= 0).any(),
        r"Goal.done has shape \(\) for 3 images; return one bool for",
    ),
    (
        lambda score: True,
        r"Goal.done has shape \(\) for 3 images; .* bool\[B\], such as score <= 0",
    ),
    (lambda score: np.asarray(score) <= 0, f"Goal.done {READS}"),
)
TREES = (
    (
        LABELS[:2],
        r"targets of shape \(2,\) do not fit 3 images; pass one target per image along the first",
    ),
    ({"labels": LABELS, "count": 3}, r"targets of shape \(\) do not fit 3 images"),
    (["cat", "dog", "cat"], "targets are of type str, not an array of numbers"),
)


class EveryAttackTest(parameterized.TestCase):
    """A sentence of each attack for each wrong call."""

    subjects = ("pgd", "sparse_rs")  # fast: one with a gradient and one without

    def setUp(self):
        super().setUp()  # users have no checks of annotations either
        jaxtyping.config.update("jaxtyping_disable", True)
        self.addCleanup(jaxtyping.config.update, "jaxtyping_disable", False)

    def refuse(self, names, words, network=classify, key=None, images=POINTS, labels=LABELS, **own):
        for name in set(names) & set(self.subjects):
            start = {"random_start": True} if name in ("apgd", "pgd", "fgsm", "mim", "fab") else {}
            with self.subTest(name):
                with self.assertRaisesRegex(ValueError, words) as caught:
                    attack = getattr(attacks, name)(**SETTINGS[name] | start | own)
                    attack(network, key, images, labels)
                self.assertNotIn("\n", str(caught.exception))

    @sweeps.rows(*NETWORKS)
    def test_networks(self, network, words):
        self.refuse(SETTINGS, words, network, jax.random.key(0))

    @sweeps.rows(*DATA)
    def test_images_and_labels(self, changes, words):
        self.refuse(SETTINGS, words, key=jax.random.key(0), **changes)

    @sweeps.rows(*KEYS)
    def test_keys(self, key, words):
        self.refuse([name for name in SETTINGS if name not in ("ddn", "fmn")], words, key=key)

    @sweeps.rows(*REFUSED)
    def test_settings(self, changes, names, words):
        self.refuse(names, words, key=jax.random.key(0), **changes)

    @sweeps.rows(*GOALS)
    def test_losses_and_scores(self, changes, words):
        self.refuse(WITH_LOSS, words, key=jax.random.key(0), **changes)

    @sweeps.rows(*DONE)
    def test_when_it_is_done(self, done, words):
        self.refuse(STOP, words, key=jax.random.key(0), **goal(done=done))

    @sweeps.rows(*TREES)
    def test_targets(self, targets, words):
        self.refuse(WITH_LOSS, words, key=jax.random.key(0), labels=targets, **goal())

    def test_soft_targets(self):
        self.refuse(BY_LABELS, "needs class", key=jax.random.key(0), labels=ONE_HOT)

    def test_pixels(self):
        flat = POINTS.reshape(3, -1)
        words = r"needs images f\[B, H, W, C\], got shape \(3, 108\)"
        self.refuse(("square", *SPARSE), words, key=jax.random.key(0), images=flat)

    def test_modules_in_training_mode(self):
        head = nnx.Linear(108, CLASSES, rngs=nnx.Rngs(0))
        flat = lambda x: x.reshape(len(x), -1)  # noqa: E731
        layers = nnx.Dropout(0.5, rngs=nnx.Rngs(0)), nnx.BatchNorm(108, rngs=nnx.Rngs(0))
        for layer in layers:
            network = nnx.Sequential(flat, layer, head)
            words = r"put it into evaluation mode, .* model.eval\(\) in NNX"
            self.refuse(SETTINGS, words, network, jax.random.key(0))


@pytest.mark.slow
class EveryOtherAttackTest(EveryAttackTest):
    subjects = tuple(set(SETTINGS) - set(EveryAttackTest.subjects))


if __name__ == "__main__":
    absltest.main()
