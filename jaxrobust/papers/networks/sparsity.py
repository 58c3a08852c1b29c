"""The share of a network's weights near zero, as numbers and histograms.

The ratio of a set of weights is the share below a hundredth of the largest one.
Source: Tang et al. 2022 (arXiv 2209.14105), section 4.
"""

import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxrobust.papers.networks import network_sample, picture_parts

SMALL = 0.01  # of the largest weight; smaller weights count as zero
BINS = 200
# Parts of names that show the purpose of a weight, in our networks and in their references.
_QKV = {"qkv", "kqv", "to_qkv", "q", "k", "v", "kv", "to_q", "to_k", "to_v", "to_kv"}
_FEED = {"mlp", "mlp1", "mlp2", "ffn", "ff", "leff"}
SETS = ("whole", "convolution", "qkv", "feed-forward")
_TITLES = {"whole": "whole network", "qkv": "queries, keys, values"}


class WeightGroup(NamedTuple):
    """A set of weights and its statistics."""

    name: str
    tensors: int
    weights: np.ndarray  # f32[N], of convolutions and linear maps
    others: np.ndarray  # f32[M], of norms, biases, tokens and positions in that part

    @property
    def ratio(self) -> float:
        """Return the share of the weights near zero."""
        return ratio(self.weights)

    @property
    def ratio_of_all(self) -> float:
        """Return the same share for all parameters, relative to the largest."""
        return ratio(np.concatenate([self.weights, self.others]))


def ratio(values: np.ndarray) -> float:
    """Return the share of values below a hundredth of the largest, in magnitude."""
    sizes = np.abs(values)
    return float((sizes < SMALL * sizes.max()).mean())


def of_name(name: str, axes: int) -> str | None:
    """Find the set of a parameter, other than the whole network; an MLP's convolutions are its."""
    parts = set(name.split("."))
    if parts & _FEED:
        return "feed-forward"
    if parts & _QKV:
        return "qkv"
    return "convolution" if axes == 4 and name.endswith(".kernel") else None


def parts(params: dict[str, Any]) -> list[WeightGroup]:
    """Return the non-empty sets of a network."""
    sets = []
    for set_name in SETS:
        members = {n: p for n, p in params.items() if set_name in ("whole", of_name(n, np.ndim(p)))}
        flat = {name: np.asarray(value, np.float32).ravel() for name, value in members.items()}
        if kernels := [values for name, values in flat.items() if name.endswith(".kernel")]:
            no_kernels = [values for name, values in flat.items() if not name.endswith(".kernel")]
            others = np.concatenate([np.zeros(0, np.float32), *no_kernels])
            sets.append(WeightGroup(set_name, len(kernels), np.concatenate(kernels), others))
    return sets


def rows(sets: list[WeightGroup]) -> picture_parts.Rows:
    """Return a row for each bin of each set's histogram, with the set's statistics."""
    bins = []
    for part in sets:
        density, edges = np.histogram(part.weights, BINS, density=True)
        of_set = {"set": part.name, "tensors": part.tensors, "weights": part.weights.size}
        of_set |= {"largest": float(np.abs(part.weights).max())}
        of_set |= {"ratio": part.ratio, "ratio_of_all_parameters": part.ratio_of_all}
        for low, high, value in zip(edges[:-1], edges[1:], density, strict=True):
            bins.append(of_set | {"from": float(low), "to": float(high), "density": float(value)})
    return bins


def draw(name: str, sets: list[WeightGroup]) -> Any:
    """Draw the histograms, one below the other, and mark what counts as zero."""
    title = f"{name}: share of weights below 1% of the largest in their set"
    figure = picture_parts.figure(title, 6.4, 0.5 + 1.75 * len(sets))
    panels = figure.subplots(len(sets), 1, squeeze=False)[:, 0]
    for panel, part in zip(panels, sets, strict=True):
        largest = float(np.abs(part.weights).max())
        density, edges = np.histogram(part.weights, BINS, density=True)
        panel.stairs(density, edges, fill=True, color="#1f4e79")
        panel.axvspan(-SMALL * largest, SMALL * largest, color="#d1495b", alpha=0.5, linewidth=0)
        panel.set(yscale="log", xlim=(-1.02 * largest, 1.02 * largest))
        about = f"{part.ratio:.1%} of {part.weights.size:,} weights in {part.tensors} tensors"
        panel.set_title(f"{_TITLES.get(part.name, part.name)}: {about}", fontsize=9)
        panel.set_ylabel("density", fontsize=8)
        panel.tick_params(labelsize=8)
    panels[-1].set_xlabel("weight", fontsize=8)
    return figure


def written(network_flags: dict[str, Any], out: Path | None) -> tuple[Path, Path]:
    """Count, and write both files, by default next to the run; return their paths."""
    picture_parts.plotting()  # refuses before anything is read
    name, weights = network_sample.weights_of(network_flags)
    sets = parts(dict(weights.params))
    if not sets:
        raise ValueError(f"{name} has no convolutions or linear maps whose names end in .kernel")
    out = picture_parts.folder(out, network_flags["workdir"])
    paths = picture_parts.save(out, "sparsity", draw(name, sets), rows(sets))
    for part in sets:
        of_all = f"{part.ratio_of_all:.1%} of all its parameters"
        text = f"{part.name:13} {part.ratio:6.1%} of {part.weights.size:,} weights, {of_all}"
        print(text, file=sys.stderr)
    return paths
