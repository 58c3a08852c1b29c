"""Randomized smoothing: the L2 radius within which the class that wins under noise cannot change.

The smoothed network predicts the class that the base network predicts most often for the image
plus Gaussian noise of standard deviation sigma. A few draws choose the class, and many others bound
its share from below; a share above one half gives a radius.

Source: Cohen et al. 2019 (arXiv 1902.02918), Algorithm 1, CERTIFY, and the authors' public file
core.py; parity: tests/evaluation/engine/test_smoothing.py.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxrobust.evaluation.engine.engine import Engine
from jaxrobust.models.kernels.cpu.rewriting import fast_formulas
from jaxrobust.types import VERDICT_PRECISION, Array, check_length

ABSTAINS = -1  # the answer if no class is sure to win
_SHARED, _SPLIT = PartitionSpec(), PartitionSpec("slots")


class Smoothing(NamedTuple):
    """How images are certified."""

    sigma: float  # standard deviation of the noise, in units of pixels in [0, 1]
    draws: int = 100_000  # to bound the share of the class
    selection: int = 100  # earlier draws, to choose the class
    alpha: float = 0.001  # probability that a certificate is wrong

    @property
    def largest_radius(self) -> float:
        """Return the radius of an image whose draws all answer the same class."""
        return radius(self.draws, self)


class Certificate(NamedTuple):
    """The certificate of an image."""

    answer: int  # the smoothed network's class, or ABSTAINS
    radius: float  # L2 radius within which the answer does not change; 0 if it abstains
    votes: int  # draws that answer the chosen class
    unanswered: int  # draws with logits that are not finite, which count against every class


def check(smoothing: Smoothing) -> None:
    """Raise if the settings cannot certify any image."""
    sigma, draws, selection, alpha = smoothing
    if not 0 < sigma < math.inf:
        raise ValueError(f"sigma={sigma:g} must be above 0, such as 0.25")
    check_length("sigma", sigma)
    if not 0 < alpha < 0.5:
        raise ValueError(f"alpha={alpha:g} must be between 0 and 0.5, such as 0.001")
    if selection < 1:
        raise ValueError(f"{selection} draws cannot choose a class; give at least 1")
    least = math.floor(math.log(alpha) / math.log(0.5)) + 1
    if draws < least:
        raise ValueError(
            f"{draws} draws are too few to certify any image at alpha={alpha:g}; give at least "
            f"{least}, such as 100,000"
        )


def lower_bound(votes: int, smoothing: Smoothing) -> float:
    """Bound the share of a class from below, by Clopper and Pearson at 1 - alpha, one-sided."""
    from scipy.special import betaincinv  # JAX depends on SciPy; its import takes 0.1 s

    return float(betaincinv(votes, smoothing.draws - votes + 1, smoothing.alpha)) if votes else 0.0


def radius(votes: int, smoothing: Smoothing) -> float:
    """Compute the L2 radius of a class with `votes` votes; 0 if it is not sure to win."""
    from scipy.special import ndtri

    share = lower_bound(votes, smoothing)
    return smoothing.sigma * float(ndtri(share)) if share > 0.5 else 0.0


def certify(
    engine: Engine, image: np.ndarray, number: int, smoothing: Smoothing, *, seed: int
) -> Certificate:
    """Count an image's answers under noise, and certify it.

    Args:
      engine: of a deterministic network, after `engine.trace`.
      image: f32[H,W,C] in [0, 1]; noise takes it out of that range, as in the source.
      number: the image's id. Draws depend only on it and the seed, not on the number of devices or
        the batch size.
    Returns:
      `Certificate`. Noisy images are evaluated in batches of f32[engine.slots,H,W,C].
    """
    run = functools.partial(counts, engine, image, number, sigma=smoothing.sigma, seed=seed)
    end = smoothing.selection + smoothing.draws
    both = [run(0, smoothing.selection), run(smoothing.selection, end)]
    selection, estimation = (np.asarray(count).sum(axis=0) for count in both)  # waits for both
    chosen = int(selection[:-1].argmax())
    votes = int(estimation[chosen])
    return Certificate(
        answer=chosen if lower_bound(votes, smoothing) >= 0.5 else ABSTAINS,
        radius=radius(votes, smoothing),
        votes=votes,
        unanswered=int(estimation[-1]),
    )


def counts(
    engine: Engine, image: np.ndarray, number: int, first: int, end: int, *, sigma: float, seed: int
) -> Array:
    """Start counting the answers of draws `first` to `end`, i32[devices, K + 1]; do not wait."""
    (traced,) = engine.traces
    program = engine.compiled(_count_program, engine.mesh, traced.classes)
    sharding = NamedSharding(engine.mesh, _SPLIT)
    key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), number)
    root = np.asarray(jax.random.key_data(key))
    settings = (jnp.asarray(image), root, np.float32(sigma), np.uint32(end))
    total = jax.device_put(np.zeros((engine.mesh.size, traced.classes + 1), np.int32), sharding)
    for start in range(first, end, engine.slots):
        draws = np.arange(start, start + engine.slots, dtype=np.uint32)
        drawn = jax.device_put(draws, sharding)
        total = program(engine.logits_fn, *settings, total, drawn)
    return total


def _count_program(mesh: Mesh, classes: int) -> Any:
    """Make (network, image, root, sigma, end, total, draws) -> total, on all devices."""
    # Votes are not confirmed, so convolutions do not use tiles, which round more than products.
    on_cpu = mesh.devices.flat[0].platform == "cpu"

    def count(
        logits_fn: Any, image: Array, root: Array, sigma: Array, end: Array, *rows: Array
    ) -> Array:
        total, draws = rows
        key = jax.random.wrap_key_data(root, impl="threefry2x32")
        keys = jax.vmap(functools.partial(jax.random.fold_in, key))(draws)
        noise = jax.vmap(lambda key: jax.random.normal(key, image.shape, jnp.float32))(keys)
        noisy = image[None] + sigma * noise
        with jax.default_matmul_precision(VERDICT_PRECISION):
            logits = (fast_formulas(logits_fn) if on_cpu else logits_fn)(noisy)
        finite = jnp.isfinite(logits).all(axis=1)
        answers = jnp.where(finite, jnp.argmax(logits, axis=1), classes)
        counted = jnp.where(draws < end, answers, classes + 1)  # surplus draws of the last call
        votes = jax.nn.one_hot(counted, classes + 1, dtype=jnp.int32)
        return total + jnp.sum(votes, axis=0, keepdims=True, dtype=jnp.int32)

    specs = (*([_SHARED] * 5), _SPLIT, _SPLIT)
    spread = jax.shard_map(count, mesh=mesh, in_specs=specs, out_specs=_SPLIT, check_vma=False)
    return jax.jit(spread, donate_argnums=5)
