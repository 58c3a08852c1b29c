"""ConvNeXt-B + ConvStem on ImageNet, L-inf 4/255, 2-step APGD, 250 epochs.

    jaxrobust train --config configs/convnext_b_cvst.py

The paper's recipe with heavy augmentation: timm's clean convnext_base.fb_in1k gets a new ConvStem
and is trained clean for 50 epochs, then against the attack. The paper's batch of 756 (8 x A100)
becomes 768, which 8 to 128 devices divide. Without a network, fetch the weights elsewhere (the
message says how) and give their folder as `--config.init.weights`. Hardware, wall time, accuracies:
not yet measured.
"""

from configs import revisiting_at
from jaxrobust.config import base

SOURCES = revisiting_at.SOURCES


def get_config():
    config = base()
    config.model.name = "convnext_b_cvst"
    config.model.dtype = "bfloat16"
    config.init.update(weights="convnext_base.fb_in1k", stem="fresh")
    config.data.augmentation = "heavy"
    config.pretrain.update(epochs=50, batch_size=768)
    config.train.epochs = 250
    config.train.warmup_epochs = 20
    config.train.batch_size = 768
    config.evaluation.batch_size = config.test.batch_size = 512
    return config
