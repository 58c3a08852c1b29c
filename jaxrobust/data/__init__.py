"""Images from disk to `uint8` batches; nothing here touches a JAX device."""

from jaxrobust.data.arrays import Loaded, load
from jaxrobust.data.augmentations import chain
from jaxrobust.data.loading import EvaluationBatch, TrainBatch
from jaxrobust.data.pipeline import (
    Damage,
    evaluation_batches,
    steps_per_epoch,
    train_batches,
)
from jaxrobust.data.prepared import Prepared
from jaxrobust.data.sources import DataError, Record, Source, open_source
from jaxrobust.data.transforms import evaluation_transform, resolve, same_preprocessing

__all__ = [
    "Damage",
    "DataError",
    "EvaluationBatch",
    "Loaded",
    "Prepared",
    "Record",
    "Source",
    "TrainBatch",
    "chain",
    "evaluation_batches",
    "evaluation_transform",
    "load",
    "open_source",
    "resolve",
    "same_preprocessing",
    "steps_per_epoch",
    "train_batches",
]
