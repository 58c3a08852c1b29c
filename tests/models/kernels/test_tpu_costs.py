"""The declared costs of kernels for TPUs, counted by hand from their operations.

A v5e has four matrix units, which take a row of a 128 x 128 tile in a cycle, and as many vector
operations on registers of 8 x 128 values. What a sum in a docstring leaves out stands next to it.
Kernels declare these cycles times what the compiler's final schedules say, kernel by kernel.
"""

import contextlib
import importlib.metadata
import importlib.util
import json
import subprocess
import sys
from unittest import mock

import jax
import jax.numpy as jnp
import pytest
from absl.testing import absltest, parameterized

from jaxrobust.models.kernels.convnext_layers import BlockParameters, HalvingParameters
from jaxrobust.models.kernels.deformable.places import GridGeometry
from jaxrobust.models.kernels.tpu import (
    batch_stem,
    calls,
    channel_attention,
    conv_stem,
    convnext_block,
    deformable_windows,
    depthwise_norm,
    norm_halving,
    talking_heads,
    token_attention,
    token_interaction,
    token_norm,
)
from tests.support import paths, sweeps
from tools.generate import refresh_schedules

EPS = {"eps": 1e-6}


def shape(*sides):
    return jax.ShapeDtypeStruct(sides, jnp.bfloat16)


class Reached(Exception):
    """The kernel is known."""


def declared(function, *operands, **how):
    """(name, operations, powers, cycles) of the kernel that a function runs."""
    found = []

    def over_images(kernel, *rest, **more):
        found.append((kernel.name, *kernel.cost))
        raise Reached

    module = {m.__name__: m for m in MODULES}[function.__module__]
    with mock.patch.object(module, "over_images", over_images), contextlib.suppress(Reached):
        jax.eval_shape(lambda *given: function(*given, **how), *operands)
    (kernel,) = found
    return kernel


MODULES = (
    *(batch_stem, channel_attention, conv_stem, convnext_block, deformable_windows),
    *(depthwise_norm, norm_halving),
    *(talking_heads, token_attention, token_interaction, token_norm),
)
# XCiT's and ConvNeXt's stems: of images, 28 rows of blocks of 4 x 4 pixels in each half.
PLANES, KEPT, OUT = shape(1, 3, 224, 224), shape(1, 28, 96, 128), shape(1, 56, 56, 96)
KERNELS = shape(3, 3, 3, 48), shape(3, 3, 48, 96)
NORMS = [shape(48)] * 3, [shape(96)] * 3
STEM = KERNELS[0], *NORMS[0], KERNELS[1], *NORMS[1]
ROWS = shape(1, 5, 48), shape(1, 5, 96)
COLUMNS, BACK = 720 * 10 / 4, 672 * 10 / 4
# XCiT-S: 25 x 3 registers; one convolution takes 18 vector operations.
TOKENS, TAPS, VECTOR = shape(1, 196, 384), shape(3, 3, 1, 384), shape(384)
REGISTERS = 25 * 3
# ConvNeXt-T's first blocks: 392 registers of channels, 1,176 of the hidden layer, and a product of
# 3,136 rows with three tiles on either side of it.
MAP, HALF = shape(1, 56, 56, 96), shape(1, 28, 28, 192)
BLOCK = BlockParameters(
    *(shape(7, 7, 1, 96), *[shape(96)] * 3, shape(96, 384), shape(384), shape(384, 96)),
    *[shape(96)] * 2,
)
HALVING = HalvingParameters(shape(96), shape(96), shape(2, 2, 96, 192), shape(192))
PRODUCT = 3136 * 3 / 4


class KernelCostsTest(parameterized.TestCase):
    @sweeps.rows(
        (conv_stem.forward, [PLANES, *STEM], EPS, COLUMNS + 28 * (48 + 96 + 32 + 297)),
        (
            *(conv_stem.backward, [PLANES, KEPT, OUT, *STEM], EPS),
            COLUMNS + BACK + 28 * (48 + 144 + 24 + 64 + 477),
        ),
        (
            *(conv_stem.parameter_gradients, [PLANES, KEPT, OUT, *STEM], EPS),
            # Products with the pixels, and three for the columns; additions in 36 registers.
            COLUMNS + 28 * (48 + 144 + 24 + 477 + 48 + 3 * 48 + 36 * 5 / 4),
        ),
        (batch_stem.first, [PLANES, KERNELS[0]], {}, COLUMNS + 28 * (96 + 24 * 6 / 4)),
        (
            *(batch_stem.second, [PLANES, shape(1, 3, 48), *KERNELS], {}),
            COLUMNS + 28 * (144 + 150 + 12 * 8 / 4),  # and the sums
        ),
        (batch_stem.third, [KEPT, shape(1, 3, 96)], {"columns": 56}, 28 * (32 + 75)),
        (batch_stem.second_sums, [KEPT, OUT, ROWS[1]], {}, 28 * (24 + 12 * (37 / 4 + 2))),
    )
    def test_of_stems(self, function, operands, how, cycles):
        name, _, _, found = declared(function, *operands, **how)
        self.assertEqual(found, cycles, name)

    @sweeps.rows(
        ("first_sums", 0), ("backward", BACK + 28 * 64), ("parameter_gradients", 28 * (48 + 144))
    )
    def test_of_the_batch_stems_ways_back(self, name, more):
        """208 for products, and 36 x (36 / 4 + 2) = 396, in each; then what the others add."""
        rows = (shape(1, 5, 48), shape(1, 5, 96))
        operands = PLANES, KEPT, OUT, rows, KERNELS
        *_, cycles = declared(getattr(batch_stem, name), *operands)
        self.assertEqual(cycles, COLUMNS + 28 * (48 + 144 + 24 + 396) + more)

    @sweeps.rows(
        # Six heads of 197 tokens, each product 197 x 2 tiles / 4 units, or 64 x 4 for columns
        # of all queries, and a softmax of 150.
        (token_attention.forward, [shape(1, 197, 1152)], 1, 0),
        (token_attention.backward, [shape(1, 197, 1152), shape(1, 197, 384)], 4, 25 * 2 * 6 / 4),
    )
    def test_of_attention(self, function, operands, products, more):
        *_, powers, cycles = declared(function, *operands, heads=6, scale=0.1)
        self.assertEqual(powers, 6 * 197 * 197)
        products = products * 197 * 2 / 4 + 64 * 4 / 4
        self.assertEqual(cycles, 6 * (products + 25 * 2 * (8 / 4 + 1) + more))

    def test_of_talking_heads(self):
        """Eight heads of 48 channels meet ten tiles of 128, whose scores are mixed; each product of
        all channels takes 196 x 3 x 2 tiles / 4 units. Scores are 50 registers, tokens 75.
        """
        qkv, mix = shape(1, 196, 1152), (shape(8, 8), shape(8))
        *_, powers, forward = declared(talking_heads.forward, qkv, mix, mix)
        self.assertEqual(powers, 8 * 196 * 196)
        mixed = 10 * 98 + 50 * 2 * 8 * 8 / 4
        self.assertEqual(forward, mixed + 8 * (294 + 50 * (8 / 4 + 1) + 75 * 2 / 4))
        for needed, name in ((0, "talking_heads_gradient"), (1, "talking_heads_sums")):
            operands = qkv, TOKENS, mix, mix
            found, *_, cycles = declared(talking_heads.backward, *operands, needed=bool(needed))
            products = 3 + needed
            each = products * (294 + 75 * 2 / 4) + 50 * (14 / 4 + 1)
            self.assertEqual((found, cycles), (name, 2 * mixed + 8 * each))

    def test_of_channel_attention(self):
        """Eight heads of 48 channels as one; norms take 4 operations, and each further map 6."""
        qkv, temperature = shape(1, 196, 1152), shape(8, 1, 1)
        *_, forward = declared(channel_attention.forward, qkv, temperature)
        self.assertEqual(forward, 576 + 441 + 468 + REGISTERS * 4 / 4)
        operands = qkv, TOKENS, temperature
        *_, backward = declared(channel_attention.backward, *operands, needed=False)
        softmax, rest = 144 * (18 / 4 + 1), REGISTERS * (4 + 12) / 4
        self.assertEqual(backward, 2 * 576 + 3 * 441 + softmax + rest)

    def test_of_depthwise_norm(self):
        """56 rows of 7 registers, with 49 taps of two operations each."""
        vectors = [shape(96)] * 3
        *_, cycles = declared(depthwise_norm.forward, MAP, shape(7, 7, 1, 96), *vectors, **EPS)
        self.assertEqual(cycles, 56 * 7 * (2 * 49 / 4 + 20 / 4))
        beside = jax.ShapeDtypeStruct((1, 2, 56, 56), jnp.float32)
        operands = MAP, MAP, beside, shape(7, 7, 1, 96), vectors[0]
        *_, cycles = declared(depthwise_norm.backward, *operands, **EPS)
        self.assertEqual(cycles, 56 * 7 * (2 * 49 / 4 + 30 / 4))

    def test_of_a_convnext_block(self):
        def check(function, images, products, channels, hidden, powers):
            *_, found, cycles = declared(function, *images, None, BLOCK, **EPS)
            vectors = 392 * channels / 4 + 1176 * hidden / 4
            self.assertEqual((found, cycles), (3136 * 384 * powers, products * PRODUCT + vectors))

        check(convnext_block.forward, [MAP], 2, 98 + 28, 16, 1)
        check(convnext_block.backward, [None, MAP, MAP], 3, 143, 19, 2)
        check(convnext_block.backward, [MAP] * 3, 5, 5 * 49 + 60, 24, 2)

    def test_of_deformable_windows(self):
        """Two images in 128 lanes: 49 entries of 56 x 64 rows, weights of 28 registers of cells."""
        value, geometry = shape(2, 56, 56, 64), GridGeometry((56, 56), 4)
        operands = value, shape(2, 56, 56, 72), shape(2, 56, 56, 36)
        forward = (56 * 64 / 8 * 2 * 49 / 4 + 28 * 9 * 90 / 4) / 2
        for passes, more in ((1, ()), (2, (value,))):
            function = (deformable_windows.forward, deformable_windows.backward)[passes - 1]
            *_, cycles = declared(function, *operands, *more, geometry=geometry)
            self.assertEqual(cycles, passes * forward)

    @sweeps.rows(
        (norm_halving.forward, [MAP], {}, 1, 25),
        (norm_halving.backward, [MAP, HALF], {"needed": False}, 1, 45),
        (norm_halving.backward, [MAP, HALF], {"needed": True}, 2, 52),
    )
    def test_of_norm_halving(self, function, operands, how, products, operations):
        *_, cycles = declared(function, *operands, HALVING, **EPS, **how)
        self.assertEqual(cycles, products * 1792 + 392 * operations / 4)

    @sweeps.rows(
        (token_norm.forward, [VECTOR, VECTOR], {}, 16),
        (token_norm.backward, [[TOKENS, TOKENS], VECTOR], {"needed": False}, 27),
        (token_norm.backward, [[TOKENS], VECTOR], {"needed": True}, 34),
    )
    def test_of_a_norm_of_tokens(self, function, operands, how, operations):
        """25 groups of eight tokens, with two sums over the lanes in seven steps each."""
        *_, cycles = declared(function, TOKENS, *operands, **EPS, **how)
        self.assertEqual(cycles, REGISTERS * operations / 4 + 25 * 2 * 7)

    def test_of_the_exchange_between_neighbours(self):
        """Convolutions with 6 operations for the copies of a map."""
        how = {"width": 14}
        for function, operands, more, operations, powers in (
            (
                token_interaction.first,
                [TOKENS, VECTOR, VECTOR, TAPS, VECTOR],
                EPS,
                9 + 29 + 5 + 24,
                1,
            ),
            (token_interaction.second, [TOKENS, TOKENS, shape(1, 5, 384), TAPS], {}, 9 + 24, 0),
        ):
            *_, cycles = declared(function, *operands, **how, **more)
            self.assertEqual(cycles, REGISTERS * (operations / 4 + powers))
        operands = TOKENS, TOKENS, shape(1, 1, 384), TAPS
        *_, cycles = declared(token_interaction.sums, *operands, **how, needed=False)
        self.assertEqual(cycles, REGISTERS * (24 + 2 * 9 + 3) / 4)  # two sums for each entry
        operands = TOKENS, TOKENS, shape(1, 5, 384), (TAPS, TAPS), (VECTOR,) * 3
        for needed, more in ((False, 0), (True, 2 * 9 + 5)):
            gradient = token_interaction.gradient
            *_, cycles = declared(gradient, *operands, **how, **EPS, needed=needed)
            self.assertEqual(cycles, REGISTERS * ((3 * 24 + 90 + more) / 4 + 2))


class ScheduledTest(parameterized.TestCase):
    def test_of_a_chip(self):
        function = lambda qkv: token_attention.forward(qkv, heads=2, scale=0.1)  # noqa: E731
        cycles = {}
        for rows, chip in ((5, "TPU v5 lite"), (6, "TPU v9")):  # traced once for each shape
            with mock.patch.object(calls, "device_kind", lambda chip=chip: chip):
                program = jax.make_jaxpr(function)(shape(rows, 16, 192))
            (call,) = refresh_schedules.calls(program.jaxpr)
            cycles[chip] = int(call.params["metadata"]["cycles"])
        share = calls.SCHEDULED["TPU v5 lite"]["token_attention"]
        counted = 6 * 2 * (16 / 4 + 32 / 4 + 2 * (8 / 4 + 1))
        self.assertEqual(cycles, {"TPU v5 lite": int(counted * share * 5 / 6), "TPU v9": counted})

    @absltest.skipIf(importlib.util.find_spec("libtpu") is None, "pip install '.[test,tpu-aot]'")
    @parameterized.parameters(*refresh_schedules.CHIPS)
    @pytest.mark.slow
    def test_within_15_percent_of_the_final_bundles(self, chip):
        """Compilers of one series differ by a few percent; more asks for a look at the kernel."""
        if not importlib.metadata.version("libtpu").startswith("0.0.42."):
            self.skipTest("the table is of libtpu 0.0.42; tools/generate/refresh_schedules.py")
        tool = paths.ROOT / "tools/generate/refresh_schedules.py"
        done = subprocess.run(
            [sys.executable, tool, "--print", chip], capture_output=True, text=True, check=True
        )
        ((kind, ratios),) = json.loads(done.stdout).items()
        self.assertEqual(ratios.keys(), calls.SCHEDULED[kind].keys())
        for name, ratio in ratios.items():
            with self.subTest(name):
                self.assertBetween(ratio, 1 / 1.15, 1.15)
