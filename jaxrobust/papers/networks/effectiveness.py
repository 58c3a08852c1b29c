"""The loss that a short attack misses compared with a long one, during a training.

For each checkpoint of a run, and PGD with k steps of 1.5 epsilon / k: 100 |L_K - L_k| / L_K, where
K is the most steps. If it grows, training has learned to fool its own short attack. Source: the
repository of Debenedetti et al. 2022 (arXiv 2209.07399).
"""

import itertools
from pathlib import Path
from typing import Any

import numpy as np

from jaxrobust.papers.networks import attack, network_sample, picture_parts
from jaxrobust.papers.networks.analyses import AnalysisSettings
from jaxrobust.papers.networks.network_sample import NetworkSample
from jaxrobust.papers.networks.picture_parts import Rows


def analyse(sample: NetworkSample, settings: AnalysisSettings) -> tuple[Rows, Any]:
    """Return a row for each checkpoint and number of steps; means over images and seeds."""
    rows = []
    for step, name, logits_fn in _checkpoints(sample, settings):
        at = sample._replace(logits_fn=logits_fn)
        losses, right = {}, {}
        for k in settings.steps:
            options = {"steps": k, "batch": settings.batch}
            ends = [attack.pgd(at, seed=s, **options)[1] for s in range(settings.seeds)]
            losses[k] = np.array([attack.cross_entropy(e, sample.labels).mean() for e in ends])
            right[k] = np.mean([(e.argmax(1) == sample.labels).mean() for e in ends])
        most = losses[max(settings.steps)].mean()
        for k in settings.steps:
            mean, std = losses[k].mean(), losses[k].std()
            row = {"checkpoint": name, "step": step, "attack_steps": k, "ce": float(mean)}
            row |= {"ce_std_over_seeds": float(std), "accuracy": float(right[k])}
            row |= {"left_percent": float(100 * abs(most - mean) / most)}
            rows.append(row | {"images": len(sample.labels), "seeds": settings.seeds})
    return rows, None


def _checkpoints(sample: NetworkSample, settings: AnalysisSettings) -> list[Any]:
    if settings.checkpoints:
        networks = [network_sample.other(place, sample) for place in settings.checkpoints]
        return [(i, name, logits_fn) for i, (name, _, logits_fn) in enumerate(networks)]
    if workdir := settings.named["workdir"]:
        return network_sample.epochs(Path(workdir), sample.subject, settings.named["phase"])
    return [(0, sample.name, sample.logits_fn)]


def draw(sample: NetworkSample, rows: Rows, result: Any, settings: AnalysisSettings) -> Any:
    """Draw the loss, and the gap to the longest attack, over the steps of training."""
    many = f"the mean of {settings.seeds} random starts"
    about = f"{sample.subject.network.name}: PGD with k steps of 1.5 epsilon / k, "
    about += f"{sample.threat.written()}, on {rows[0]['images']} images, "
    about += "one random start" if settings.seeds == 1 else many
    figure = picture_parts.figure(about, 9.6, 4.0)
    loss_panel, share_panel = figure.subplots(1, 2)
    places = {row["checkpoint"]: row["step"] for row in rows}
    for k, colour in zip(settings.steps, picture_parts.shades(len(settings.steps)), strict=True):
        step_rows = [row for row in rows if row["attack_steps"] == k]
        for panel, key in ((loss_panel, "ce"), (share_panel, "left_percent")):
            xs = [places[row["checkpoint"]] for row in step_rows]
            panel.plot(xs, [row[key] for row in step_rows], "o-", color=colour, label=f"{k}", ms=4)
    loss_panel.set_ylabel("cross-entropy reached")
    share_panel.set_ylabel(f"gap to {max(settings.steps)} steps, % of its loss")
    for panel in (loss_panel, share_panel):
        panel.grid(color="#dddddd", linewidth=0.5)
        panel.set_ylim(bottom=0)
        if len(places) <= 4:
            panel.set_xticks([*places.values()], [*places], fontsize=8)
            panel.margins(x=0.25)
        else:
            panel.set_xlabel("training steps")
            for previous, name in itertools.pairwise(places):
                phase = name.partition(" ")[0]
                if previous.partition(" ")[0] != phase:
                    panel.axvline(places[previous], color="#888888", linestyle=":")
                    over = {"fontsize": 8, "transform": panel.get_xaxis_transform()}
                    panel.text(places[previous], 1.01, f"{phase} →", **over)
    shown = loss_panel.get_legend_handles_labels()
    figure.legend(*shown, title="attack steps", fontsize=8, loc="outside right")
    return figure
