"""XCiT-S12 on ImageNet, L-inf 4/255, one step from a random start, 110 epochs.

    python -m jaxrobust.main --config configs/xcit_s12.py

The light recipe (Debenedetti et al. 2022, arXiv 2209.07399) for the parts that exist: one FGSM step
of 1.5 epsilon, random resized crop and flip, weight decay 0.5, constant drop path 0.05, batch
statistics of 64 images, no moving average. What has no key yet: epsilon growing over the first 10
epochs, label smoothing 0.1, colour jitter, a learning rate that is constant within an epoch and
flat for the last 10, and an evaluation by the attack of the training.
Published weights are evaluated with preprocessing bicubic-224-crop-224, for which there is no key
either: selection and test split resize to 256 here. Hardware, wall time, accuracies: not yet
measured.
"""

from configs.base import base


def get_config():
    config = base()
    config.model.name = "xcit_s12"
    config.model.dtype = "bfloat16"
    config.model.options = {"drop_path": 0.05, "bn_group": 64}
    config.data.augmentation = "light"
    config.data.workers = 16
    config.train.update(epochs=110, batch_size=512, lr=5e-4, warmup_epochs=10, final_lr=1e-5)
    config.train.update(weight_decay=0.5, b2=0.999, ema_decay=0.0)
    config.attack.update(name="fgsm", step_size=1.5 * 4 / 255, start="random")
    config.evaluation.weights = "raw"
    config.evaluation.batch_size = config.test.batch_size = 512
    return config
