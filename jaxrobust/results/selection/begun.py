"""A choice among a run's weights that was begun: what it has, if that is of the same question."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxrobust.evaluation.network import fingerprint, tracing
from jaxrobust.runtime.processes import hosts
from jaxrobust.weights.store import hashes
from jaxrobust.weights.trained import kept


def computed(run: Path, phase: str, sizes: Mapping[int, Any]) -> dict[str, Any]:
    """Hash what each `sizes.Size` computes and its images, and say whose programs it is."""
    here = Mesh(np.array(jax.local_devices()[:1]), ("device",))
    _, both = kept.read(run, phase, kept.steps_of(run, phase)[0])
    hashed = {}
    for side, size in sizes.items():
        weights = kept.at_size(run, phase, both.of("raw"), side)
        called = jax.tree_util.Partial(size.network, *weights)
        network = tracing.argument("network", called, here)
        exact = fingerprint.exact(network, size.images.shape[1:], each=1)
        own = {key: exact[key] for key in ("program", "gradient")}
        hashed[str(side)] = own | {"images": size.images.content_sha256()}
    return {"computed": hashed, "by": fingerprint.versions()}


def candidates(
    path: Path, question: dict[str, Any], computed: dict[str, Any]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return the candidates that are done, and what was computed, at all sizes."""
    if not path.exists():
        return [], computed
    begun = kept.read_selection(path)
    if words := hosts.differences({key: begun.get(key) for key in question}, question):
        raise ValueError(
            f"{path} is a choice of another kind: {words}. Repeat its flags, or move it away"
        )
    if "computed" not in begun:
        raise ValueError(
            f"{path} is of an older version, which noted neither what the network computes nor the "
            "images' bytes, so nothing shows that its candidates are these: move it away"
        )
    for size, own in computed["computed"].items():
        there = begun["computed"].get(size, own)
        other = [key for key in own if there[key] != own[key]]
        is_another = "are others" if "images" in other else "is another"
        whose = ""  # another version may write the same network as another program
        if "images" not in other and fingerprint.other_versions(begun["by"], computed["by"]):
            whose = f" (begun by {fingerprint.words(begun['by'])})"
        if other:
            raise ValueError(
                f"{path} is a choice of another kind: under the same name, at {size} px, its "
                f"{' and '.join(other)} {is_another}{whose}. Move it away"
            )
    both = begun["computed"] | computed["computed"]
    return begun["candidates"], computed | {"computed": both}


def check_weights(run: Path, candidates: list[dict[str, Any]]) -> None:
    """Refuse candidates whose weights the run holds no more."""
    for row in candidates:
        _, both = kept.read(run, row["phase"], row["step"])
        weights = kept.at_size(run, row["phase"], both.of(row["weights"]), row["image_size"])
        if hashes.weights_sha256(*weights) != row["weights_sha256"]:
            raise ValueError(
                f"the weights of {row['phase']}, step {row['step']}, {row['weights']} are others "
                f"than those in {run / kept.SELECTION}; move that file away"
            )
