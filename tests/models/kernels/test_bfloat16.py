"""Gradients of parameters in bfloat16: added up in float32, and near those of float32."""

import importlib.util
import re
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from jaxrobust import models
from jaxrobust.doctor.programs import hlo
from jaxrobust.models.interface.network_inputs import cast
from jaxrobust.models.kernels import attention, batch_norms, channel_attention, layers, primitives
from jaxrobust.models.kernels.talking_heads import talking_heads
from tests.support import sweeps, tpu
from tests.support.parity import relative

# Small networks with every kind of parameter. Their activation is smooth: the derivative of a ReLU
# near 0 is decided by rounding, which moves gradients of ResNet-18 by 9% in any way of adding up.
SMALL = {
    "convnext_n": {"depths": (1, 1), "dims": (16, 32), "stem_strides": (2,)},
    "convnext_n_cvst": {
        **{"depths": (1, 1), "dims": (16, 32), "stem_widths": (8, 16), "stem_strides": (2, 1)}
    },
    "internimage_t": {
        **{"depths": (1, 1), "dims": (8, 16), "groups": (2, 4), "stem_widths": (4, 8)},
        **{"stem_strides": (2, 1), "head_dim": 16},
    },
    "iso_convnext_s": {"dim": 16, "depth": 1, "stem_strides": (2,)},
    "iso_convnext_s_cvst": {"dim": 16, "depth": 1, "stem_widths": (8,), "stem_strides": (2,)},
    "vit_s": {"dim": 16, "depth": 1, "heads": 2, "stem_strides": (4,)},
    "vit_m_cvst": {
        **{"dim": 16, "depth": 1, "heads": 2, "stem_widths": (8,), "stem_strides": (4,)},
        **{"gamma_init": 0.5},
    },
    "cait_s12": {"dim": 16, "depth": 1, "class_depth": 1, "heads": 2, "stem_strides": (4,)},
    "xcit_n12": {"dim": 16, "depth": 1, "heads": 2, "stem_strides": (2,)},
    "resnet18": {"depths": (1, 1), "small_stem": True, "activation": "gelu"},
    "robustresnet_a1": {"depths": (1, 1), "planes": (16, 16), "activation": "silu"},
    "wrn_a1": {"depths": (1,), "planes": (16,), "activation": "silu"},
    "racl_7_104": {"channels": 4, "cells": 3},
    "cifar_vgg16": {"widths": (8, 16), "activation": "gelu"},
    "cifar_wrn_40_10": {"depths": (1, 1), "width": 1, "activation": "gelu"},
    "cifar_densenet": {"depths": (2, 1), "growth": 8, "stem": 8, "activation": "gelu"},
    "cifar_preactresnet50": {"depths": (1, 1), "width": 8, "activation": "gelu"},
    "cifar_resnext29": {"depths": (1, 1), "width": 8, "activation": "gelu"},
    "cifar_botnet50": {"depths": (1, 1), "width": 4, "heads": 2, "activation": "gelu"},
    "cifar_ceit": {"dim": 16, "depth": 1, "heads": 1, "stem_width": 8},
    "cifar_levit": {"dims": (16, 16), "depths": (1, 1), "heads": (2, 2), "key_width": 8}
    | {"scale_init": 0.5},
    "cifar_mobilevit": {
        **{"channels": (8, 8, 8), "strides": (2, 1, 2), "dims": (8,), "depths": (1,)},
        **{"ratios": (2,), "heads": 2},
    },
    "cifar_vitae": {
        **{"widths": (8, 8), "dims": (8, 16), "ratios": (4, 2), "kernels": (7, 3)},
        **{"dilations": (2, 2), "depth": 1, "heads": 2, "groups": 4},
    },
    "swin_b": {"dim": 8, "depths": (2,), "heads": (2,), "patch": 2, "window": 4},
    "dm_wrn_28_10": {"depths": (1, 1), "channels": (8, 16), "stem": 8},
    "dm_preactresnet18": {"depths": (1, 1), "width": 8},
    "ra_wrn_101_2": {"depths": (1, 1), "channels": (8, 16), "stem": 8},
    "cifar_vit": {"dim": 16, "depth": 1, "heads": 2, "hidden": 16},
    "cifar_mixer": {"dim": 16, "depth": 1, "token_hidden": 16, "hidden": 16},
    "cifar_poolformer": {"depths": (1, 1), "dims": (8, 16), "gamma_init": 0.5},
    "cifar_cpvt": {"dim": 16, "depth": 1, "heads": 2, "hidden": 16},
    "cifar_cct": {"dim": 16, "depth": 1, "heads": 2, "hidden": 16},
    "cifar_coatnet": {"dims": (8, 8, 16), "depths": (1, 1, 1), "order": "CT", "heads": 2},
    "cifar_pvt_v2": {"dims": (8, 16), "depths": (1, 1), "heads": (1, 2), "ratios": (2, 2)},
    "cifar_swin": {"dim": 8, "depths": (2,), "heads": (2,), "merges": ()},
    "cifar_cvt": {"dims": (8, 16), "depths": (1, 1), "heads": (1, 2), "head_dim": 8},
}
BATCH, SIZE = 64, 32
# Those with a ReLU that no option changes, such as that of a squeeze's one hidden unit, and one
# with a hard swish: its gradients move by 13% in the median when each weight moves by a rounding.
WITH_KINKS = {"robustresnet_a1", "racl_7_104", "cifar_pvt_v2", "ra_wrn_101_2", "cifar_levit"}
# Images of four labels differ in brightness. With one label for all, a batch norm would take away
# nearly all of what comes back to it, and what it left would be rounding; with as many images of
# each, so would the biases of a head.
LABELS = np.minimum(np.arange(BATCH) % 8, 3)


def gradient(name: str, dtype: str, moved: float = 0.0, **options):
    """A function of a key: the gradient of the parameters as the train step takes it.

    Each weight is moved by a random share of itself first, of at most `moved`.
    """
    net = models.create(name, num_classes=4, image_size=SIZE, dtype=dtype, **SMALL[name], **options)
    images = np.random.default_rng(1).random((BATCH, SIZE, SIZE, 3), np.float32)
    images *= ((1 + LABELS) / 4).astype(np.float32)[:, None, None, None]
    rng = np.random.default_rng(5)

    def run(key):
        params, stats = net.init(key)
        params = {
            k: v * (1 + moved * rng.uniform(-1, 1, v.shape).astype(np.float32))
            for k, v in params.items()
        }

        def loss(params):
            logits, _ = net.apply(params, stats, images, train=True, key=key)
            return -jax.nn.log_softmax(logits)[np.arange(BATCH), LABELS].mean()

        return jax.grad(loss)(cast(params, jnp.dtype(dtype)))

    return run


def equations(jaxpr) -> Iterator:
    """All equations of a program, those of the programs inside it too."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves([*equation.params.values()], is_leaf=_is_program):
            if _is_program(value):
                yield from equations(getattr(value, "jaxpr", value))


def _is_program(value) -> bool:
    return hasattr(value, "eqns")


class SumsTest(parameterized.TestCase):
    def test_every_family_is_here(self):
        missing = {models.family(name).file for name in models.available()} - {
            models.family(name).file for name in SMALL
        }
        self.assertEmpty(missing)

    @sweeps.fast("convnext_n_cvst", "vit_s", "swin_b", "cifar_mixer")
    @parameterized.parameters(
        *((name, {}) for name in SMALL),
        ("vit_m_cvst", {"drop_path": 0.1, "remat": True, "scan": True}),
    )
    def test_nothing_is_added_up_in_bfloat16(self, name, options):
        """Neither for CPU nor elsewhere: the program holds the formulas of all platforms."""
        program = jax.make_jaxpr(gradient(name, "bfloat16", **options))(jax.random.key(0))
        sums = [
            equation
            for equation in equations(program.jaxpr)
            if equation.primitive.name in ("reduce_sum", "reduce", "scatter-add", "cumsum")
        ]
        narrow = [
            e
            for e in sums
            if e.outvars[0].aval.dtype == jnp.bfloat16
            # JAX 0.10.0 drops an axis of length 1 by a sum, which adds nothing up.
            and (e.primitive.name != "reduce_sum" or e.invars[0].aval.size > e.outvars[0].aval.size)
        ]
        self.assertNotEmpty(sums)
        self.assertEmpty([f"{e.invars[0].aval} to {e.outvars[0].aval}" for e in narrow])


def check_near_float32(test, name: str) -> None:
    """The gradient of every parameter is within 3% of the array's largest entry in float32.

    Some networks turn the rounding of their weights alone into more than that. There it is within
    ten times of what gradients in float32 differ by when each weight moves by one rounding.
    """
    narrow, wide, moved = (
        jax.device_get(jax.jit(gradient(name, dtype, share))(jax.random.key(0)))
        for dtype, share in (("bfloat16", 0), ("float32", 0), ("float32", 2**-8))
    )
    narrow = {k: v.astype(np.float32) for k, v in narrow.items()}
    largest = max(np.abs(v).max() for v in wide.values())
    # What is added to all logits of a softmax, or to a channel before its batch norm, is not seen.
    unseen = {k for k, v in wide.items() if np.abs(v).max() < 3e-5 * largest}
    test.assertLess(len(unseen), len(wide) / 2)
    test.assertEmpty({k for k in unseen if np.abs(narrow[k]).max() > 2**-8 * largest})
    # bfloat16 keeps 8 bits, so a product is off by 0.4% at most, and a chain of them by more;
    # sums that round after each of 16,384 pixels are off by 20 to 97%.
    errors = {
        k: (relative(narrow[k], wide[k]), max(0.03, 10 * relative(moved[k], wide[k])))
        for k in wide.keys() - unseen
    }
    test.assertEmpty({k: both for k, both in errors.items() if both[0] > both[1]})


class NearFloat32Test(absltest.TestCase):
    def test_gradient(self):
        check_near_float32(self, "vit_s")


@pytest.mark.slow
class AllNearFloat32Test(parameterized.TestCase):
    @sweeps.rows(*(name for name in SMALL if name not in WITH_KINKS))
    def test_gradient(self, name):
        check_near_float32(self, name)


IMAGE, TOKENS, C = (64, 8, 8, 128), (64, 64, 2, 64), (128,)
MIX = ((2, 2), (2,))
# name -> (function of an array and of parameters, shapes)
LAYERS = {
    "bias": (primitives.add_bias, [IMAGE, C]),
    "positions": (primitives.add_bias, [(64, 64, 128), (1, 64, 128)]),
    "scale": (layers.scale, [IMAGE, C]),
    "layer_norm": (layers.layer_norm, [IMAGE, C, C]),
    "gelu": (layers.gelu, [IMAGE, C]),
    "scaled_residual": (lambda x, b, g: layers.scaled_residual(x, x * x, b, g), [IMAGE, C, C]),
    "batch_norm": (batch_norms.batch_norm, [IMAGE, C, C, C, C]),
    "batch_norm_train": (lambda *a: batch_norms.batch_norm_train(*a)[0], [IMAGE, C, C]),
    "attention": (lambda x, b: attention.attention(x, x, x, bias=b), [TOKENS, (2, 64, 64)]),
    "cross": (lambda x, t: channel_attention.cross_covariance(x, x, x, t), [TOKENS, (2, 1, 1)]),
    "talking": (
        lambda x, *m: talking_heads(x, m[:2], m[2:]),
        [(64, 64, 3 * 128), *MIX, *MIX],
    ),
}


@pytest.mark.slow
@absltest.skipUnless(
    importlib.util.find_spec("libtpu"),
    "needs the TPU compiler: pip install -e '.[test,tpu-aot]'",
)
class OnTpuTest(parameterized.TestCase):
    @sweeps.rows(*LAYERS)
    def test_the_compiler_keeps_sums_in_float32(self, name):
        """It adds up in bfloat16 where nothing but a conversion follows a sum in float32."""
        function, shapes = LAYERS[name]
        mesh = jax.sharding.Mesh(np.array(tpu.chips(self, "v5e:2x2")[:1]), ("x",))
        whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        x, *parameters = (
            jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=whole) for shape in shapes
        )

        def gradients(x, *parameters):
            value, pull = jax.vjp(lambda *p: function(x, *p), *parameters)
            return pull(value)

        module = hlo.parse(jax.jit(gradients).lower(x, *parameters).compile().as_text())
        reductions = [i for c in module.computations.values() for i in c.values()]
        called = (re.search(r"to_apply=%?([\w.-]+)", i.attributes) for i in reductions)
        roots = [module.root(match[1]) for match in called if match]
        adders = {root.type.split("[")[0] for root in roots if root.opcode == "add"}
        self.assertEqual(adders, {"f32"})
