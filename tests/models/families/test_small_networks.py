"""Small networks of every family give what their PyTorch modules give, in evaluation and training.

What is compared with is stored; `python -m tests.support.small_networks` computes it anew.
"""

import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from flax import nnx

from jaxrobust import models
from jaxrobust.models.kernels import layers
from jaxrobust.models.modules import basic, draws
from jaxrobust.weights.naming import convert
from tests.support import paths, small_networks, sweeps

try:
    import torch

    from jaxrobust.publish import torch_networks  # noqa: F401
except ImportError:
    torch = None

# XCiT's positions are sines in float32, which no two libraries round alike.
ROUNDED = 1e-7
# One of each family is evaluated after every change, the one that takes the least time.
FIRST = {models.family(row[0]).file: label for label, row in reversed(small_networks.ROWS.items())}
QUICK = {
    **dict(convnext="convnext, cvst", internimage="internimage, patches", resnet="resnet, wide"),
    **dict(vit="vit, scaled", robust_resnet="robust_resnet, plain", searched="racl"),
    **dict(iso_convnext="iso_convnext, cvst", xcit="xcit, plain class token"),
}
FAST = (FIRST | QUICK).values()
TRAINED = ("resnet, small stem", "cifar_densenet", "xcit", "vit, scaled", "convnext")


def numbers(*labels: str) -> list[int]:
    """Their places among all rows."""
    return [list(small_networks.ROWS).index(label) for label in labels]


@absltest.skipIf(torch is None, paths.PARITY)
class SmallTest(parameterized.TestCase):
    def weights(self, label):
        """Weights of the stored numbers, under our names, float64."""
        state = small_networks.drawn(label)
        return convert.from_torch(
            small_networks.ROWS[label][0], state, **small_networks.options(label)
        )

    @sweeps.fast(*numbers(*FAST))
    @parameterized.parameters(*small_networks.ROWS)
    def test_evaluates(self, label):
        name, stored = small_networks.ROWS[label][0], small_networks.stored()[label]
        with jax.enable_x64(True):
            params, stats = self.weights(label)
            net = models.create(name, dtype="float64", **small_networks.options(label))
            logits, same = jax.jit(net.apply)(params, stats, small_networks.images(label))
        np.testing.assert_allclose(logits, stored["evaluated"], rtol=ROUNDED, atol=ROUNDED)
        self.assertEqual(same.keys(), stats.keys())

    @sweeps.fast(*numbers(*TRAINED))
    @parameterized.parameters(*small_networks.ROWS)
    def test_trains(self, label):
        """With blocks that are computed again, one program for several where there is, no draws."""
        name, stored = small_networks.ROWS[label][0], small_networks.stored()[label]
        options = small_networks.options(label)
        fields = models.variant(name)._fields
        how = {key: True for key in ("remat", "scan") if key in fields}
        how |= {key: 0.0 for key in RATES if key in fields}  # whose draws are others
        with jax.enable_x64(True):
            params, stats = self.weights(label)
            net = models.create(name, dtype="float64", **(options | how))
            run = jax.jit(lambda *given: net.apply(*given, train=True, key=jax.random.key(0)))
            logits, moved = jax.device_get(run(params, stats, small_networks.images(label)))
        np.testing.assert_allclose(logits, stored["trained"], rtol=ROUNDED, atol=ROUNDED)
        if stored["moved"]:
            own = {k: v for k, v in options.items() if k not in ("num_classes", "image_size")}
            theirs = convert.to_torch(name, params, moved, **own)
            for key, value in stored["moved"].items():
                found = small_networks.weighed(np.asarray(theirs[key]))
                self.assertAlmostEqual(found, value, delta=ROUNDED, msg=key)

    def test_an_oblong_image_is_no_square(self):
        """Where the rows are oblong, height and width are told apart."""
        oblong = [
            label
            for label in small_networks.ROWS
            if small_networks.images(label).shape[1] != small_networks.images(label).shape[2]
        ]
        self.assertGreater(len(oblong), len(small_networks.ROWS) // 2)


# Family -> how its references draw the kernels that they do not draw as PyTorch does by default: a
# normal of 0.02, He's by fan-out, uniform up to a number, or by a formula of the family's own.
DRAWN = {
    "convnext": {"0.02": ".*"},
    "iso_convnext": {"0.02": ".*"},
    "internimage": {
        "0.02": r"head|.*mlp\..*",
        "own": r".*\.(input|output)_proj",
        "0": r".*\.(mask|offset)",
    },
    "resnet": {"He": r"(?!fc).*"},
    "vit": {"0.02": r"(?!patch_embed).*"},
    "cait": {"0.02": r"(?!patch_embed).*"},
    "xcit": {"0.02": r"(?!patch_embed|pos_embed|.*local_mp).*"},
    "swin": {"0.02": r"(?!patch_embed).*"},
    "robust_resnet": {"He": r"(?!fc).*", f"{32**-0.5:.3g}": "fc"},
    "searched": {"0.333": r".*\.dw\d", "0.2": r".*\.dw\d"},  # of windows of 3 and 5 pixels
    "cifar_wide_resnet": {"own": r"(?!linear).*"},
    "ra_resnet": {"He": r"(?!fc|.*\.se).*"},
    "cifar_poolformer": {"0.02": r"head|.*mlp\..*"},
    "cifar_cct": {"0.02": r"(?!tokenizer).*", "own": "tokenizer.*"},
    "cifar_levit": {"0.02": "head"},
    "cifar_vitae": {"0.02": r"(?!.*convs).*"},
    "cifar_pvt_v2": {
        "0.02": r"(?!patch_embed|.*(downsample|sr|dwconv)).*",
        "He": r"patch_embed\.proj|.*\.(sr|downsample\.proj)",
        "own": r".*\.dwconv",
    },
}
KNOWN = {draws.torch_default: "torch", draws.normal_02: "0.02", draws.fan_out: "He"}


class KernelsDrawnTest(parameterized.TestCase):
    """What `init` every kernel of a family is given, and of which images its norms are; the
    formulas have tests of their own.
    """

    def rule(self, init):
        if init in KNOWN:
            return KNOWN[init]
        try:  # a number, or such up to it
            with jax.ensure_compile_time_eval():
                return f"{np.abs(init(jax.random.key(0), (999,))).max():.3g}"
        except ValueError:
            return "own"

    def affine(self, shape, bias, init, rngs):
        kernel = nnx.Param(jnp.zeros(shape), rule=self.rule(init))
        return kernel, nnx.Param(jnp.zeros(shape[-1])) if bias else None

    @parameterized.parameters(*FIRST.items())
    def test_as_the_references_do(self, family, label):
        name, side, own = small_networks.ROWS[label]
        sizes = {"num_classes": small_networks.CLASSES, "image_size": side}
        row = models.variant(name)._replace(**own)
        row = row._replace(bn_group=3) if "bn_group" in row._fields else row
        make = models.family(name).maker(row, **sizes)
        with mock.patch.object(basic, "_affine", self.affine):
            module = nnx.eval_shape(lambda: make(draws.Draws(jax.random.key(0))))
        found: dict[str, set[str]] = {}
        for path, kernel in nnx.to_flat_state(nnx.state(module, nnx.Param)):
            if (rule := kernel.get_metadata().get("rule")) is not None:
                found.setdefault(rule, set()).add(".".join(map(str, path)).removesuffix(".kernel"))
        every, others = set().union(*found.values()), DRAWN.get(family, {})
        for rule, pattern in others.items():
            self.assertNotEmpty(found.get(rule, ()))
            for name in found.pop(rule):
                self.assertRegex(name, rf"^(?:{pattern})$", rule)
        self.assertEqual(found.keys(), {"torch"} & found.keys())
        for name in found.get("torch", ()):  # none that one of the patterns names
            fits = [rule for rule, pattern in others.items() if re.fullmatch(pattern, name)]
            self.assertEmpty(fits, name)
        self.assertGreater(len(every), 3)
        norms = [part for _, part in nnx.iter_modules(module) if isinstance(part, basic.BatchNorm)]
        self.assertEqual({norm.group for norm in norms}, {3} if norms else set())
        if family != "cifar_wide_resnet":  # whose last norm moves fast
            self.assertEqual({norm.momentum for norm in norms}, {0.1} if norms else set())
        else:
            self.assertEqual([n.momentum for n in norms].count(0.9), 1)
            self.assertEqual(module.bn1.momentum, 0.9)


TOKENS, MAPS = (2, 10, 12), (2, 9, 9)
# Family -> shapes of what is dropped of two images, in the order of the places; those of whole
# branches are (2,), of which a first block drops none.
DROPPED = {
    "cifar_wide_resnet": [(*MAPS, 16), (*MAPS, 16), (2,), (*MAPS, 32), (2,)],
    "cifar_vit": [
        *[(2, 5, 12)],  # behind the positions
        *[(2, 5, 12), (2, 5, 8), (2, 5, 12)],
        *[(2, 5, 12), (2,), (2, 5, 8), (2, 5, 12), (2,), (2, 8)],  # then in the head
    ],
    "cifar_cpvt": [
        *[TOKENS, TOKENS, (2, 10, 8), TOKENS],
        *[TOKENS, (2,), (2, 10, 8), TOKENS, (2,)],
    ],
    "cifar_cct": [(2, 3, 25, 25), (2, 3, 25, 25), (2,), (2,)],  # of the weights of three heads
    "cifar_botnet": [(2,), (2,), (2, 32)],
    "cifar_vitae": [(2, 4, 4), (2, 2, 2, 4), (2,), (2,), (2,)],
    "cait": [(2,)] * 4,  # in both blocks at one rate, in no layer of the class token
}
RATES = {"drop_path": 0.6, "dropout": 0.25, "attention_dropout": 0.25}


class NormsTest(parameterized.TestCase):
    @sweeps.rows(
        *(
            label
            for label in FIRST.values()
            if {"bn_group", "bn_momentum"}
            & {*models.variant(small_networks.ROWS[label][0])._fields}
        )
    )
    def test_all_have_the_group_and_the_momentum_of_the_options(self, label):
        name, side, own = small_networks.ROWS[label]
        given = {"bn_group": 3, "bn_momentum": 0.375}
        given = {k: v for k, v in given.items() if k in models.variant(name)._fields}
        made, init = [], basic.BatchNorm.__init__

        def noted(norm, *sizes, **how):
            init(norm, *sizes, **how)
            made.append(dict(bn_group=norm.group, bn_momentum=norm.momentum))

        with mock.patch.object(basic.BatchNorm, "__init__", noted):
            models.create(name, image_size=side, **own | given)
        self.assertNotEmpty(made)
        for norm in made:
            self.assertEqual({key: norm[key] for key in given}, given)


class DroppedTest(parameterized.TestCase):
    """What training leaves out, where, and with which keys."""

    @parameterized.parameters(*DROPPED)
    def test_each_place_draws_by_its_own_key_in_training_alone(self, family):
        name, side, own = small_networks.ROWS[FIRST[family]]
        rates = {key: rate for key, rate in RATES.items() if key in models.variant(name)._fields}
        seen, zero = [], dict.fromkeys(rates, 0.0)

        def survives(key, rate, shape):
            seen.append((shape, rate, jax.random.key_data(key).tobytes()))
            return jnp.ones(shape, bool)

        sizes = {"num_classes": small_networks.CLASSES, "image_size": side} | own
        still, drawing = (models.create(name, **sizes | options) for options in (zero, rates))
        weights = jax.eval_shape(still.init, jax.random.key(0))
        x = jax.ShapeDtypeStruct((2, side, side, 3), jnp.float32)

        def run(net, **how):
            with jax.ensure_compile_time_eval():  # of keys
                jax.eval_shape(lambda *given: net.apply(*given, **how)[0], *weights, x)

        with mock.patch.object(layers, "_survives", survives):
            run(still, train=True)  # needs no key
            run(drawing, train=False, key=jax.random.key(1))
            self.assertEmpty(seen)
            run(drawing, train=True, key=jax.random.key(1))
            with self.assertRaisesRegex(ValueError, "above 0 needs randomness in training: call"):
                run(drawing, train=True)
        self.assertEqual([shape for shape, *_ in seen], DROPPED[family])
        self.assertLen({key for *_, key in seen}, len(seen))
        paths = [rate for shape, rate, _ in seen if shape == (2,)]
        three = family in ("cifar_wide_resnet", "cifar_botnet")  # blocks
        self.assertEqual(paths, [0.3, 0.6] if three else [0.6] * len(paths))
        others = [rate for shape, rate, _ in seen if shape != (2,)]
        self.assertEqual(others, [0.25] * len(others))
