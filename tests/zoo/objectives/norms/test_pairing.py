"""RAMP's pairing of two norms' points: twenty updates next to PyTorch's in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from jaxrobust.config import base
from jaxrobust.training import build
from jaxrobust.training.update import objectives
from jaxrobust.zoo.objectives.norms import pairing
from tests.support import parity, sweeps
from tests.support import small_updates as small
from tests.support.steps import batch_of, small_config, standard

RECIPE = dict(
    objective="ramp", ramp_lambda=1.5, optimizer="sgd", weight_decay=2e-4, lr=0.05, final_lr=0.0,
    warmup_epochs=0, epochs=20, schedule="step", lr_steps=(12, 16), decay_mask="all", clip_norm=5.0,
)  # fmt: skip
FAR = 0.3  # of the second point


def points(logits_fn, keys, images, labels, epsilon_share):
    """A step along signs, and one along the gradient itself, from the start of an update."""

    def loss(x):
        return objectives.cross_entropy(logits_fn(x), labels).sum()

    start = epsilon_share
    slope = jax.grad(loss)(start)
    length = jnp.sqrt((slope**2).sum((1, 2, 3), keepdims=True))
    along = [small.STEP * jnp.sign(slope), FAR * slope / length]
    return jnp.stack([(start + by).clip(0, 1) for by in along], axis=1)


def torch_points(torch, look, start, y):
    from torch.nn import functional as f

    start = start.detach().requires_grad_()
    (slope,) = torch.autograd.grad(f.cross_entropy(look(start), y, reduction="sum"), start)
    length = slope.flatten(1).norm(dim=1)[:, None, None, None]
    along = [small.STEP * slope.sign(), FAR * slope / length]
    return [(start.detach() + by).clamp(0, 1) for by in along]


def torch_loss(torch, q, r, y, weight):
    """The larger cross-entropy of the two points, and their divergence where the first is right."""
    from torch.nn import functional as f

    worst = torch.maximum(*(f.cross_entropy(z, y, reduction="none") for z in (q, r))).mean()
    right = q.argmax(1) == y
    if not right.any():
        return worst, 0
    q, r = q[right], r[right]
    kl = f.kl_div(r.log_softmax(1), q.softmax(1), reduction="sum") / right.sum()
    return worst + weight * kl, int(right.sum())


def beside_pytorch(test, count):
    torch = parity.torch_or_skip(test)
    arrays = {k: torch.tensor(a) for k, a in small.weights().items()}
    learned = {k: a.requires_grad_() for k, a in arrays.items() if "running" not in k}
    sgd = torch.optim.SGD(learned.values(), lr=0.05, momentum=0.9, weight_decay=2e-4)
    forward, counts = small.torch_forward(torch, arrays), set()
    final = {}
    made = small.updates(RECIPE, count, attack=points, section=base().attack)
    for i, (state, metrics) in enumerate(made):
        _, labels, start = small.update_data(i)
        y = torch.tensor(labels).long()
        start = torch.tensor(start.transpose(0, 3, 1, 2).copy())
        found = torch_points(torch, lambda z: forward(learned, z, False), start, y)
        sgd.zero_grad()
        q, r = (forward(learned, point, True) for point in found)
        loss, right = torch_loss(torch, q, r, y, 1.5)
        counts.add(right)
        norm = small.torch_step(torch, sgd, loss, learned, i)
        final = state.params | state.stats
        np.testing.assert_allclose(metrics["loss"], loss.item(), rtol=1e-9, err_msg=str(i))
        np.testing.assert_allclose(metrics["gradient_norm"], norm, rtol=1e-9)
        both = ((q.argmax(1) == y) & (r.argmax(1) == y)).double().mean()
        test.assertAlmostEqual(float(metrics["robust"]), both.item(), places=6)
    for key, array in final.items():
        expected = small.ours(arrays[key].detach().numpy())
        np.testing.assert_allclose(array, expected, rtol=0, atol=1e-9, err_msg=key)
    return counts


class UpdatesTest(absltest.TestCase):
    @pytest.mark.slow
    def test_twenty_updates(self):
        """In some of them no image is right at the first point, in some several are."""
        with jax.enable_x64(True), standard():
            counts = beside_pytorch(self, 20)
        self.assertEqual(min(counts), 0)
        self.assertGreater(max(counts), 1)

    def test_three_updates(self):
        with jax.enable_x64(True), standard():
            beside_pytorch(self, 3)


class PairedTest(absltest.TestCase):
    def test_of_those_that_are_right_at_the_first(self):
        first, second = (np.random.default_rng(i).standard_normal((6, 4)) for i in (0, 1))
        labels = first.argmax(1)
        labels[:2] = (labels[:2] + 1) % 4
        p, q = (np.exp(z) / np.exp(z).sum(1, keepdims=True) for z in (first, second))
        expected = (p * np.log(p / q)).sum(1)[2:].mean()
        given = (jnp.asarray(first), jnp.asarray(second))
        found = pairing.paired(*given, jnp.asarray(labels, jnp.int32))
        np.testing.assert_allclose(found, expected, rtol=1e-5)
        wrong = jnp.asarray((first.argmax(1) + 1) % 4, jnp.int32)
        slope = jax.grad(lambda z: pairing.paired(z, given[1], wrong))(given[0])
        self.assertEqual(float(pairing.paired(*given, wrong)), 0)
        np.testing.assert_array_equal(slope, 0)


NORMS = {"attack__norm": ("linf", "l2", "l1"), "attack__epsilon": (8 / 255, 0.5, 3.0)}


class RowTest(parameterized.TestCase):
    def test_passes(self):
        """Two attacks of 3 steps of APGD, 7 passes each, and an update of both points."""
        attack = small_config(**NORMS, attack__mix="pair").attack
        self.assertEqual(objectives.passes("ramp", attack), 2 * 7 + 2 * 3)

    @sweeps.rows(
        (
            {"attack__norm": "linf", "attack__epsilon": 0.1},
            "objective='ramp' pairs the adversarial .* attack.norm=linf names one; list more",
        ),
        ({**NORMS, "attack__mix": "worst"}, "attack.mix='worst' does not keep both; set attack.m"),
        (
            {**NORMS, "attack__mix": "pair", "train__objective": "adversarial"},
            "attack.mix='pair' needs objective='ramp', .* with objective='adversarial' use",
        ),
        ({**NORMS, "attack__mix": "pair", "train__ramp_lambda": -1.0}, "ramp_lambda=-1.0 must be"),
        (
            {"attack__norm": "l2", "attack__epsilon": 0.1, "attack__mix": "pair"},
            "attack.mix='pair' mixes several norms, but attack.norm=l2 names one; list more",
        ),
    )
    def test_what_a_phase_refuses(self, changes, message):
        config = small_config(**{"train__objective": "ramp"} | changes)
        with self.assertRaisesRegex(ValueError, message):
            build.phase(config, "train", 64)

    @pytest.mark.slow
    def test_a_phase_trains(self):
        """On two devices, in two parts, as the radius grows: one program."""
        config = small_config(
            **NORMS, attack__mix="pair", train__objective="ramp", train__microbatches=2,
            attack__delay_epochs=1, attack__steps=1,
        )  # fmt: skip
        with standard():
            phase = build.phase(config, "train", 64, devices=jax.devices()[:2], donate=False)
            state, batch = phase.init(jax.random.key(0)), batch_of()
            told = []
            for share in (0.0, 1.0):
                control = build.control(phase.mesh, epsilon_share=share)
                told.append(phase.step(state, batch, control)[1])
        self.assertEqual(phase.step._cache_size(), 1)
        self.assertEqual([float(each["skipped"]) for each in told], [0, 0])
        self.assertLess(abs(float(told[0]["pairing"])), 1e-6)  # the points are the images
        self.assertLess(float(told[0]["loss"]), float(told[1]["loss"]))
