"""ConvNeXt-T + ConvStem on ImageNet, L-inf 4/255, 2-step APGD, 50 epochs.

    python -m jaxrobust.main --config configs/convnext_t_cvst.py

The paper's recipe with heavy augmentation, for which it starts from clean weights whose new
ConvStem it first trains clean for 100 epochs: `--config.init.weights=FOLDER
--config.pretrain.epochs=100` (README). Without them training starts from random weights, which the
paper reports as failing. Hardware, wall time, accuracies: not yet measured.
"""

from jaxrobust.config import base


def get_config():
    config = base()
    config.model.name = "convnext_t_cvst"
    config.model.dtype = "bfloat16"
    config.data.augmentation = "heavy"
    config.train.batch_size = 1408  # the paper's 1392, made a multiple of 64 devices
    config.evaluation.batch_size = config.test.batch_size = 512
    config.evaluation.steps = 1  # the paper selects small networks with one step
    config.data.workers = 16
    return config
