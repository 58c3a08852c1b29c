"""Self-attention by cuDNN, directly on the product that makes queries, keys and values.

Scores stay on the chip, and the backward pass computes them again. 128 images of 197 tokens in
bfloat16 on an H200, ViT-S and ViT-B: the value takes 0.14 and 0.20 ms, by XLA's operations 0.23 and
0.43; value and gradient 0.39 and 0.75, by XLA's 0.55 and 1.07, in PyTorch 0.53 and 0.81. Both ways
are 0.3% of the standard deviation apart, which is bfloat16's rounding. cuDNN may add the parts of
a gradient up in another order in each run; `XLA_FLAGS=--xla_gpu_deterministic_ops=true` forbids it.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from jaxrobust.models.kernels.layers import linear

Array = jax.Array
WIDTH = 128  # maximum width of a head


def refused(dtype: jnp.dtype, width: int) -> str | None:
    """Say why cuDNN does not support heads of this type and width; None: it does."""
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"{dtype} is neither bfloat16 nor float16"
    if width % 8 or width > WIDTH:
        return f"the head width {width} is not a multiple of 8 up to {WIDTH}"
    return None


def applies(qkv: Array, heads: int) -> bool:
    """Return whether cuDNN is available and accepts this attention."""
    return refused(qkv.dtype, qkv.shape[2] // 3 // heads) is None and _on_nvidia()


@functools.cache
def _on_nvidia() -> bool:
    """Return whether JAX runs on an NVIDIA GPU; without one it cannot trace cuDNN's operations."""
    if jax.default_backend() != "gpu":
        return False
    return "cuda" in jax.local_devices()[0].client.platform_version.lower()


def forward(qkv: Array, heads: int, *, scale: float, by: str = "cudnn") -> Array:
    """Compute the attention of f[B,N,3*h*d] as f[B,N,h*d]; `by` is JAX's name for a library."""
    images, tokens, _ = qkv.shape
    # cuDNN has gradients only for even numbers of tokens; an added token has no weight.
    odd = tokens % 2
    padded = jnp.pad(qkv, ((0, 0), (0, odd), (0, 0))).reshape(images, tokens + odd, 3, heads, -1)
    lengths = jnp.full(images, tokens, jnp.int32) if odd else None
    out = jax.nn.dot_product_attention(
        *(padded[:, :, i] for i in range(3)),
        scale=scale,
        query_seq_lengths=lengths,
        key_value_seq_lengths=lengths,
        implementation=by,  # type: ignore[call-overload]
    )
    return out.reshape(images, tokens + odd, -1)[:, :tokens]


def backward(qkv: Array, g: Array, heads: int, *, scale: float, by: str = "cudnn") -> Array:
    """Compute the gradient of `forward` for f[B,N,3*h*d] from its result's gradient."""
    value = functools.partial(forward, heads=heads, scale=scale, by=by)
    return jax.vjp(value, qkv)[1](g)[0]


@jax.custom_vjp
def _thirds(x: Array, kernel: Array, bias: Array) -> list[tuple[Array, Array, Array]]:
    """Repeat `x` for three products with a third of the kernel and of the bias each.

    Behind a barrier, XLA does not merge the products and cut the result again, and computes each
    with its bias as one kernel.
    """
    copies, biases = lax.optimization_barrier(([x, x, x], jnp.split(bias, 3)))
    return [*zip(copies, jnp.split(kernel, 3, 1), biases, strict=True)]


def _thirds_backward(_, gradients):
    to_x, to_kernel, to_bias = zip(*gradients, strict=True)
    return sum(to_x[1:], to_x[0]), jnp.concatenate(to_kernel, 1), jnp.concatenate(to_bias)


_thirds.defvjp(lambda *operands: (_thirds(*operands), None), _thirds_backward)


def of_tokens(x: Array, kernel: Array, bias: Array, heads: int, *, tokens: int) -> Array:
    """Compute the self-attention of the first `tokens` of f[B,N,D] as f[B,N,D].

    `kernel` f[D,3*D] and `bias` make queries, keys and values, as three products: then nothing is
    cut, padded or joined around cuDNN's calls, and the backward pass reads the statistics that the
    forward pass has stored.
    """
    lengths = jnp.full(len(x), tokens, jnp.int32) if tokens < x.shape[1] else None
    products = (linear(*operands) for operands in _thirds(x, kernel, bias))
    out = jax.nn.dot_product_attention(
        *(part.reshape(*x.shape[:2], heads, -1) for part in products),
        query_seq_lengths=lengths,
        key_value_seq_lengths=lengths,
        implementation="cudnn" if _on_nvidia() else "xla",
    )
    return out.reshape(x.shape)
