import itertools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxrobust import models
from jaxrobust.config import phase
from jaxrobust.training.update import optim
from tests.support import paths, reference, sweeps
from tests.support.parity import torch_or_skip
from tests.support.steps import standard


def transformer(name: str, shape) -> bool:
    """Whether main.py of nmndeep/revisiting-at decays a parameter of a ViT."""
    return not (len(shape) <= 1 or name.endswith(".bias"))


def convolutional(name: str, shape) -> bool:
    """The same for names of networks with 'convnext' or 'resnet'."""
    return not ("bn" in name or ".bias" in name)


def light_recipe(name: str, shape) -> bool:
    """Whether timm 1.0.9 does, as in Debenedetti et al. 2022 (arXiv 2209.07399)."""
    return transformer(name, shape) and name not in ("cls_token", "pos_embed")


class MaskTest(parameterized.TestCase):
    # our name, the listing of the reference, its rule in timm's names and shapes
    @sweeps.fast(3, 4, 7, 11)
    @parameterized.parameters(
        ("convnext_t", "timm_convnext_tiny", convolutional),
        ("convnext_b_cvst", "Singh2023Revisiting_ConvNeXt-B-ConvStem", convolutional),
        ("iso_convnext_s", "meta_convnext_isotropic_small", convolutional),
        ("iso_convnext_s_cvst", "paper_convnext_iso_small_cvst", convolutional),
        ("resnet18", "Salman2020Do_R18", convolutional),
        ("resnet50", "resnet50", convolutional),
        ("wide_resnet50_2", "wide_resnet50_2", convolutional),
        ("vit_s", "timm_vit_small_patch16_224", transformer),
        ("vit_m_cvst", "paper_vit_m_cvst", transformer),
        ("vit_b_cvst", "Singh2023Revisiting_ViT-B-ConvStem", transformer),
        ("swin_b", "timm_swin_base_patch4_window7_224", transformer),
        ("deit_s", "deit_small_patch16_224", light_recipe),
        ("xcit_s12", "xcit_small_12_p16_224", light_recipe),
        ("cait_s12", "cait_s12_224", light_recipe),
    )
    def test_is_the_references(self, name, listing, rule):
        keep = optim.DECAY_MASKS[models.decay_mask(name)]
        params, _ = jax.eval_shape(models.create(name).init, jax.random.key(0))
        counts = [0, 0]  # tensors with and without decay
        for key, shape, _ in reference.entries(paths.GOLDEN / "models" / f"{listing}.tsv"):
            key = key.removeprefix("model.")
            if key.startswith("normalize."):
                continue
            (match,) = [(r, m) for r in models.torch_names(name) if (m := r.pattern.fullmatch(key))]
            ours = match[0].target and match[1].expand(match[0].target)
            if ours in params:  # and not a statistic
                self.assertEqual(keep(ours, params[ours]), rule(key, shape), key)
                counts[keep(ours, params[ours])] += 1
        self.assertEqual(sum(counts), len(params))
        if name == "xcit_s12":
            self.assertEqual(counts, [241, 102])  # counted with timm 1.0.9


class NamedTest(parameterized.TestCase):
    @sweeps.rows(
        ("blocks.0.layer.0.bn1.scale", False),
        ("blocks.0.layer.0.bn3.6.bias", False),
        ("blocks.0.layer.0.se_bn.bias", False),
        ("norm1.scale", True),  # the last batch norm, which is called otherwise
        ("norm1.bias", True),
        ("fc.bias", True),
        ("stem_conv.kernel", True),
    )
    def test_what_is_called_bn_is_not_decayed(self, name, decayed):
        self.assertEqual(optim.DECAY_MASKS["not-bn-named"](name, jnp.ones(3)), decayed)


class AdamWTest(absltest.TestCase):
    def test_is_torchs(self):
        torch = torch_or_skip(self)
        rng, shapes = np.random.default_rng(0), {"a.kernel": (4, 3), "a.bias": (3,)}
        start, *grads = (
            {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
            for _ in range(5)
        )
        leaves = {name: torch.nn.Parameter(torch.tensor(value)) for name, value in start.items()}
        decays = {"a.kernel": 0.05, "a.bias": 0.0}
        optimiser = torch.optim.AdamW(
            [{"params": [leaves[name]], "weight_decay": decay} for name, decay in decays.items()],
            lr=0.01, betas=(0.9, 0.95), eps=1e-8,
        )  # fmt: skip
        tx = optim.adamw(lambda step: jnp.float32(0.01), weight_decay=0.05, decay_mask="not-bias")
        params = jax.tree.map(jnp.asarray, start)
        state = tx.init(params)
        for g in grads:
            g["a.bias"][0] *= 1e-7  # so small that eps counts
            with standard():  # optax itself mixes float and int32
                updates, state = tx.update(jax.tree.map(jnp.asarray, g), state, params)
            params = {name: params[name] + updates[name] for name in params}
            for name, leaf in leaves.items():
                leaf.grad = torch.tensor(g[name])
            optimiser.step()
        for name, leaf in leaves.items():
            np.testing.assert_allclose(params[name], leaf.detach().numpy(), rtol=0, atol=1e-6)


class SgdTest(parameterized.TestCase):
    @sweeps.rows(*itertools.product((False, True), (0.0, 0.05)))
    def test_is_torchs(self, nesterov, weight_decay):
        """50 updates in float64: what differs is the order of a few sums."""
        torch = torch_or_skip(self)
        rng = np.random.default_rng(0)
        start = {"a.kernel": rng.normal(size=(4, 3)), "a.bias": rng.normal(size=3)}
        target = {name: rng.normal(size=value.shape) for name, value in start.items()}
        leaves = {k: torch.nn.Parameter(torch.tensor(v)) for k, v in start.items()}
        groups = [{"params": [leaves["a.kernel"]], "weight_decay": weight_decay}]
        groups += [{"params": [leaves["a.bias"]], "weight_decay": 0.0}]
        theirs = torch.optim.SGD(groups, lr=0.05, momentum=0.9, nesterov=nesterov)
        with jax.enable_x64(True), standard():
            tx = optim.sgd(
                lambda step: 0.05,
                weight_decay=weight_decay,
                decay_mask="not-bias",
                nesterov=nesterov,
            )
            params = jax.tree.map(jnp.asarray, start)
            state = tx.init(params)
            for _ in range(50):
                grads = {k: jnp.tanh(params[k] - target[k]) for k in params}
                updates, state = tx.update(grads, state, params)
                params = {k: params[k] + updates[k] for k in params}
                for k, leaf in leaves.items():
                    leaf.grad = torch.tanh(leaf.detach() - torch.tensor(target[k]))
                theirs.step()
            for k, leaf in leaves.items():
                moved = np.abs(leaf.detach().numpy() - start[k]).max()
                self.assertGreater(moved, 0.1)
                np.testing.assert_allclose(params[k], leaf.detach().numpy(), rtol=0, atol=1e-9)

    def test_decays_what_a_phase_names(self):
        params = {"a.kernel": jnp.ones((2, 2)), "a.bias": jnp.ones(2)}
        zeros = jax.tree.map(jnp.zeros_like, params)
        for mask, moved in ((None, ["a.kernel"]), ("all", ["a.kernel", "a.bias"])):
            p = phase(optimizer="sgd", decay_mask=mask, warmup_lr=1e-3)
            _, tx = optim.of_phase(p, "train", decay_mask="matrices", steps_per_epoch=3)
            with standard():
                updates, _ = tx.update(zeros, tx.init(params), params)
            self.assertEqual([k for k in params if jnp.any(updates[k] != 0)], moved)
            np.testing.assert_allclose(updates["a.kernel"], -1e-3 * 0.05, rtol=1e-6)


class ClippingTest(parameterized.TestCase):
    @sweeps.rows(0.5, 3.0, 1e3)
    def test_is_torchs(self, largest):
        torch = torch_or_skip(self)
        rng = np.random.default_rng(0)
        grads = {"a.kernel": rng.normal(size=(4, 3)), "a.bias": rng.normal(size=3)}
        leaves = [torch.nn.Parameter(torch.zeros(g.shape).double()) for g in grads.values()]
        for leaf, g in zip(leaves, grads.values(), strict=True):
            leaf.grad = torch.tensor(g)
        norm = torch.nn.utils.clip_grad_norm_(leaves, largest).item()
        self.assertBetween(norm, 3.1, 1e2)
        with jax.enable_x64(True):
            tx = optim.clipped(largest)
            found, _ = tx.update(jax.tree.map(jnp.asarray, grads), tx.init(grads))
            for name, leaf in zip(grads, leaves, strict=True):
                np.testing.assert_allclose(found[name], leaf.grad.numpy(), rtol=1e-12)

    def test_takes_the_norm_that_it_is_given(self):
        tx, grads = optim.clipped(2.0), {"a": jnp.array([3.0, 4.0])}
        found, _ = tx.update(grads, tx.init(grads), norm=jnp.float32(8.0))
        np.testing.assert_allclose(found["a"], [0.75, 1.0], rtol=1e-6)

    def test_comes_before_the_decay(self):
        changes = {"optimizer": "sgd", "warmup_epochs": 0, "lr": 0.5, "weight_decay": 2.0}
        p = phase(clip_norm=1.0, decay_mask="all", **changes)
        _, tx = optim.of_phase(p, "train", decay_mask="all", steps_per_epoch=3)
        params = {"a": jnp.array([1.0, 0.0])}
        with standard():
            updates, _ = tx.update({"a": jnp.array([30.0, 40.0])}, tx.init(params), params)
        np.testing.assert_allclose(updates["a"], [-0.5 * 2.6, -0.5 * 0.8], rtol=1e-6)


class PhaseTest(parameterized.TestCase):
    @sweeps.rows(
        ({"optimizer": "adam"}, "train.optimizer='adam' must be one of 'adamw', 'sgd'"),
        ({"schedule": "cosin"}, "train.schedule='cosin' must be one of 'chord-cosine', 'cosine'"),
        ({"decay_mask": "none"}, "train.decay_mask='none' must be one of"),
        ({"warmup_lr": 2e-3}, "train.warmup_lr=0.002 must be between 0 and train.lr=0.001"),
        ({"warmup_lr": -1.0}, "train.warmup_lr=-1.0 must be between 0"),
        ({"schedule": "step"}, r"needs at least one, such as \(0.5, 0.75\)"),
        ({"schedule": "step", "lr_steps": (60,)}, r"lr_steps=\(60,\) must be epochs .*epochs=50"),
        ({"lr_steps": (0.0, 0.5)}, "above 0 and below train.epochs=50"),
        ({"lr_factor": 10.0}, "train.lr_factor=10.0 must be above 0, at most 1"),
        ({"clip_norm": 0.0}, "train.clip_norm=0.0 must be above 0, or None for no clipping"),
        ({"momentum": 1.0}, "train.momentum=1.0 must be at least 0 and below 1"),
        ({"momentum": 0.0, "nesterov": True}, "nesterov=True needs a value above 0"),
        ({"cooldown_epochs": 40}, "cooldown_epochs=40 must be .* epochs - warmup_epochs = 40"),
        ({"cooldown_epochs": -1}, "cooldown_epochs=-1 must be at least 0"),
        (
            {"schedule": "step", "lr_steps": (0.5,), "cooldown_epochs": 5},
            "a final value, which schedule='step' lacks; set cooldown_epochs=0",
        ),
        ({"cycle_momentum": True}, "needs schedule='one-cycle' and optimizer='sgd', not"),
        ({"schedule": "one-cycle", "warmup_epochs": 1}, "warmup_epochs=1 must be at least 2"),
    )
    def test_refuses(self, changes, message):
        with self.assertRaisesRegex(ValueError, message):
            optim.of_phase(phase(**changes), "train", decay_mask="all", steps_per_epoch=10)
