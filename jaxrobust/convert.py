"""Weights of the PyTorch reference networks as ours: runs the rows beside each architecture."""

import re
from collections.abc import Mapping

import jax
import numpy as np

from jaxrobust import models
from jaxrobust.names import Row, row

PREFIXES = ("module.", "base_model.", "model.")  # DDP, the attack wrapper, the normalised wrapper


def unwrapped(state_dict: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The names without what wrappers put before all of them; `normalize.*` may stand outside."""
    names = dict(state_dict)
    while any(
        all(k.startswith((prefix, "normalize.")) for k in names) and names for prefix in PREFIXES
    ):
        names = {re.sub(r"^(module|base_model|model)\.", "", k): v for k, v in names.items()}
    return names


def rename(
    rows: list[Row], source: Mapping[str, np.ndarray], expected: Mapping[str, tuple[int, ...]]
) -> dict[str, np.ndarray]:
    """The arrays of `source` under our names.

    Args:
      rows: every source name must match exactly one.
      source: reference name -> array.
      expected: our name -> shape; every one must be filled exactly once.
    Raises:
      ValueError: with all problems in one message.
    """
    filled: dict[str, np.ndarray] = {}
    problems = []
    for name, array in source.items():
        matches = [(r, m) for r in rows if (m := r.pattern.fullmatch(name))]
        if len(matches) != 1:
            problems.append(f"{name}: {len(matches)} rows match, expected 1")
            continue
        match_row, match = matches[0]
        if match_row.target is None:
            continue
        target = match.expand(match_row.target)
        array = match_row.transform(np.array(array))  # a copy: the source may be a live network
        if target not in expected:
            problems.append(f"{name}: maps to {target}, which this network does not have")
        elif target in filled:
            problems.append(f"{name}: fills {target} a second time")
        elif array.shape != tuple(expected[target]):
            problems.append(f"{name}: shape {array.shape} for {target} {tuple(expected[target])}")
        elif array.dtype != np.float32:
            problems.append(f"{name}: dtype {array.dtype}, expected float32; cast it first")
        elif not np.isfinite(array).all():
            problems.append(f"{name}: holds values that are not finite")
        else:
            filled[target] = array
    problems += [f"{name}: not filled by any source name" for name in expected.keys() - filled]
    if problems:
        raise ValueError(
            f"{len(problems)} weights do not fit; check the model name, num_classes and image_size:"
            "\n  " + "\n  ".join(sorted(problems))
        )
    return filled


def from_torch(
    name: str, state_dict: Mapping[str, np.ndarray], *, num_classes: int = 1000, image_size=224
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Params and stats of network `name` from a PyTorch state dict of NumPy arrays.

    Args:
      name: one of `models.available()`.
      state_dict: timm's names (ConvStem: those of the authors' files, `stem.stem.*`).
    Raises:
      ValueError: names, shapes or types that do not fit, all in one message.
    Source: names from timm 1.0.9 and the state dicts of RobustBench; tests/test_convnext.py.
    """
    net = models.create(name, num_classes=num_classes, image_size=image_size)
    params, stats = jax.eval_shape(net.init, jax.random.key(0))
    names = unwrapped(state_dict)
    # Weights without a normalisation layer mean raw [0, 1] input: the identity.
    if not {"normalize.mean", "normalize.std"} & names.keys():
        names["normalize.mean"] = np.zeros(stats["normalize.mean"].shape, np.float32)
        names["normalize.std"] = np.ones(stats["normalize.std"].shape, np.float32)
    rows = [*models.torch_names(name), row(r"normalize\.(mean|std)", r"normalize.\1", np.ravel)]
    shapes = {k: v.shape for k, v in (params | stats).items()}
    filled = rename(rows, names, shapes)
    return {k: filled[k] for k in params}, {k: filled[k] for k in stats}
