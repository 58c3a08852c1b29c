"""ConvNeXt-B + ConvStem on ImageNet, L-inf 4/255, 2-step APGD, 250 epochs.

    jaxrobust train --config configs/convnext_b_cvst.py

The paper's recipe: timm's clean weights with a new ConvStem are trained clean, then against the
attack. Without a network, fetch the weights elsewhere (the message says how) and give their folder
as `--config.init.weights`. Hardware, wall time, accuracies: not yet measured.

Keys that are not defaults, by `jaxrobust why configs/convnext_b_cvst.py`:

    model.name             "convnext_b_cvst": Tables 2 and 13
    model.dtype            "bfloat16": ours: what TPUs multiply; the authors' code uses float16
          autocast
    init.weights           "convnext_base.fb_in1k": Table 18, of timm
    init.stem              "fresh": appendix A.1: a random stem on a body with clean weights
    data.augmentation      "heavy": Tables 1 (basic and heavy) and 16 (light, its 3-Aug); appendix
          A.2
    pretrain.epochs        50: appendix A.1: 100 clean epochs for small networks, 50 for others;
          C.3: 50 for InternImage with a PatchStem
    pretrain.batch_size    768: appendix A.3: 756, on 8 x A100; ours: 768, which 8 to 128 devices
          divide
    train.epochs           250: Tables 1 and 2: 50, 250 and 300
    train.batch_size       768: appendix A.3: 756, on 8 x A100; ours: 768, which 8 to 128 devices
          divide
    train.warmup_epochs    20: appendix A.2: the peak is at epoch 10, or 20 for 250 and 300 epochs
    evaluation.batch_size  512: ours: what fits in memory, which changes no result
    test.batch_size        512: ours: what fits in memory, which changes no result
"""

from configs import revisiting_at
from jaxrobust.config import base

SOURCES = revisiting_at.SOURCES | {
    "init.weights": "Table 18, of timm",
    "*.batch_size": "appendix A.3: 756, on 8 x A100; ours: 768, which 8 to 128 devices divide",
}


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
