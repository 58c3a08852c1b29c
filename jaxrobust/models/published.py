"""RobustBench's ImageNet-Linf networks (radius 4/255) that have one of our architectures.

Source: RobustBench 1.1.1, robustbench/model_zoo/imagenet.py (builders, preprocessing) and
model_info/imagenet/Linf/*.json (accuracies); parity: tests/models/test_table.py.
"""

from typing import NamedTuple

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Published(NamedTuple):
    """One network: its architecture, its input, what it reaches and the file of its weights."""

    model: str  # our name
    normalised: bool  # with ImageNet's mean and std inside: `normalize.*` and `model.<name>`
    preprocessing: str  # id of `data.evaluation_transform`
    clean: float  # % of the 5,000 images of RobustBench, as published there
    autoattack: float  # the same after AutoAttack, Linf 4/255
    file: str  # below `model_dir`, or the name in timm's hub cache; empty: no file is looked for


def _linf(model, preprocessing, clean, autoattack, *, normalised=True):
    return Published(model, normalised, preprocessing, clean, autoattack, "imagenet/Linf/{}.pt")


_BICUBIC, _BILINEAR = "BicubicRes256Crop224", "Res256Crop224"
_HUB = "debenedetti2022light-xcit-{}-imagenet-linf.pth.tar"


def _light(size, clean, autoattack):
    file = _HUB.format(size)
    return Published(f"xcit_{size}12", False, "bicubic-224-crop-224", clean, autoattack, file)


_ROWS = {
    "Singh2023Revisiting_ConvNeXt-T-ConvStem": _linf(
        "convnext_t_cvst", _BICUBIC, 72.72, 49.46, normalised=False
    ),
    "Singh2023Revisiting_ConvNeXt-S-ConvStem": _linf(
        "convnext_s_cvst", _BICUBIC, 74.10, 52.42, normalised=False
    ),
    "Singh2023Revisiting_ConvNeXt-B-ConvStem": _linf(
        "convnext_b_cvst", _BICUBIC, 75.90, 56.14, normalised=False
    ),
    "Singh2023Revisiting_ConvNeXt-L-ConvStem": _linf(
        "convnext_l_cvst", _BICUBIC, 77.00, 57.70, normalised=False
    ),
    "Singh2023Revisiting_ViT-S-ConvStem": _linf("vit_s_cvst", _BICUBIC, 72.56, 48.08),
    "Singh2023Revisiting_ViT-B-ConvStem": _linf(
        "vit_b_cvst", _BICUBIC, 76.30, 54.66, normalised=False
    ),
    "Debenedetti2022Light_XCiT-S12": _light("s", 72.34, 41.78),
    "Debenedetti2022Light_XCiT-M12": _light("m", 74.04, 45.24),
    "Debenedetti2022Light_XCiT-L12": _light("l", 73.76, 47.60),
    "Liu2023Comprehensive_ConvNeXt-B": _linf("convnext_b", _BICUBIC, 76.02, 55.82),
    "Liu2023Comprehensive_ConvNeXt-L": _linf("convnext_l", _BICUBIC, 78.02, 58.48),
    "Liu2023Comprehensive_Swin-B": _linf("swin_b", _BICUBIC, 76.16, 56.16),
    "Liu2023Comprehensive_Swin-L": _linf("swin_l", _BICUBIC, 78.92, 59.56),
    "RodriguezMunoz2024Characterizing_Swin-B": _linf("swin_b", _BICUBIC, 77.76, 51.56),
    "RodriguezMunoz2024Characterizing_Swin-L": _linf("swin_l", _BICUBIC, 79.36, 53.82),
    "Mo2022When_Swin-B": _linf("swin_b", "Res224", 74.66, 38.30),
    "Mo2022When_ViT-B": _linf("vit_b", "Res224", 68.38, 34.40),
    "Salman2020Do_R18": _linf("resnet18", _BILINEAR, 52.92, 25.32),
    "Salman2020Do_R50": _linf("resnet50", _BILINEAR, 64.02, 34.96),
    "Salman2020Do_50_2": _linf("wide_resnet50_2", _BILINEAR, 68.46, 38.14),
    "Engstrom2019Robustness": _linf("resnet50", _BILINEAR, 62.56, 29.22),
    # Looked for nowhere: RobustBench takes torchvision's own weights.
    "Standard_R50": _linf("resnet50", _BILINEAR, 76.52, 0.0)._replace(file=""),
    # Listed there as a ResNet-18; the network that is built is a ResNet-50.
    "Wong2020Fast": _linf("resnet50", "Crop288", 55.62, 26.24),
    "Chen2024Data_WRN_50_2": _linf("wide_resnet50_2", _BILINEAR, 68.76, 41.92, normalised=False),
}

# RobustBench id -> network. Not there, for they are other architectures: Peng2023Robust (RaWRN),
# Amini2024MeanSparse_* (MeanSparse layers inside Liu's networks), Bai2024MixedNUTS (an ensemble),
# Xu2024MIMIR_* (a Swin of its own, with window 14 for L).
PUBLISHED = {name: net._replace(file=net.file.format(name)) for name, net in _ROWS.items()}
