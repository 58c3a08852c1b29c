"""Images made from noise by targeted PGD: a network's idea of a class.

The thesis' section 4.3.2 and appendix A.2: 100 linf steps of 0.225 towards a random class, bounded
only by [0, 1]. They start from noise that a random start of radius 15 has made black and white.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrobust import attacks
from jaxrobust.papers.networks import attack, picture_parts
from jaxrobust.papers.networks.analyses import AnalysisSettings
from jaxrobust.papers.networks.network_sample import NetworkSample
from jaxrobust.papers.networks.picture_parts import Rows

_START = 15.0  # radius of the noise around U[0, 1], before it is clipped


@partial(jax.jit, static_argnames=("steps", "step_size"))
def made(logits_fn: Any, start: Any, targets: Any, *, steps: int, step_size: float) -> Any:
    """Return images f32[N,H,W,C] and their cross-entropy with the targets, f32[steps + 1, N]."""
    machine = attacks.pgd_machine(norm="linf", epsilon=1.0, steps=steps, step_size=step_size)
    # To the target instead of away from the label.
    machine = machine._replace(loss=lambda state, logits: -attacks.ce_loss(logits, state.labels))
    loss = lambda state, logits: attacks.ce_loss(logits, state.labels)  # noqa: E731
    state, losses = attack.climb(machine, logits_fn, machine.init(start, targets), steps, loss)
    return machine.result(state), losses


def noise(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Return f32 in [0, 1], about 97% of it black or white."""
    rng = np.random.default_rng(seed)
    start = rng.random(shape) + rng.uniform(-_START, _START, shape)
    return np.clip(start, 0, 1).astype(np.float32)


def analyse(sample: NetworkSample, settings: AnalysisSettings) -> tuple[Rows, Any]:
    """Return a row for each sample; its target is random, or the next of `--targets`."""
    count, classes = len(sample.images), int(sample.subject.network.num_classes or 0)
    drawn = np.random.default_rng([settings.seed, 1]).integers(0, classes, count)
    targets = np.resize(settings.targets or drawn, count).astype(np.int32)
    if targets.min() < 0 or targets.max() >= classes:
        raise ValueError(f"--targets must be classes of {sample.name}, from 0 to {classes - 1}")
    start = noise(sample.images.shape, settings.seed)
    options = {"steps": settings.steps[0], "step_size": settings.step_size}
    slices = attack.batches(count, settings.batch)
    parts = [made(sample.logits_fn, start[part], targets[part], **options) for part in slices]
    images = np.concatenate([images for images, _ in parts])
    losses = np.concatenate([losses for _, losses in parts], axis=1)
    logits = attack.logits(sample, images, settings.batch)
    probabilities = np.asarray(jax.nn.softmax(jnp.asarray(logits)))
    columns = {
        "sample": np.arange(count),
        "target": targets,
        "class": [sample.called(int(target)) for target in targets],
        "start_ce": losses[0],
        "end_ce": losses[-1],
        "prediction": probabilities.argmax(1),
        "probability": probabilities[np.arange(count), targets],
        "saturated_at_start": ((start == 0) | (start == 1)).mean((1, 2, 3)),
        "saturated_at_end": ((images == 0) | (images == 1)).mean((1, 2, 3)),
    }
    return picture_parts.rows(columns), images


def draw(sample: NetworkSample, rows: Rows, result: Any, settings: AnalysisSettings) -> Any:
    """Draw the images with their targets, red if the network predicts another class."""
    cells = [
        (image, f"{row['class']} {row['probability']:.0%}", row["prediction"] != row["target"])
        for image, row in zip(result[: picture_parts.MOST], rows, strict=False)
    ]
    steps = f"{settings.steps[0]} steps of {settings.step_size:g}"
    about = f"{steps} from noise toward a class, with its probability at the end"
    return picture_parts.grid(cells, min(4, len(cells)), f"{sample.name}\n{about}")
