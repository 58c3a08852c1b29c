"""How fast PGD's loss settles, image by image (the repository of Debenedetti et al. 2022).

Uses the correctly classified images among the first, with several random starts each. The step is
always 1.5 epsilon / 10, so one run with the most steps passes through all smaller numbers of steps.
"""

from functools import partial
from typing import Any

import jax
import numpy as np

from jaxrobust import attacks
from jaxrobust.papers.networks import attack, picture_parts
from jaxrobust.papers.networks.analyses import AnalysisSettings
from jaxrobust.papers.networks.network_sample import NetworkSample, keys
from jaxrobust.papers.networks.picture_parts import Rows
from jaxrobust.types import Threat


@partial(jax.jit, static_argnames=("steps", "threat"))
def trajectory(
    logits_fn: Any, drawn: Any, images: Any, labels: Any, *, steps: int, threat: Threat
) -> Any:
    """Return the cross-entropy at a random start and after each step, f32[steps + 1, B]."""
    step_size = 1.5 * threat.epsilon / 10
    machine = attacks.pgd_machine(**threat.settings(), steps=steps, step_size=step_size)
    state = machine.init(images, labels, keys=drawn, start="random")
    return attack.climb(machine, logits_fn, state, steps, machine.loss)[1]


def analyse(sample: NetworkSample, settings: AnalysisSettings) -> tuple[Rows, Any]:
    """Return a row for each image and number of steps: mean, least and largest over the starts."""
    right = attack.logits(sample, sample.images, settings.batch).argmax(1) == sample.labels
    if not right.any():
        none = f"{sample.name} classifies none of the {len(right)} images correctly"
        raise ValueError(f"{none}; give a larger --n")
    images, labels, ids = (array[right] for array in (sample.images, sample.labels, sample.ids))
    sample = sample._replace(images=images, labels=labels, ids=ids)
    options = {"steps": max(settings.steps), "threat": sample.threat}
    curves = []
    for seed in range(settings.seeds):
        drawn = keys(sample, seed)
        parts = [
            trajectory(sample.logits_fn, drawn[p], images[p], labels[p], **options)
            for p in attack.batches(len(ids), settings.batch)
        ]
        curves.append(np.concatenate(parts, axis=1))
    losses = np.stack(curves)  # seeds, steps + 1, images
    rows = []
    for i, number in enumerate(ids):
        for step in settings.steps:
            ce, about = losses[:, step, i], {"image": int(number), "label": int(labels[i])}
            mean, least, largest = float(ce.mean()), float(ce.min()), float(ce.max())
            values = {"ce_mean": mean, "ce_least": least, "ce_largest": largest}
            rows.append(about | {"steps": step} | values | {"seeds": settings.seeds})
    return rows, losses


def draw(sample: NetworkSample, rows: Rows, result: Any, settings: AnalysisSettings) -> Any:
    """Draw each image's loss over the steps, and their mean."""
    ball = sample.threat.written()
    about = f"PGD, {ball}, steps of 0.15 epsilon: loss of {result.shape[2]} correctly classified "
    about += f"images, each the mean of {result.shape[0]} starts"
    figure = picture_parts.figure(f"{sample.name}\n{about}", 7.2, 4.6)
    panel, mean = figure.subplots(), result.mean(0)
    steps = np.arange(len(mean))
    panel.plot(steps, mean, color="#7a9cc0", linewidth=0.7, alpha=0.6)
    panel.plot([], [], color="#7a9cc0", linewidth=0.9, label="an image")
    panel.plot(steps, mean.mean(1), color="#d1495b", linewidth=2.2, label="mean")
    marks = [mean.mean(1)[step] for step in settings.steps]
    panel.plot(settings.steps, marks, "o", color="#d1495b", ms=4)
    panel.set_xscale("symlog", linthresh=1)
    panel.set_xticks(settings.steps, [str(step) for step in settings.steps], fontsize=8)
    panel.xaxis.minorticks_off()
    panel.set(xlim=(0, 1.15 * max(settings.steps)), xlabel="attack steps", ylabel="cross-entropy")
    panel.grid(color="#dddddd", linewidth=0.5)
    panel.legend(fontsize=8, loc="upper left")
    return figure
