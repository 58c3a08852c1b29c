"""ConvNeXt-T + ConvStem on ImageNet, L-inf 4/255, 2-step APGD, 50 epochs.

    jaxrobust train --config configs/convnext_t_cvst.py

The paper's recipe with heavy augmentation: timm's clean convnext_tiny.fb_in1k gets a new ConvStem
and is trained clean for 100 epochs, then against the attack. Without a network, fetch the weights
elsewhere (the message says how) and give their folder as `--config.init.weights`. Hardware, wall
time, accuracies: not yet measured.
"""

from configs import revisiting_at
from jaxrobust.config import base

SOURCES = revisiting_at.SOURCES


def get_config():
    config = base()
    config.model.name = "convnext_t_cvst"
    config.model.dtype = "bfloat16"
    config.init.update(weights="convnext_tiny.fb_in1k", stem="fresh")
    config.data.augmentation = "heavy"
    config.pretrain.update(epochs=100, batch_size=1408)
    config.train.batch_size = 1408  # the paper's 1392, made a multiple of 64 devices
    config.evaluation.batch_size = config.test.batch_size = 512
    config.evaluation.steps = 1  # the paper selects small networks with one step
    return config
