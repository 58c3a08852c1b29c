"""XCiT-S12 on ImageNet, L-inf 4/255, one step from a random start, 110 epochs.

    python -m jaxrobust.main --config configs/xcit_s12.py

The light recipe (Debenedetti et al. 2022, arXiv 2209.07399) for the parts that exist: one FGSM step
of 1.5 epsilon against the class, random resized crop, flip and colour jitter, label smoothing 0.1,
weight decay 0.5, constant drop path 0.05, batch statistics of 64 images, no moving average. What
has no key yet: epsilon growing over the first 10 epochs, a learning rate that is constant within an
epoch and flat for the last 10, running statistics that see the clean images too, and a selection by
the attack of the training. Hardware, wall time, accuracies: not yet measured.
"""

from jaxrobust.config import base


def get_config():
    config = base()
    config.model.name = "xcit_s12"
    config.model.dtype = "bfloat16"
    config.model.options = {"drop_path": 0.05, "bn_group": 64}
    config.data.augmentation = "light"
    config.label_smoothing = 0.1
    config.data.preprocessing = "bicubic-1.0"
    config.data.workers = 16
    config.train.update(epochs=110, batch_size=512, lr=5e-4, warmup_epochs=10, final_lr=1e-5)
    config.train.update(weight_decay=0.5, b2=0.999, ema_decay=0.0)
    config.attack.update(name="fgsm", relative_step=1.5, start="random", labels="hard")
    config.evaluation.weights = "raw"
    config.evaluation.batch_size = config.test.batch_size = 512
    return config
