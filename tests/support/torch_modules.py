"""PyTorch's side of every architecture, from its own file in `torch_files`."""

import importlib
from pathlib import Path
from typing import Any

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


def module(file: str):
    """Return a file of `torch_files`, by its name."""
    folder = Path(__file__).parent / "torch_files"
    (path,) = folder.rglob(f"{Path(file).stem}.py")
    parts = path.relative_to(folder).with_suffix("").parts
    return importlib.import_module(".".join(("tests.support.torch_files", *parts)))


def network(name: str, *, img_size: int = 224, **options: Any):
    """Build the PyTorch network under our name: timm's, or that of a file."""
    from jaxrobust.publish import torch_networks

    reference, family = models.member(name).reference, models.family(name)
    if not reference.base.endswith(".py"):
        return torch_networks.network(name, img_size=img_size, **options)
    options = {**reference.options, **options}
    if "in_chans" in options:
        options["in_channels"] = options.pop("in_chans")
    if not family.any_size:
        options["image_size"] = img_size
    return module(reference.base).model(**options)


def built(listing: str):
    from jaxrobust.publish import torch_networks as layers

    name, options = NETWORKS[listing]
    file = module(models.family(name).file)
    keys = {key for key, *_ in reference.entries(LISTINGS / f"{listing}.tsv")}
    normalises = "normalize.mean" in keys
    mean, std = (reference.IMAGENET_MEAN, reference.IMAGENET_STD) if normalises else (None, None)
    return layers.normalized(file.model(**row(name, **options)), mean, std)


def relative(ours, theirs) -> float:
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())
