"""Passes of a module in PyTorch next to those of its program, with changes of the weights."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import torch

from jaxrobust.pytorch import trainable as trained

IMAGE = (4, 4, 3)


def channels_first(x: np.ndarray):
    return torch.from_numpy(x.transpose(0, 3, 1, 2).copy())


def images(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((count, *IMAGE), np.float32)


def largest_difference(module, network, updates: int = 2) -> float:
    """How far logits and state are apart in both modes, over passes with changes of weights."""
    net = trained.classifier(network)
    params, stats = net.init(jax.random.key(0))
    passes = {
        mode: jax.jit(lambda p, s, x, mode=mode: net.apply(p, s, x, train=mode))
        for mode in (True, False)
    }
    worst = 0.0
    for update, mode in itertools.product(range(updates), (True, False)):
        module.train(mode)
        x = images(3, update)
        with torch.no_grad():
            theirs = module(channels_first(x)).numpy()
        logits, stats = passes[mode](params, stats, x)
        worst = max(worst, np.abs(logits - theirs).max() / np.abs(theirs).max())
        if mode:
            continue
        step = {name: 0.3 * np.abs(np.cos(np.arange(p.size))) for name, p in params.items()}
        params = {name: p + step[name].reshape(p.shape) for name, p in params.items()}
        params = {name: jnp.asarray(p, jnp.float32) for name, p in params.items()}
        for name, parameter in module.named_parameters():
            if name in params:
                parameter.data = torch.from_numpy(np.array(params[name]))
    state = trained.state_dict(network, {**params, **stats})
    apart = (np.abs(state[name] - t.numpy()).max() for name, t in module.state_dict().items())
    return float(max(worst, *apart))
