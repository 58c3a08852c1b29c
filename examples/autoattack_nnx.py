"""AutoAttack on a network in Flax NNX."""

# %% [markdown]
# First, train any classifier; you already have yours.

# %%
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jaxrobust import data, evaluation


class Net(nnx.Module):
    """Two convolutions with batch norm and dropout."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.one = nnx.Conv(1, 16, (3, 3), strides=2, rngs=rngs)
        self.two = nnx.Conv(16, 32, (3, 3), strides=2, rngs=rngs)
        self.norm = nnx.BatchNorm(16, momentum=0.9, rngs=rngs)
        self.drop = nnx.Dropout(0.1, rngs=rngs)
        self.head = nnx.Linear(128, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return logits f[B,10]."""
        x = nnx.relu(self.two(nnx.relu(self.norm(self.one(x)))))
        return self.head(self.drop(x.reshape(x.shape[0], -1)))


net = Net(nnx.Rngs(0))
optimizer = nnx.Optimizer(net, optax.adam(3e-3), wrt=nnx.Param)
images, labels, *_ = data.load("digits", split="train")


@nnx.jit
def step(net, optimizer, images, labels):
    """Update the network in place."""

    def loss(net):
        logits = net(images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    optimizer.update(net, nnx.grad(loss)(net))


for batch in np.random.default_rng(0).integers(0, len(images), (300, 128)):
    step(net, optimizer, jnp.asarray(images[batch]), jnp.asarray(labels[batch]))

# %% [markdown]
# AutoAttack only needs a function from images in [0, 1] to logits, in evaluation mode. A network in
# training mode is refused or gets the flag `batch-dependent`.

# %%
evaluated = nnx.view(net, use_running_average=True, deterministic=True)
logits_fn = jax.tree_util.Partial(lambda net, x: net(x), evaluated)
images, labels, *_ = data.load("digits", split="test", n=128)
result = evaluation.autoattack(logits_fn, images, labels, norm="linf", epsilon=0.1)
result.save("results.jsonl", model="NNX, 2 convolutions", dataset="digits", split="test[:128]")
print(f"clean {result.clean.mean():.1%}, robust {result.robust.mean():.1%}, {result.flags}")

# %% [markdown]
# On two CPU cores, it prints:
#
#     clean 99.2%, robust 46.9%, {}
