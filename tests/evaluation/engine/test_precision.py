"""Verdicts fall in float32: with which precision the forward passes that decide multiply.

A TPU makes one bfloat16 product of two float32 numbers unless it is told otherwise, an NVIDIA GPU
may make one of TF32. A CPU does not, so what is looked at are programs.
"""

import collections
import importlib.util
import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from jaxrobust import models
from jaxrobust.attacks.ensembles import plan
from jaxrobust.config import network_of
from jaxrobust.evaluation.engine import slots
from jaxrobust.runtime.devices import cpus, sharding
from jaxrobust.training import build
from tests.support import sweeps, tpu
from tests.support.steps import small_config
from tools.bench import slice_programs

PRODUCT = re.compile(r"stablehlo\.(dot_general|convolution)\b.*?$", re.M)
SHAPE = (8, 8, 3)


def precisions(lowered) -> dict[str, int]:
    """How many products a program makes at each precision."""
    found = collections.Counter()
    for match in PRODUCT.finditer(lowered.as_text()):
        given = set(re.findall(r"\b(DEFAULT|HIGH|HIGHEST)\b", match[0])) or {"DEFAULT"}
        assert len(given) == 1, match[0]
        found[given.pop()] += 1
    return dict(found)


def network(dtype="float32"):
    """A network of all kinds of products, as a `Partial` of shapes."""
    net = models.create("convnext_n", num_classes=10, image_size=8, stem_strides=(1,), dtype=dtype)
    shapes = jax.eval_shape(net.init, jax.random.key(0))
    return jax.tree_util.Partial(lambda p, s, x: net.apply(p, s, x)[0], *shapes)


def mesh():
    return jax.sharding.Mesh(np.array(jax.devices()[:1]), ("slots",))


class NarrowerProductsTest(parameterized.TestCase):
    @sweeps.rows(
        ("cpu", True, "bfloat16"),
        ("cpu", False, None),
        ("tpu", False, "bfloat16"),
        ("gpu", 0, "TF32"),
    )
    def test_of_a_search(self, platform, narrow, said):
        kind = cpus.KINDS[0]._replace(narrow=bool(narrow))
        with mock.patch.object(cpus, "kind", lambda: kind):
            self.assertEqual(slots.narrower_products(platform), said)
            with jax.default_matmul_precision("highest"):
                self.assertIsNone(slots.narrower_products(platform))


@pytest.mark.computes
class AutoAttackTest(parameterized.TestCase):
    def test_the_last_forward_pass(self):
        closure = jax.tree_util.Partial(lambda x: x.reshape(len(x), -1) @ jnp.ones((192, 10)))
        for logits_fn in (network(), closure):
            program, operands = slice_programs.abstract_verdict(
                mesh(), logits_fn, slots=2, image=SHAPE
            )
            found = precisions(program.lower(*operands))
            self.assertEqual(set(found), {"HIGHEST"})

    @parameterized.parameters("apgd-ce", "square")
    @pytest.mark.slow
    def test_the_search(self, name):
        (setting,) = plan("linf", "standard", [name], None)
        step, operands, _ = slice_programs.abstract_step(
            mesh(), slots.program_of(setting), network(), slots=2, image=SHAPE
        )
        alone = precisions(step.lower(*operands))
        # Square copies a value to each channel by an exact product of its own.
        own = alone.pop("HIGHEST", 0)
        self.assertEqual(set(alone), {"DEFAULT"})
        self.assertEqual(bool(own), name == "square")

        step, operands, _ = slice_programs.abstract_step(
            mesh(),
            slots.program_of(setting),
            network(),
            slots=2,
            image=SHAPE,
            search_fn=network("bfloat16"),
        )
        guided = precisions(step.lower(*operands))
        self.assertEqual(guided["DEFAULT"], alone["DEFAULT"])
        verdict, operands = slice_programs.abstract_verdict(mesh(), network(), slots=2, image=SHAPE)
        last = precisions(verdict.lower(*operands))
        self.assertEqual(guided["HIGHEST"] - own, last["HIGHEST"])


class AmxTest(parameterized.TestCase):
    """A CPU with AMX, which is faked: its search multiplies in bfloat16, its verdict does not."""

    def setUp(self):
        super().setUp()
        row = next(row for row in cpus.KINDS if row.flag == "amx_bf16")
        self.enter_context(mock.patch.object(cpus, "kind", return_value=row))

    def products(self, lowered):
        """(products of float32, of bfloat16) in a program."""
        lines = [m[0] for m in PRODUCT.finditer(lowered.as_text()) if "dot_general" in m[0]]
        types = [re.search(r": \((.*?)\) ->", line)[1] for line in lines]
        return sum("f32" in t for t in types), sum("bf16" in t for t in types)

    @parameterized.parameters("apgd-ce", "fab-t")
    def test_the_search(self, name):
        (setting,) = plan("linf", "standard", [name], None)
        weights = jax.ShapeDtypeStruct((192, 10), np.float32)
        logits_fn = jax.tree_util.Partial(lambda w, x: x.reshape(len(x), -1) @ w, weights)
        step, operands, _ = slice_programs.abstract_step(
            mesh(), slots.program_of(setting), logits_fn, slots=2, image=SHAPE
        )
        wide, narrow = self.products(step.lower(*operands))
        self.assertEqual(wide, 0)
        self.assertGreaterEqual(narrow, 2)  # there and back

    def test_what_the_verdict_of_a_search_in_less_multiplies(self):
        (setting,) = plan("linf", "standard", ["square"], None)
        weights = jax.ShapeDtypeStruct((192, 10), np.float32)
        decides = jax.tree_util.Partial(lambda w, x: x.reshape(len(x), -1) @ w, weights)
        guides = jax.tree_util.Partial(lambda w, x: x.reshape(len(x), -1) @ w, weights)
        step, operands, _ = slice_programs.abstract_step(
            mesh(), slots.program_of(setting), decides, slots=2, image=SHAPE
        )
        operands = (operands[0], guides, *operands[2:])
        wide, narrow = self.products(step.lower(*operands))
        self.assertEqual(narrow, 1)
        self.assertGreaterEqual(wide, 1)


class EvalStepTest(absltest.TestCase):
    def test_verdicts_and_search(self):
        config = small_config()
        whole = sharding.make_mesh(jax.devices()[:1])
        evaluate = build.evaluation(config, whole, steps=3)
        net = network_of(config)
        shapes = jax.eval_shape(net.init, jax.random.key(0))
        size, channels = config.model.image_size, config.model.in_channels
        batch = (
            jax.ShapeDtypeStruct((4, size, size, channels), jnp.uint8),
            jax.ShapeDtypeStruct((4,), jnp.int32),
            jax.ShapeDtypeStruct((4,), bool),
            jax.ShapeDtypeStruct((4,), jnp.int32),
            jax.eval_shape(lambda: jax.random.key(0)),
        )
        forward = precisions(
            jax.jit(lambda p, s, x: net.apply(p, s, x)[0]).lower(
                *shapes, jax.ShapeDtypeStruct((4, size, size, channels), jnp.float32)
            )
        )
        found = precisions(evaluate.lower(*shapes, *batch))
        self.assertGreater(forward["DEFAULT"], 3)
        self.assertEqual(found["HIGHEST"], 2 * forward["DEFAULT"])  # clean and attacked
        self.assertGreater(found["DEFAULT"], 0)


def inner_programs(values):
    """The programs among parameters of an operation."""
    for value in values:
        if isinstance(value, tuple | list):
            yield from inner_programs(value)
        elif hasattr(value, "eqns") or hasattr(value, "jaxpr"):
            yield getattr(value, "jaxpr", value)


def precisions_in_kernels(jaxpr, inside=False):
    """The precision of each product in the kernels of a program."""
    for eqn in jaxpr.eqns:
        if inside and eqn.primitive.name == "dot_general":
            yield eqn.params["precision"]
        for program in inner_programs(eqn.params.values()):
            yield from precisions_in_kernels(program, inside or eqn.primitive.name == "pallas_call")


@absltest.skipUnless(importlib.util.find_spec("libtpu"), "needs pip install -e '.[tpu-aot]'")
class KernelsTest(parameterized.TestCase):
    """AutoAttack's programs for a TPU: attention is our kernel, as exact as what is around it."""

    def programs(self):
        chips = jax.sharding.Mesh(np.array(tpu.chips(self, "v5e:2x2")[:1]), ("slots",))
        net = models.create("vit_s", num_classes=10, image_size=32, depth=1)
        shapes = jax.eval_shape(net.init, jax.random.key(0))
        logits_fn = jax.tree_util.Partial(lambda p, s, x: net.apply(p, s, x)[0], *shapes)
        (setting,) = plan("linf", "standard", ["apgd-ce"], None)
        on = {"slots": 2, "image": (32, 32, 3)}
        step, given, _ = slice_programs.abstract_step(
            chips, slots.program_of(setting), logits_fn, **on
        )
        verdict, of_verdict = slice_programs.abstract_verdict(chips, logits_fn, **on)
        return step.trace(*given), verdict.trace(*of_verdict)

    def test_there_and_back(self):
        """Attention, and the two norms, which share a function."""
        search, verdict = (traced.lower().as_text() for traced in self.programs())
        self.assertEqual(search.count("tpu_custom_call"), 2 * 2)
        self.assertEqual(verdict.count("tpu_custom_call"), 2)

    def test_precision(self):
        search, verdict = (list(precisions_in_kernels(t.jaxpr.jaxpr)) for t in self.programs())
        self.assertEqual(set(search), {None})  # the device's: one product of bfloat16
        self.assertEqual(set(verdict), {(jax.lax.Precision.HIGHEST,) * 2})


@pytest.mark.slow
@absltest.skipUnless(importlib.util.find_spec("libtpu"), "needs pip install -e '.[tpu-aot]'")
class ExecutableTest(absltest.TestCase):
    """What the TPU compiler makes of the forward pass of convnext_n."""

    def test_no_product_in_bfloat16(self):
        chips = jax.sharding.Mesh(np.array(tpu.chips(self, "v5e:2x2")), ("slots",))
        program, operands = slice_programs.abstract_verdict(chips, network(), slots=8, image=SHAPE)
        text = program.lower(*operands).compile().as_text()
        self.assertNotIn("bf16[", text)
        products = re.findall(r" (?:convolution|dot)\(.*", text)
        self.assertNotEmpty(products)
        for product in products:
            self.assertIn("operand_precision={highest,highest}", product)
