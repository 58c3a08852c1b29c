"""What an evaluation asks of networks that return anything but the logits of classes.

`evaluation.autoattack(network, images, targets, ..., task=tasks.segmentation())`.
"""

from jaxrobust.tasks.classification import classification
from jaxrobust.tasks.embedding import embedding, zero_shot
from jaxrobust.tasks.segmentation import segmentation
from jaxrobust.tasks.task import Task

__all__ = ["Task", "classification", "embedding", "segmentation", "zero_shot"]
