"""Rows of the papers as they are run: two updates of each phase and one evaluation, reduced."""

import contextlib
from pathlib import Path

import jax
import numpy as np
import pytest
from absl.testing import parameterized

from jaxrobust import models
from jaxrobust.config import of_phase, phases
from jaxrobust.evaluation.engine import accuracy
from jaxrobust.training import build
from jaxrobust.training.run import best_weights, splits
from jaxrobust.types import Weights
from tools.generate import refresh_configs

FAMILIES = ("revisiting_at", "convstem_pretraining", "larger_radius", "light_recipe")
FAMILIES += ("light_ablation", "transfer", "cifar_bat", "cifar_aat", "cifar_aligned")
FAMILIES += ("several_norms", "generated_data")
ROWS = [name for name in refresh_configs.names() if ":" in name]
FAST = [  # those that compile soonest, of every kind
    "cifar_aligned:cifar_vgg16",
    "convstem_pretraining:vit_b_cvst",
    "larger_radius:convnext_t_cvst",
    "light_ablation:deit_s,data=imagenet,augmentation=mcre,warmup=0",
    "light_ablation:xcit_n12,augmentation=re,objective=clean",
    "revisiting_at:convnext_t,attack=pgd",
    "revisiting_at:convnext_t,start=random,augmentation=basic",
    "revisiting_at:convnext_t_cvst,start=clean,stem=7x7/2+3x3/2",
    "revisiting_at:vit_m",
    "revisiting_at:vit_s_cvst,augmentation=light",
    "transfer:resnet50,data=flowers,objective=clean",
]

# Those that are in no golden text and say something of their own.
MORE = [
    "aligned_study:pvt_v2",
    "larger_radius:vit_s_cvst",
    "revisiting_at:convnext_t_cvst,augmentation=basic",
    "revisiting_at:vit_s_cvst,label_smoothing=0.0",
    "transfer:convnext_t_cvst,data=cifar100",
    "transfer:convnext_t_cvst,data=flowers",
    "transfer:xcit_s12,data=cifar10",
    "transfer:xcit_s12,data=flowers",
]


def reduced(config):
    """The same run of a network of one block a stage, on small images, in small batches."""
    config.unlock()
    model = config.model
    row, stem = models.variant(model.name), dict(model.options)
    if "depths" in row._fields:
        stages = len(row.depths)
        changes = {"depths": (1,) * stages}
        if "dims" in row._fields:
            changes["dims"] = (stem.get("dims", row.dims)[0],) + (16,) * (stages - 1)
        if isinstance(getattr(row, "heads", None), tuple):
            changes["heads"] = (1,) * stages
        if "planes" in row._fields:
            changes["planes"] = (16,) * stages
    elif "depth" in row._fields:
        changes = {"depth": 1}
    else:
        changes = {"widths": (8,) * len(row.widths)}
    if "bn_group" in stem:
        changes["bn_group"] = 4
    model.options = stem | changes
    model.image_size = min(model.image_size, 64)
    for name in config.phases:
        config[name].batch_size = 4 * config.data.views
        if config[name].warmup_lr == 0:  # the rate of the whole first epoch, which changes nothing
            config[name].warmup_lr = config[name].lr / 10
    side = model.image_size if config.data.preprocessing is None else 2 * model.image_size
    config.data.update(name=f"fake:{side}x{side}x3:{model.num_classes}", workers=0, classes=None)
    few = f"train[:{8 * config.data.views}]"
    config.data.update(train_split=few, selection_split="train[:4]", test_split="train[:4]")
    config.data.update(extra=None, epoch_images=None)
    config.evaluation.update(images=4, batch_size=4)
    return config.lock()


class RowsTest(parameterized.TestCase):
    def check(self, name):
        config = reduced(refresh_configs.load(name))
        with jax.numpy_dtype_promotion("standard"):
            for phase in phases(config):
                self.check_phase(of_phase(config, phase), phase)

    def check_phase(self, config, name):
        source = splits.opened(config, "train_split")
        built = build.phase(config, name, len(source), devices=jax.devices()[:1], donate=False)
        state = built.init(jax.random.key(0))
        before = jax.device_get(state.params)
        with contextlib.closing(splits.batches(config, name, source, 0)) as batches:
            for _ in range(2):
                batch = splits.device_batch(built.mesh, next(batches))
                state, figures = built.step(state, batch, build.control(built.mesh))
        self.assertEqual(int(state.step), 2)
        self.assertTrue(np.isfinite(float(figures["loss"])), figures)
        after = jax.device_get(state.params)
        self.assertTrue(any((before[key] != after[key]).any() for key in before))
        images = splits.evaluated(config, "selection_split", config.evaluation, Path())
        evaluate = best_weights.counter(config, built.mesh)
        weights = Weights(state.params, state.stats)
        reached = accuracy.count(evaluate, weights, images, built.mesh, bar="selection")
        self.assertLessEqual(reached["robust"], reached["clean"])

    @parameterized.parameters(*((name,) for name in FAST))
    @pytest.mark.slow
    def test_two_steps(self, name):
        self.check(name)

    @parameterized.parameters(*((name,) for name in [*ROWS, *MORE] if name not in FAST))
    @pytest.mark.matrix
    def test_two_steps_of_every_row(self, name):
        self.check(name)
