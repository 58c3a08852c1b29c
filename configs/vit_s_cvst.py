"""ViT-S + ConvStem on ImageNet, L-inf 4/255, 2-step APGD, 50 epochs.

    jaxrobust train --config configs/vit_s_cvst.py

The paper's recipe: timm's clean weights with a new ConvStem are trained clean, then against the
attack. Without a network, fetch the weights elsewhere (the message says how) and give their folder
as `--config.init.weights`. Hardware, wall time, accuracies: not yet measured.

Keys that are not defaults, by `jaxrobust why configs/vit_s_cvst.py`:

    model.name             "vit_s_cvst": Tables 2 and 13
    model.dtype            "bfloat16": ours: what TPUs multiply; the authors' code uses float16
          autocast
    init.weights           "deit_small_patch16_224.fb_in1k": Table 18, from timm; the authors' code
          uses those of ImageNet-21k
    init.stem              "fresh": appendix A.1: a random stem on a body with clean weights
    init.normalize         "imagenet": RobustBench: its weights normalize inside the network, so
          that importing these and exporting under their id gives this network; the authors' code
          does not
    data.augmentation      "heavy": Tables 1 (basic and heavy) and 16 (light, its 3-Aug); appendix
          A.2
    pretrain.epochs        100: appendix A.1: 100 clean epochs for small networks, 50 for others;
          C.3: 50 for InternImage with a PatchStem
    pretrain.batch_size    1408: appendix A.3: 1392; ours: 1408, which 64 devices divide
    train.batch_size       1408: appendix A.3: 1392; ours: 1408, which 64 devices divide
    evaluation.batch_size  512: ours: what fits in memory, which changes no result
    evaluation.steps       1: appendix A.3: one step chooses the epoch of small networks, ten steps
          that of others
    test.batch_size        512: ours: what fits in memory, which changes no result
"""

from configs import revisiting_at
from jaxrobust.config import base

SOURCES = revisiting_at.SOURCES | {
    "init.weights": "Table 18, from timm; the authors' code uses those of ImageNet-21k",
    "init.normalize": "RobustBench: its weights normalize inside the network, so that importing "
    "these and exporting under their id gives this network; the authors' code does not",
    "*.batch_size": "appendix A.3: 1392; ours: 1408, which 64 devices divide",
}


def get_config():
    config = base()
    config.model.name = "vit_s_cvst"
    config.model.dtype = "bfloat16"
    config.init.update(weights="deit_small_patch16_224.fb_in1k", stem="fresh")
    config.init.normalize = "imagenet"  # of the paper's networks this one alone, as published
    config.data.augmentation = "heavy"
    config.pretrain.update(epochs=100, batch_size=1408)
    config.train.batch_size = 1408  # the paper's 1392, made a multiple of 64 devices
    config.evaluation.batch_size = config.test.batch_size = 512
    config.evaluation.steps = 1  # the paper selects small networks with one step
    return config
