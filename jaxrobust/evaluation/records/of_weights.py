"""Facts about a record's weights: their size, their training, and flags that follow from it."""

from collections.abc import Iterable
from typing import Any

from jaxrobust.data.splits import grammar
from jaxrobust.evaluation.records.record import NetworkSize, TrainingFacts
from jaxrobust.models.table import multiply_adds
from jaxrobust.weights.trained.history import History


def size(net: Any, weights: Any, image_size: int, channels: int) -> NetworkSize:
    """Count the parameters of a network, and its multiply-adds for one image."""
    arrays = weights.params or weights.stats  # a user's function has only stats
    adds = multiply_adds(net, *weights, image_size=image_size, in_channels=channels)
    return {"parameters": sum(a.size for a in arrays.values()), "multiply_adds": adds}


def training(
    history: History, *, dataset: str, split: str, files_sha256: str | None = None
) -> TrainingFacts | None:
    """Describe the training of weights that are evaluated on these images; None if unknown.

    `on_evaluated_images` says whether any run of the history trained on some of these images.
    `selection` names the images on which the weights were chosen, and says whether any run chose on
    some of these images. Both are judged by the names of splits (`grammar.overlap`) or the hashes
    of files, and are None if unknown.
    """
    runs = [run for run in history if run is not None]
    if not runs or history[-1] is None:
        return None

    def same(images: dict[str, Any]) -> bool | None:
        name, part, sha256 = (images.get(key) for key in ("dataset", "split", "files_sha256"))
        if not (name and part):
            return None
        if sha256 and sha256 == files_sha256:  # the same files, perhaps under another path
            return grammar.overlap(part, split, dataset)
        return grammar.same_images((name, part), (dataset, split))

    unknown = len(runs) < len(history)
    choices = [images for run in runs for images in run["selected_on"]]
    overlapping = [images for images in choices if same(images)]
    chosen = [{"split": None}, *runs[-1]["selected_on"], *overlapping][-1]
    return {
        "phases": [phase for run in runs for phase in run["phases"]],
        "passes": None if unknown else sum(run["passes"] for run in runs),
        "on_evaluated_images": _any(
            (same(images) for run in runs for images in run["trained_on"]), unknown
        ),
        "selection": {
            **{key: value for key, value in chosen.items() if key != "files_sha256"},
            "on_evaluated_images": _any(map(same, choices), unknown),
        },
    }


def _any(answers: Iterable[bool | None], unknown: bool) -> bool | None:
    answers = [*answers, None] if unknown else list(answers)
    return True if True in answers else None if None in answers else False


def training_flags(facts: TrainingFacts | None) -> dict[str, str]:
    """Flag that the weights were chosen or trained on evaluated images."""
    if not facts:
        return {}
    doubts, chosen = {}, facts["selection"]
    if chosen["on_evaluated_images"]:
        doubts["selection"] = (
            f"the weights (or the weights they started from) were selected on images of "
            f"{chosen['split']}, some or all of which are evaluated here, which inflates the "
            "accuracy"
        )
    if not chosen["split"]:
        doubts["selection"] = "the images on which the weights were selected are unknown"
    if facts["on_evaluated_images"]:
        doubts["training"] = (
            "the weights (or the weights they started from) were trained on some or all of these "
            "images"
        )
    return doubts
