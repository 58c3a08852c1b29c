"""The first figure of an evaluation: clean accuracy, before anything of the attacks compiles."""

import jax
import numpy as np

from jaxrobust.data import Prepared
from jaxrobust.evaluation.network import checks
from jaxrobust.runtime.devices import compilation
from jaxrobust.runtime.text.progress import say
from jaxrobust.types import VERDICT_PRECISION, Classifier, Weights

_AT_ONCE = 512  # images of one program
# It runs once: what XLA leaves undone costs less than doing it (CPU, quickstart: 0.9 s, not 2.1 s).
_FAST = {"xla_backend_optimization_level": 0}


def clean(net: Classifier, weights: Weights, images: Prepared) -> float:
    """Compute the share of images, f32[N,H,W,C], whose label has the largest of finite logits.

    One small program of up to 512 images at once, announced with the seconds that it took the last
    time on this machine, unless these were few.
    """
    labels, right = images.labels(), np.zeros(len(images), bool)
    forward = jax.jit(
        lambda params, stats, points: net.apply(params, stats, points)[0], compiler_options=_FAST
    )
    for start in range(0, len(images), _AT_ONCE):
        part = np.arange(start, min(start + _AT_ONCE, len(images)))
        given = (weights.params, weights.stats, images[part])
        name = compilation.program("clean accuracy", given)
        first = "some seconds, the first time"
        waiting = compilation.waiting("clean accuracy: compiling", name, say, unknown=first)
        with waiting, jax.default_matmul_precision(VERDICT_PRECISION):
            logits = jax.device_get(forward(*given))
        right[part] = checks.is_right(logits, labels[part])
    return float(right.mean())
