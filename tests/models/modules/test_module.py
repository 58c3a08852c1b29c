"""The NNX modules themselves: they are the networks, and may be taken apart."""

import jax
import numpy as np
from absl.testing import absltest, parameterized
from flax import nnx

from jaxrobust import models
from tests.support import sweeps
from tests.support.families import all_families

SMALL = {
    "convnext_n": {"depths": (1,), "dims": (8,), "image_size": 16},
    "internimage_t": {
        **{"depths": (1, 1), "dims": (8, 16), "groups": (2, 4), "stem_widths": (4, 8)},
        **{"stem_strides": (2, 1), "head_dim": 16, "image_size": 16},
    },
    "iso_convnext_s": {"dim": 8, "depth": 1, "stem_strides": (4,), "image_size": 16},
    "resnet18": {"depths": (1,), "small_stem": True, "image_size": 16},
    "vit_s": {"dim": 8, "depth": 1, "heads": 2, "stem_strides": (4,), "image_size": 16},
    "cait_s12": {"dim": 8, "depth": 1, "heads": 2, "stem_strides": (4,), "image_size": 16},
    "xcit_n12": {"dim": 16, "depth": 1, "heads": 2, "stem_strides": (2, 2), "image_size": 16},
    "swin_b": {"dim": 8, "depths": (1,), "heads": (2,), "window": 2, "image_size": 8},
    "robustresnet_a1": {"depths": (1,), "planes": (16,), "image_size": 8},
    "racl_7_104": {"channels": 4, "cells": 3, "image_size": 8},
    "cifar_botnet50": {"depths": (1, 1), "width": 4, "heads": 2, "image_size": 8},
    "cifar_ceit": {"dim": 8, "depth": 1, "heads": 1, "stem_width": 4, "image_size": 16},
    "cifar_levit": {
        **{"dims": (16, 16), "depths": (1, 1), "heads": (2, 2), "key_width": 4, "image_size": 8}
    },
    "cifar_mobilevit": {
        **{"channels": (4, 4, 4), "strides": (1, 1, 2), "dims": (8,), "depths": (1,)},
        **{"ratios": (2,), "image_size": 8},
    },
    "cifar_vitae": {
        **{"widths": (4, 4), "dims": (4, 8), "ratios": (4, 2), "kernels": (7, 3)},
        **{"dilations": (2, 2), "depth": 1, "heads": 2, "groups": 4, "image_size": 8},
    },
    "cifar_vgg16": {"widths": (4,), "image_size": 4},
    "cifar_wrn_40_10": {"depths": (1,), "width": 1, "image_size": 4},
    "cifar_densenet": {"depths": (1,), "image_size": 4},
    "cifar_preactresnet50": {"depths": (1,), "width": 4, "image_size": 4},
    "cifar_resnext29": {"depths": (1,), "width": 4, "image_size": 4},
    "dm_wrn_28_10": {"depths": (1,), "channels": (8,), "stem": 4, "image_size": 8},
    "dm_preactresnet18": {"depths": (1,), "width": 4, "image_size": 8},
    "ra_wrn_101_2": {"depths": (1,), "channels": (8,), "stem": 4, "image_size": 16},
    "cifar_vit": {"dim": 8, "depth": 1, "heads": 2, "hidden": 8, "image_size": 8},
    "cifar_mixer": {"dim": 8, "depth": 1, "token_hidden": 8, "hidden": 8, "image_size": 8},
    "cifar_poolformer": {"depths": (1,), "dims": (8,), "image_size": 8},
    "cifar_cpvt": {"dim": 8, "depth": 1, "heads": 2, "hidden": 8, "image_size": 8},
    "cifar_cct": {"dim": 8, "depth": 1, "heads": 2, "hidden": 8, "image_size": 8},
    "cifar_coatnet": {"dims": (8, 8), "depths": (1, 1), "order": "C", "image_size": 8},
    "cifar_pvt_v2": {
        **{"dims": (8,), "depths": (1,), "heads": (2,), "ratios": (2,), "image_size": 8}
    },
    "cifar_swin": {"dim": 8, "depths": (2,), "heads": (2,), "merges": (), "image_size": 8},
    "cifar_cvt": {"dims": (8,), "depths": (1,), "heads": (2,), "head_dim": 4, "image_size": 8},
}


class ModuleTest(parameterized.TestCase):
    @sweeps.fast("resnet18", "vit_s", "cifar_vgg16")
    @parameterized.parameters(*SMALL)
    def test_is_the_network(self, name):
        how = {"num_classes": 5} | SMALL[name]
        images = np.random.default_rng(0).random((2, how["image_size"], how["image_size"], 3), "f")
        net = models.create(name, **how)
        params, stats = net.init(jax.random.key(0))
        expected = jax.jit(net.apply)(params, stats, images)[0]
        drawn = models.module(name, rngs=nnx.Rngs(0), **how)
        np.testing.assert_allclose(nnx.jit(drawn)(images), expected, rtol=1e-5, atol=1e-6)
        other, stats = net.init(jax.random.key(1))
        given = models.module(name, rngs=nnx.Rngs(0), weights=(other, stats), **how)
        expected = jax.jit(net.apply)(other, stats, images)[0]
        np.testing.assert_allclose(nnx.jit(given)(images), expected, rtol=1e-5, atol=1e-6)

    def test_all_families_are_here(self):
        families = [models.family(name) for name in SMALL]
        self.assertCountEqual([f.file for f in families], [f.file for f in all_families()])

    def test_refusals(self):
        with self.assertRaisesRegex(ValueError, "unknown model 'convnet'; did you mean"):
            models.module("convnet", rngs=nnx.Rngs(0))
        with self.assertRaisesRegex(ValueError, "nets.py:make is a function of yours"):
            models.module("nets.py:make", rngs=nnx.Rngs(0))
        small = SMALL["convnext_n"]
        with self.assertRaisesRegex(ValueError, "these weights do not belong to this network"):
            models.module("convnext_n", rngs=nnx.Rngs(0), weights=({}, {}), **small)


if __name__ == "__main__":
    absltest.main()
