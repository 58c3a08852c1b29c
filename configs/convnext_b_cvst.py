"""ConvNeXt-B + ConvStem on ImageNet, L-inf 4/255, 2-step APGD, 250 epochs.

    python -m jaxrobust.main --config configs/convnext_b_cvst.py

The paper's recipe with heavy augmentation, for which it starts from clean weights whose new
ConvStem it first trains clean for 50 epochs: `--config.init.weights=FOLDER
--config.pretrain.epochs=50` (README). Without them training starts from random weights, which the
paper reports as failing. The paper's batch of 756 (8 x A100) becomes 768, which 8 to 128 devices
divide. Hardware, wall time, accuracies: not yet measured.
"""

from jaxrobust.config import base


def get_config():
    config = base()
    config.model.name = "convnext_b_cvst"
    config.model.dtype = "bfloat16"
    config.data.augmentation = "heavy"
    config.train.epochs = 250
    config.train.warmup_epochs = 20
    config.train.batch_size = 768
    config.evaluation.batch_size = config.test.batch_size = 512
    config.data.workers = 32
    return config
