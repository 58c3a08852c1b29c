"""`models/kernels/attention.py` against the same formulas in PyTorch, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxrobust.models.kernels import attention, channel_attention
from jaxrobust.models.kernels.talking_heads import talking_heads
from tests.support import sweeps

try:
    import torch
except ImportError:
    torch = None

BATCH, TOKENS, HEADS, DEPTH = 4, 7, 3, 5
SHAPE = (BATCH, TOKENS, HEADS, DEPTH)
MIX = [(HEADS, HEADS), (HEADS,)]
LOGITS = (BATCH, HEADS, TOKENS, TOKENS)


def _talking(q, k, v, *mixes):
    qkv = jnp.concatenate([x.reshape(*x.shape[:2], -1) for x in (q, k, v)], 2)
    return talking_heads(qkv, mixes[:2], mixes[2:])


def _biased(q, k, v, bias):
    return attention.attention(q, k, v, bias=bias)


def _torch_attention(q, k, v, bias=None):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if bias is not None and bias.ndim == 4 and bias.shape[0] > 1:
        bias = bias.repeat(q.shape[0] // bias.shape[0], 1, 1, 1)
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    return out.transpose(1, 2).flatten(2)


def _torch_talking(q, k, v, kernel, bias, kernel_after, bias_after):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    linear = torch.nn.functional.linear
    logits = (q * q.shape[-1] ** -0.5) @ k.transpose(2, 3)
    weights = linear(logits.permute(0, 2, 3, 1), kernel.T, bias).softmax(2)
    weights = linear(weights, kernel_after.T, bias_after).permute(0, 3, 1, 2)
    return (weights @ v).transpose(1, 2).flatten(2)


def _torch_cross(q, k, v, temperature):
    q, k, v = (x.permute(0, 2, 3, 1) for x in (q, k, v))
    q, k = (torch.nn.functional.normalize(x, dim=-1) for x in (q, k))
    weights = (q @ k.transpose(2, 3) * temperature).softmax(-1)
    return (weights @ v).permute(0, 3, 1, 2).flatten(2)


# name, function, the same in PyTorch, shapes of the operands
FUNCTIONS = [
    ("attention", attention.attention, _torch_attention, [SHAPE] * 3),
    ("one_query", attention.attention, _torch_attention, [(BATCH, 1, HEADS, DEPTH), SHAPE, SHAPE]),
    ("bias", _biased, _torch_attention, [SHAPE] * 3 + [LOGITS[1:]]),
    ("bias_of_each", _biased, _torch_attention, [SHAPE] * 3 + [LOGITS]),
    ("bias_repeated", _biased, _torch_attention, [SHAPE] * 3 + [(2, 1, *LOGITS[2:])]),
    ("bias_of_keys", _biased, _torch_attention, [SHAPE] * 3 + [(BATCH, 1, 1, TOKENS)]),
    ("talking_heads", _talking, _torch_talking, [SHAPE] * 3 + MIX * 2),
    ("cross", channel_attention.cross_covariance, _torch_cross, [SHAPE] * 3 + [(HEADS, 1, 1)]),
]


def _normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def _vjp(function, operands, g):
    """Value and gradients of `function`, compiled; everything in one list."""

    def run(*operands):
        value, pull = jax.vjp(function, *operands)
        return value, *pull(g)

    return jax.jit(run)(*operands)


def _torch_vjp(function, operands, g):
    tensors = [torch.tensor(np.asarray(a), requires_grad=True) for a in operands]
    value = function(*tensors)
    gradients = torch.autograd.grad(value, tensors, torch.tensor(np.asarray(g)))
    return [value.detach().numpy(), *(gradient.numpy() for gradient in gradients)]


def _error(result, reference):
    reference = np.asarray(reference, np.float64)
    assert result.shape == reference.shape, (result.shape, reference.shape)
    # Operands are of order one; the gradient of the first mix's bias is a sum that is zero.
    return np.abs(np.asarray(result, np.float64) - reference).max() / max(
        np.abs(reference).max(), 1
    )


class AttentionTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        for flag, value in (("dtype", "strict"), ("rank", "raise")):
            name = f"jax_numpy_{flag}_promotion"
            self.addCleanup(jax.config.update, name, getattr(jax.config, name))
            jax.config.update(name, value)

    @parameterized.named_parameters(FUNCTIONS)
    @absltest.skipIf(torch is None, "pip install -e '.[test,parity]'")
    def test_torch(self, function, reference, shapes):
        operands = [_normal(seed, *shape) for seed, shape in enumerate(shapes)]
        g = _normal(9, *shapes[0][:2], HEADS * DEPTH)
        expected = _torch_vjp(reference, operands, g)
        with jax.enable_x64(True):
            wide = [jnp.asarray(a) for a in operands]
            results = _vjp(function, wide, jnp.asarray(g))
        self.assertLess(max(map(_error, results, expected)), 1e-13)  # rounding
        narrow = [a.astype(np.float32) for a in operands]
        theirs = _torch_vjp(reference, narrow, g.astype(np.float32))
        results = _vjp(function, map(jnp.asarray, narrow), jnp.asarray(g, np.float32))
        for result, their, exact in zip(results, theirs, expected, strict=True):
            self.assertEqual(result.dtype, np.float32)
            self.assertLess(_error(result, exact), max(2 * _error(their, exact), 1e-6))

    @sweeps.fast(1, 7)
    @parameterized.product(case=FUNCTIONS, dtype=(jnp.bfloat16, jnp.float16))
    def test_half_precision(self, case, dtype):
        _, function, _, shapes = case
        operands = [_normal(seed, *shape) for seed, shape in enumerate(shapes)]
        g = _normal(9, *shapes[0][:2], HEADS * DEPTH)
        with jax.enable_x64(True):
            wide = [jnp.asarray(np.asarray(jnp.asarray(a, dtype), np.float64)) for a in operands]
            expected = _vjp(function, wide, jnp.asarray(g))
        results = _vjp(function, [jnp.asarray(a, dtype) for a in operands], jnp.asarray(g, dtype))
        self.assertEqual({r.dtype for r in results}, {jnp.dtype(dtype)})
        # Probabilities and their gradients are rounded to 8 bits (11) before the products.
        expected = [
            e if np.abs(e).max() > 1e-12 else r for e, r in zip(expected, results, strict=True)
        ]
        self.assertLess(max(map(_error, results, expected)), 8 * jnp.finfo(dtype).eps)

    def test_bias_that_does_not_divide_the_batch(self):
        q = jnp.zeros(SHAPE)
        with self.assertRaisesRegex(ValueError, "bias for 3 .* batch of 4"):
            attention.attention(q, q, q, bias=jnp.zeros((3, 1, 1, TOKENS)))

    @absltest.skipIf(torch is None, "pip install -e '.[test,parity]'")
    def test_cross_covariance_of_a_channel_without_length(self):
        operands = [_normal(seed, *SHAPE) for seed in range(3)] + [_normal(3, HEADS, 1, 1)]
        operands[0][0, :, 1, 2] = 0  # norm below 1e-12: the gradient is g / 1e-12
        operands[1][1, :, 0, 0] = 0
        operands[1][2, :, 2, 4] *= 1e-14
        g = _normal(9, BATCH, TOKENS, HEADS * DEPTH)
        expected = _torch_vjp(_torch_cross, operands, g)
        with jax.enable_x64(True):
            wide = [jnp.asarray(a) for a in operands]
            results = _vjp(channel_attention.cross_covariance, wide, jnp.asarray(g))
        for result, reference in zip(results, expected, strict=True):
            large = np.abs(reference) > 1e6
            for part in (large, ~large):
                result_part, reference_part = (np.where(part, a, 0) for a in (result, reference))
                self.assertLess(_error(result_part, reference_part), 1e-13)
        self.assertTrue(np.any(np.abs(expected[1]) > 1e6), "no gradient through the zero row")

    @parameterized.named_parameters(FUNCTIONS)
    def test_one_device_equals_eight(self, function, _, shapes):
        if jax.device_count() < 8:
            self.skipTest("needs 8 devices")
        shapes = [(8, *s[1:]) if len(s) == 4 and s[0] == BATCH else s for s in shapes]
        operands = [jnp.asarray(_normal(seed, *s), jnp.float32) for seed, s in enumerate(shapes)]
        g = jnp.asarray(_normal(9, *shapes[0][:2], HEADS * DEPTH), jnp.float32)
        mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
        split, whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
        places = [split if a.shape[0] == 8 else whole for a in operands]
        placed = [jax.device_put(a, place) for a, place in zip(operands, places, strict=True)]
        results = _vjp(function, placed, jax.device_put(g, split))
        for result, single in zip(results, _vjp(function, operands, g), strict=True):
            self.assertLess(_error(result, single), 3e-6)  # sums in another order

    @sweeps.rows("tpu", "cuda")
    def test_no_walls_elsewhere(self, platform):
        q = jnp.ones(SHAPE)
        gradient = jax.jit(jax.grad(lambda q: attention.attention(q, q, q).sum()))
        text = gradient.trace(q).lower(lowering_platforms=(platform,)).as_text()
        self.assertIn("stablehlo.dot_general", text)
        self.assertNotIn("inlineable", text)
