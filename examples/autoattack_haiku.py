"""AutoAttack on a network in Haiku."""

# %% [markdown]
# First, train any classifier; you already have yours. (`pip install dm-haiku`)

# %%
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxrobust import data, evaluation


def forward(x: jax.Array, is_training: bool) -> jax.Array:
    """Return logits f[B,10]: two convolutions with batch norm."""
    for width in (16, 32):
        x = hk.Conv2D(width, 3, stride=2, with_bias=False)(x)
        x = jax.nn.relu(hk.BatchNorm(True, True, decay_rate=0.9)(x, is_training))
    return hk.Linear(10)(x.reshape(x.shape[0], -1))


net = hk.without_apply_rng(hk.transform_with_state(forward))
images, labels, *_ = data.load("digits", split="train")
params, moments = net.init(jax.random.key(0), jnp.asarray(images[:1]), is_training=True)
tx = optax.adam(3e-3)
state = tx.init(params)


@jax.jit
def step(params, moments, state, images, labels):
    """Return params, running moments and the optimizer's state after one update."""

    def loss(params):
        logits, moved = net.apply(params, moments, images, is_training=True)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), moved

    gradients, moved = jax.grad(loss, has_aux=True)(params)
    updates, state = tx.update(gradients, state)
    return optax.apply_updates(params, updates), moved, state


for batch in np.random.default_rng(0).integers(0, len(images), (300, 128)):
    params, moments, state = step(params, moments, state, images[batch], jnp.asarray(labels[batch]))

# %% [markdown]
# AutoAttack only needs a function from images in [0, 1] to logits and nothing else, in evaluation
# mode.

# %%
logits_fn = jax.tree_util.Partial(
    lambda params, moments, x: net.apply(params, moments, x, is_training=False)[0], params, moments
)
images, labels, *_ = data.load("digits", split="test", n=128)
result = evaluation.autoattack(logits_fn, images, labels, norm="linf", epsilon=0.1)
result.save("results.jsonl", model="Haiku, 2 convolutions", dataset="digits", split="test[:128]")
print(f"clean {result.clean.mean():.1%}, robust {result.robust.mean():.1%}, {result.flags}")

# %% [markdown]
# On two CPU cores, it prints:
#
#     clean 99.2%, robust 34.4%, {}
