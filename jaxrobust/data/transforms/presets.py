"""Named augmentations: per image on the host, and per batch on the device."""

from typing import NamedTuple


class Preset(NamedTuple):
    """A row of `PRESETS`; values in a config override its numbers."""

    chain: str  # on the host; see data/augmentations.py
    mixup: float = 0.0  # Beta(mixup, mixup) weights; 0: none
    cutmix: float = 0.0  # the same, for boxes
    erase: float = 0.0  # probability of random erasing
    label_smoothing: float = 0.0


PRESETS = {
    "none": Preset(""),
    # "Basic augmentation" of Singh, Croce, Hein 2023: no flip.
    "basic": Preset("resized-crop"),
    # The light recipe of Debenedetti et al. 2022, without its label smoothing, which its config
    # sets; "3-Aug" of Singh, Croce, Hein 2023.
    "light": Preset("resized-crop|flip|jitter(0.4)"),
    # Touvron et al. 2022 (DeiT III), "3-Augment": one of gray, solarise, blur.
    "3-augment": Preset("resized-crop|flip|3-augment|jitter(0.3)", mixup=0.8, cutmix=1.0),
    # "Heavy augmentation" of Singh, Croce, Hein 2023.
    "heavy": Preset(
        "resized-crop|flip|randaugment", mixup=0.8, cutmix=1.0, erase=0.25, label_smoothing=0.1
    ),
    # The light recipe for CIFAR, as released, and as in the thesis, where parts larger than the
    # image are drawn again, so 0.8 to 1.2 never shrinks the image.
    "light-cifar": Preset("crop|flip|rotate(2)|jitter(0.25)"),
    "light-cifar-thesis": Preset("resized-crop(0.8, 1.2, 0.95, 1.05)|flip", erase=0.2),
    # Cubuk et al. 2019 with torchvision's operations, before crop and flip as in RobustART; Cubuk
    # et al. themselves: crop|flip|autoaugment(128).
    "autoaugment": Preset("autoaugment(128)|crop|flip"),
    # DIG-Beihang/RobustART's own operations, for CIFAR-10 and for ImageNette (no flip).
    "robustart": Preset("autoaugment-robustart|crop|flip"),
    "robustart-imagenet": Preset("resized-crop|autoaugment-robustart-imagenet"),
    "flip": Preset("flip"),
    "crop": Preset("crop"),
    "crop-flip": Preset("crop|flip"),
    "resized-crop-flip": Preset("resized-crop|flip"),
}
