"""ConvNeXt-N + ConvStem on CIFAR-10, L-inf 8/255: clean epochs, then 10-step APGD.

    TFDS_DATA_DIR=... jaxrobust train --config configs/cifar10_convnext.py

Not yet measured in full; README has a run of a few epochs on 10,000 images.
"""

from jaxrobust.config import base

# Where the value of each key comes from that is not a default: `jaxrobust why` prints it.
SOURCES = {"*": "ours: no paper has this network on CIFAR-10"}


def get_config():
    config = base()
    config.model.name = "convnext_n_cvst"
    config.model.num_classes = 10
    config.model.image_size = 32
    config.data.name = "cifar10"
    config.data.train_split = "train[:49000]"
    config.data.selection_split = "train[49000:]"
    config.data.test_split = "test"
    config.data.augmentation = "crop-flip"
    config.pretrain.update(epochs=20, batch_size=256, warmup_epochs=2, ema_decay=0.999)
    config.train.update(epochs=30, batch_size=256, warmup_epochs=2, ema_decay=0.999)
    config.attack.update(epsilon=8 / 255, steps=10)
    config.test.images = 1000
    return config
