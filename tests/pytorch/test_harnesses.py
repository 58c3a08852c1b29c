"""Our attacks as AttackBench and secml-torch call them, on networks that stay in PyTorch."""

import importlib.util
import runpy
import sys
import types
from unittest import mock

import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from jaxrobust import attacks
from tests.support.paths import ROOT

there = importlib.util.find_spec("torch") is not None
if there:
    import torch

    OURS = runpy.run_path(str(ROOT / "examples" / "torch_harnesses.py"))

WEIGHTS = np.random.default_rng(0).standard_normal((3, 4, 4, 5)).astype(np.float32)


class Linear:
    """A linear network of 3x4x4 pixels, in PyTorch, that counts what it is asked."""

    def __init__(self):
        self.forward = self.backward = 0

    def __call__(self, images):
        self.forward += 1
        self.backward += images.requires_grad
        return torch.einsum("bchw,chwk->bk", images, torch.from_numpy(WEIGHTS))

    decision_function = __call__


def logits_fn(images):
    return jnp.einsum("bhwc,chwk->bk", images, WEIGHTS)


@absltest.skipUnless(there, "needs PyTorch: pip install -e '.[torch]'")
class HarnessesTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.images = np.random.default_rng(1).random((12, 4, 4, 3), np.float32)
        self.inputs = torch.from_numpy(self.images.transpose(0, 3, 1, 2).copy())
        self.labels = torch.from_numpy(np.array(logits_fn(self.images).argmax(1)))

    def attacked(self, name, *words, net=None, **how):
        attack = OURS["attackbench"](name, **({"norm": "linf", "epsilon": 0.04} | how))
        return attack(net or Linear(), self.inputs, self.labels, *words)

    def test_apgd_finds_what_it_finds_in_jax(self):
        self.compare("Linf", 0.04)

    @parameterized.parameters(("L2", 0.2), ("L1", 0.8))
    @pytest.mark.slow
    def test_so_it_does_in_other_norms(self, norm, epsilon):
        self.compare(norm, epsilon)

    def compare(self, norm, epsilon):
        found = self.attacked("apgd", norm=norm, epsilon=epsilon, steps=8)
        run = attacks.apgd_run(
            *(logits_fn, jnp.asarray(self.images), jnp.asarray(self.labels.numpy(), jnp.int32)),
            **{"norm": norm.lower(), "epsilon": epsilon, "steps": 8},
        )
        said = np.array(logits_fn(found.numpy().transpose(0, 2, 3, 1)).argmax(1))
        stands = said == self.labels.numpy()
        np.testing.assert_array_equal(stands, run.correct)
        self.assertBetween(stands.sum(), 1, 11)
        # Sums of PyTorch and XLA come in another order; signs of gradients are the same.
        ours = found.numpy().transpose(0, 2, 3, 1)[stands]
        np.testing.assert_allclose(ours, np.array(run.x_best)[stands], atol=1e-5)

    @parameterized.parameters(("pgd", 5, 6, 5), ("apgd", 5, 7, 6), ("square", 5, 7, 0))
    def test_the_harness_counts_every_pass(self, name, steps, forward, backward):
        net = Linear()
        self.attacked(name, net=net, steps=steps, epsilon=0.001)  # fools no image
        self.assertEqual((net.forward, net.backward), (forward, backward))

    def test_the_first_point_that_fools_is_the_answer(self):
        asked = []

        def net(images):
            asked.append((images.detach().clone(), Linear()(images)))
            return asked[-1][1]

        found = self.attacked("pgd", net=net, steps=6, epsilon=0.1)
        later = 0
        for image, label in enumerate(self.labels):
            fooling = [x[image] for x, logits in asked if logits[image].argmax() != label]
            torch.testing.assert_close(found[image], fooling[0])
            later += not torch.equal(fooling[0], fooling[-1])
        self.assertGreater(later, 2)  # of which the last one is another

    @parameterized.parameters("pgd", "apgd", "apgd-dlr", "square")
    def test_points_stay_in_the_ball(self, name):
        found = self.attacked(name, steps=60 if name == "square" else 10, epsilon=0.3)
        self.assertEqual((found.shape, found.dtype), (self.inputs.shape, self.inputs.dtype))
        self.assertLessEqual(float((found - self.inputs).abs().max()), 0.3 + 1e-6)
        self.assertBetween(float(found.min()), 0, 1)
        self.assertLess((Linear()(found).argmax(1) == self.labels).sum(), 2)

    def test_aims_at_targets(self):
        targets = (self.labels + 1) % 5
        found = self.attacked("apgd-targeted", targets, True, steps=20, epsilon=0.6)
        self.assertTrue((Linear()(found).argmax(1) == targets).all())

    def test_what_is_refused(self):
        for name, words, message in (
            ("fab", (), "'fab' is not a supported attack; use one of pgd, apgd"),
            ("apgd", (self.labels, True), "use apgd-targeted"),
            ("apgd-targeted", (), "use a different attack"),
            ("apgd-targeted", (None, True), "needs targets"),
        ):
            with self.assertRaisesRegex(ValueError, message):
                self.attacked(name, *words)

    def test_as_secml_torch_calls_it(self):
        """By its own base class where it is installed, else by one that calls `_run` as it does."""
        if importlib.util.find_spec("secmlt") is None:
            module = types.ModuleType("secmlt.adv.evasion.base_evasion_attack")
            module.BaseEvasionAttack = type("BaseEvasionAttack", (), {})
            names = ("secmlt", "secmlt.adv", "secmlt.adv.evasion")
            known = {name: types.ModuleType(name) for name in names} | {module.__name__: module}
            self.enter_context(mock.patch.dict(sys.modules, known))
        attack = OURS["secml_attack"]("apgd", norm="linf", epsilon=0.3, steps=5)
        found, moved = attack._run(Linear(), self.inputs, self.labels)
        self.assertFalse((Linear()(found).argmax(1) == self.labels).any())
        torch.testing.assert_close(self.inputs + moved, found)
        self.assertFalse(attack._trackers_allowed())
