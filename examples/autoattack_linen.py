"""AutoAttack on a network in Flax Linen."""

# %% [markdown]
# First, train any classifier; you already have yours.

# %%
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen

from jaxrobust import data, evaluation


class Net(linen.Module):
    """Two convolutions with batch norm."""

    @linen.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Return logits f[B,10]."""
        for width in (16, 32):
            x = linen.Conv(width, (3, 3), strides=2, use_bias=False)(x)
            x = linen.relu(linen.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        return linen.Dense(10)(x.reshape(x.shape[0], -1))


net = Net()
images, labels, *_ = data.load("digits", split="train")
variables = net.init(jax.random.key(0), images[:1], train=False)
params, stats = variables["params"], variables["batch_stats"]
tx = optax.adam(3e-3)
state = tx.init(params)


@jax.jit
def step(params, stats, state, images, labels):
    """Return params, stats and the optimizer's state after one update."""

    def loss(params):
        given = {"params": params, "batch_stats": stats}
        logits, moved = net.apply(given, images, train=True, mutable=["batch_stats"])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean(), moved["batch_stats"]

    gradients, moved = jax.grad(loss, has_aux=True)(params)
    updates, state = tx.update(gradients, state)
    return optax.apply_updates(params, updates), moved, state


for batch in np.random.default_rng(0).integers(0, len(images), (300, 128)):
    params, stats, state = step(params, stats, state, images[batch], jnp.asarray(labels[batch]))

# %% [markdown]
# AutoAttack only needs a function from images in [0, 1] to logits, in evaluation mode. The arrays
# in the `Partial` (here the variables) can later come from another checkpoint without compiling
# again; `train=False` is part of the program.

# %%
variables = {"params": params, "batch_stats": stats}
logits_fn = jax.tree_util.Partial(net.apply, variables, train=False)
images, labels, *_ = data.load("digits", split="test", n=128)
result = evaluation.autoattack(logits_fn, images, labels, norm="linf", epsilon=0.1)
result.save("results.jsonl", model="Linen, 2 convolutions", dataset="digits", split="test[:128]")
print(f"clean {result.clean.mean():.1%}, robust {result.robust.mean():.1%}, {result.flags}")

# %% [markdown]
# On two CPU cores, it prints:
#
#     clean 99.2%, robust 39.1%, {}
