"""PyTorch's side of every architecture, from its own file."""

import numpy as np

from jaxrobust import models
from tests.support import paths, reference
from tests.support.families import networks

LISTINGS = paths.GOLDEN / "models"
NETWORKS = networks()
# Of a row, what concerns training or JAX.
NOT_THE_NETWORK = {"dtype", "remat", "scan", "drop_path", "bn_group", "bn_momentum"}
NOT_THE_NETWORK |= {"dropout", "attention_dropout", "scale_init", "padded"}


def row(name: str, **options) -> dict:
    """What the module in PyTorch is given for a network of ours; few ask for the images' size."""
    fields = models.variant(name)._asdict() | {"num_classes": models.member(name).num_classes}
    fields |= {k: v for k, v in options.items() if k in fields or k != "image_size"}
    return {field: value for field, value in fields.items() if field not in NOT_THE_NETWORK}


def built(listing: str):
    from jaxrobust.publish import torch_networks

    name, options = NETWORKS[listing]
    module, layers = (torch_networks.module(file) for file in (models.family(name).file, "layers"))
    keys = {key for key, *_ in reference.entries(LISTINGS / f"{listing}.tsv")}
    normalises = "normalize.mean" in keys
    mean, std = (reference.IMAGENET_MEAN, reference.IMAGENET_STD) if normalises else (None, None)
    return layers.normalized(module.model(**row(name, **options)), mean, std)


def relative(ours, theirs) -> float:
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())
