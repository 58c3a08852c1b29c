"""Your own loss, which the attack in adversarial training maximizes.

jaxrobust train examples/my_config.py --workdir runs/margin \
    --config.attack.loss=examples/my_losses.py:margin
"""

import jax
import jax.numpy as jnp


def margin(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    """Return f[B], a smooth margin: the log-sum-exp of the other logits minus the label's."""
    is_label = jax.nn.one_hot(targets, outputs.shape[1], dtype=bool)
    others = jax.nn.logsumexp(jnp.where(is_label, -jnp.inf, outputs), axis=1)
    return others - jnp.where(is_label, outputs, 0).sum(axis=1)
