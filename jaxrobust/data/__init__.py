"""Images from disk to `uint8` batches; nothing here touches a JAX device."""

from jaxrobust.data.sources.registry import DataError, Record, Source, open_source
from jaxrobust.data.stream.arrays import ImageArrays, Prepared, load
from jaxrobust.data.stream.loading import EvaluationBatch, TrainBatch
from jaxrobust.data.stream.pipeline import (
    Damage,
    evaluation_batches,
    steps_per_epoch,
    train_batches,
)
from jaxrobust.data.transforms.augmentations import chain
from jaxrobust.data.transforms.preparing import evaluation_transform, resolve, same_preprocessing

__all__ = [
    "Damage",
    "DataError",
    "EvaluationBatch",
    "ImageArrays",
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
