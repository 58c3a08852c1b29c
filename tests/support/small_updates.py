"""Updates of a small network in float64, as the train step makes them, and in PyTorch."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxrobust.config import phase
from jaxrobust.models.kernels import batch_norms, layers
from jaxrobust.training.update import averages, memory, objectives, optim, step
from jaxrobust.types import Batch, Classifier

EPSILON, STEP = 8 / 255, 4 / 255
SHAPES = {  # as PyTorch has them
    **{"conv1.weight": (4, 3, 3, 3), "bn.weight": (4,), "bn.bias": (4,)},
    **{"conv2.weight": (6, 4, 3, 3), "fc.weight": (10, 6), "fc.bias": (10,)},
}


def weights() -> dict[str, np.ndarray]:
    """f64 draws, and the statistics of the batch norm."""
    random = np.random.default_rng(3)
    drawn = {k: 0.4 * random.standard_normal(shape) for k, shape in SHAPES.items()}
    drawn["bn.weight"] = 1 + 0.1 * drawn["bn.weight"]
    return drawn | {"bn.running_mean": np.zeros(4), "bn.running_var": np.ones(4)}


def update_data(i: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images f64[8,6,6,3], labels, and where the attack starts, of update i."""
    random = np.random.default_rng([5, i])
    images = random.random((8, 6, 6, 3))
    return images, random.integers(0, 10, 8), images + 0.01 * random.standard_normal(images.shape)


def ours(array: np.ndarray) -> jax.Array:
    axes = {4: (2, 3, 1, 0), 2: (1, 0)}.get(array.ndim)
    return jnp.asarray(array.transpose(axes) if axes else array)


def conv(x, kernel, stride):
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), [(1, 1)] * 2, dimension_numbers=numbers
    )


def network(norm: bool = True) -> Classifier:
    """Convolution, batch norm, SiLU, convolution, SiLU, mean, linear."""

    def apply(params, stats, images, *, train=False, key=None):
        x, moved = conv(images, params["conv1.weight"], 1), dict(stats)
        affine = params["bn.weight"], params["bn.bias"]
        names = ("bn.running_mean", "bn.running_var")
        if norm and train:
            x, *new = batch_norms.batch_norm_train(x, *affine)
            moved |= {k: 0.9 * stats[k] + 0.1 * v for k, v in zip(names, new, strict=True)}
        elif norm:
            x = batch_norms.batch_norm(x, *affine, *(stats[k] for k in names))
        x = jax.nn.silu(conv(jax.nn.silu(x), params["conv2.weight"], 2)).mean((1, 2))
        return layers.linear(x, params["fc.weight"], params["fc.bias"]), moved

    return Classifier(lambda key: ({}, {}), apply)


def torch_step(torch, sgd, loss, learned, number):
    """Make PyTorch's update of that number, as `updates` does, at ten times less from the 13th and
    again from the 17th; return the norm of its gradient before it is clipped."""
    loss.backward()
    for group in sgd.param_groups:
        group["lr"] = 0.05 * 0.1 ** ((number >= 12) + (number >= 16))
    norm = torch.nn.utils.clip_grad_norm_(learned.values(), 5.0)
    sgd.step()
    return norm.item()


def attack(logits_fn, keys, images, targets, epsilon_share):
    """Two steps of sign ascent on TRADES' divergence, from the point that `epsilon_share` is."""

    def divergence(x):
        return -(targets * jax.nn.log_softmax(logits_fn(x))).sum()

    x = epsilon_share
    for _ in range(2):
        x = x + STEP * jnp.sign(jax.grad(divergence)(x))
        x = x.clip(images - EPSILON, images + EPSILON).clip(0, 1)
    return x


def step_of(p, optimizer, gradient_parts, remembered=memory.NO_MEMORY, steps_per_epoch=1):
    """Compile the train step of a phase on one device, without augmentation; where the share of the
    radius stands, the attack gets its first points.
    """

    def device_gradients(params, stats, attack_options, batch, keys):
        grads, stats, metrics = step.adversarial_gradients(
            params, stats, batch, keys, attack_options, parts=gradient_parts
        )
        return grads, (stats, metrics)

    parts = step.StepParts(
        augment=lambda key, batch: batch,
        attack_options=lambda state, control: {"epsilon_share": control.epsilon_share},
        device_gradients=device_gradients,
        optimizer=optimizer,
        update_ema=averages.averaging(p, "train", steps_per_epoch=steps_per_epoch),
        update_batch_stats=averages.running_statistics(p, "train"),
        memory=remembered,
    )
    return jax.jit(partial(step.train_step, parts=parts))


def updates(recipe: dict, count: int, steps_per_epoch: int = 1, attack=attack, section=None):
    """Yield state and metrics of updates of the train step itself, of a phase of a recipe."""
    p = phase(**recipe)
    _, tx = optim.of_phase(p, "train", decay_mask="not-bias", steps_per_epoch=1)
    row = objectives.named(p.objective)
    objective, net = row.make(p, section), network()
    remembered = row.remembers(10, steps_per_epoch) if row.remembers else memory.NO_MEMORY
    optimizer = memory.remembering(tx, remembered)
    if row.helped:
        net = row.helped(net)
    train_step = step_of(p, optimizer, step.GradientParts(net, attack, objective), remembered)
    params = {k: ours(a) for k, a in weights().items()}
    stats = {k: params.pop(k) for k in list(params) if "running" in k}
    opt_state = optimizer.init(params, stats)
    average = params | stats
    state = step.TrainState(jnp.int32(0), params, stats, average, opt_state, jax.random.key(0))
    for i in range(count):
        images, labels, start = map(jnp.asarray, update_data(i))
        control = step.Control(jnp.zeros(1, jnp.int32), jnp.float64(1), start)
        state, metrics = train_step(state, Batch(images, labels.astype(jnp.int32)), control)
        yield state, metrics


def torch_forward(torch: Any, arrays: dict[str, Any]) -> Callable[..., Any]:
    """Make PyTorch's forward pass, f(weights, x, train, momentum); it moves the statistics."""
    from torch.nn import functional as f

    def forward(own, x, train, momentum=0.1):
        state = [arrays["bn.running_mean"], arrays["bn.running_var"]]
        state = state if momentum else [a.clone() for a in state]
        x = f.conv2d(x, own["conv1.weight"], padding=1)
        affine = own["bn.weight"], own["bn.bias"]
        x = f.batch_norm(x, *state, *affine, training=train, momentum=momentum)
        x = f.silu(f.conv2d(f.silu(x), own["conv2.weight"], stride=2, padding=1)).mean((2, 3))
        return f.linear(x, own["fc.weight"], own["fc.bias"])

    return forward


def torch_point(torch: Any, look: Callable[[Any], Any], x: Any, start: Any) -> Any:
    """Attack as `attack` does, in PyTorch; `look`: the network as it evaluates."""
    from torch.nn import functional as f

    aim, point = look(x).softmax(1).detach(), start
    for _ in range(2):
        point = point.detach().requires_grad_()
        value = f.kl_div(look(point).log_softmax(1), aim, reduction="sum")
        (slope,) = torch.autograd.grad(value, point)
        point = (point.detach() + STEP * slope.sign()).clamp(x - EPSILON, x + EPSILON)
        point = point.clamp(0, 1)
    return point.detach()
