"""ViT-S + ConvStem on ImageNet, L-inf 4/255, 2-step APGD, 50 epochs.

    python -m jaxrobust.main --config configs/vit_s_cvst.py

The paper's recipe for the parts that exist: basic augmentation (random resized crop), no MixUp,
random initialisation. Hardware, wall time, accuracies: not yet measured.
"""

from configs.base import base


def get_config():
    config = base()
    config.model.name = "vit_s_cvst"
    config.model.dtype = "bfloat16"
    config.train.batch_size = 1392  # the paper's effective batch for small networks
    config.evaluation.batch_size = config.test.batch_size = 512
    config.evaluation.steps = 1  # the paper selects small networks with one step
    config.data.workers = 16
    return config
