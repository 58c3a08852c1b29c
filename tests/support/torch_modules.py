"""PyTorch's side of every architecture, from its own file."""

import numpy as np

from tests.support import paths, reference

LISTINGS = paths.GOLDEN / "models"
CONVSTEM = {"stem_widths": (48, 96, 192, 384), "stem_strides": (2, 2, 2, 2)}
NORMALIZED = {"mean": reference.IMAGENET_MEAN, "std": reference.IMAGENET_STD}


def convnext(depths, dims, *widths, **more):
    stem = {"stem_widths": widths, "stem_strides": (2, 2, 1)[: len(widths)]} if widths else {}
    return "convnext", {"depths": depths, "dims": dims} | stem | more


def isotropic(**more):
    return "iso_convnext", {"depth": 18, "dim": 384} | more


def vit(dim, heads, **more):
    return "vit", {"dim": dim, "depth": 12, "heads": heads} | more


def xcit(dim, depth, heads, **more):
    return "xcit", {"dim": dim, "depth": depth, "heads": heads} | more


def cait(dim, depth, heads):
    return "cait", {"dim": dim, "depth": depth, "heads": heads}


def swin(dim, heads, **more):
    return "swin", {"dim": dim, "depths": (2, 2, 18, 2), "heads": heads} | more


def resnet(depths, **more):
    return "resnet", {"depths": depths} | more


def robust(**more):
    return "robust_resnet", {"depths": (2, 2, 2), "widths": (5, 7, 3)} | more


def searched(cell):
    return "searched", {"cell": cell, "channels": 16, "cells": 5}


def cifar(name, **more):
    return f"cifar_{name}", more


T, S = (3, 3, 9, 3), (3, 3, 27, 3)
SMALL, BASE, LARGE = (96, 192, 384, 768), (128, 256, 512, 1024), (192, 384, 768, 1536)
DEIT3 = {"class_position": False, "gamma_init": 1e-6}
CIFAR = {"num_classes": 10, "stem_strides": (1, 1, 2, 2)}
R50 = (3, 4, 6, 3)
# listing of a reference network -> file and row of ours
NETWORKS = {
    "timm_convnext_tiny": convnext(T, SMALL),
    "convnext_tiny": convnext(T, SMALL),
    "timm_convnext_small": convnext(S, SMALL),
    "timm_convnext_base": convnext(S, BASE),
    "timm_convnext_large": convnext(S, LARGE),
    "Liu2023Comprehensive_ConvNeXt-B": convnext(S, BASE, **NORMALIZED),
    "Liu2023Comprehensive_ConvNeXt-L": convnext(S, LARGE, **NORMALIZED),
    "Singh2023Revisiting_ConvNeXt-T-ConvStem": convnext(T, SMALL, 48, 96),
    "Singh2023Revisiting_ConvNeXt-S-ConvStem": convnext(S, SMALL, 48, 96),
    "Singh2023Revisiting_ConvNeXt-B-ConvStem": convnext(S, BASE, 64, 96, 128),
    "Singh2023Revisiting_ConvNeXt-L-ConvStem": convnext(S, LARGE, 96, 144, 192),
    "meta_convnext_isotropic_small": isotropic(),
    "paper_convnext_iso_small_cvst": isotropic(**CONVSTEM),
    "timm_vit_small_patch16_224": vit(384, 6),
    "timm_deit_small_patch16_224": vit(384, 6),
    "deit_small_patch16_224": vit(384, 6),
    "timm_vit_base_patch16_224": vit(768, 12),
    "Mo2022When_ViT-B": vit(768, 12, **NORMALIZED),
    "timm_deit3_medium_patch16_224": vit(512, 8, **DEIT3),
    "paper_vit_m_cvst": vit(512, 8, **DEIT3, **CONVSTEM),
    "Singh2023Revisiting_ViT-S-ConvStem": vit(384, 6, **CONVSTEM, **NORMALIZED),
    "Singh2023Revisiting_ViT-B-ConvStem": vit(768, 12, **CONVSTEM),
    "xcit_nano_12_p16_224": xcit(128, 12, 4, tokens_norm=False),
    "xcit_tiny_12_p16_224": xcit(192, 12, 4),
    "xcit_tiny_24_p16_224": xcit(192, 24, 4),
    "xcit_small_12_p16_224": xcit(384, 12, 8),
    "xcit_small_24_p16_224": xcit(384, 24, 8),
    "xcit_medium_12_p16_224": xcit(512, 12, 8),
    "xcit_large_12_p16_224": xcit(768, 12, 16),
    "xcit_small_12_p8_224": xcit(384, 12, 8, stem_strides=(2, 2, 2)),
    "xcit_small_12_p4_32_c10": xcit(384, 12, 8, **CIFAR),
    "xcit_small_12_p4_32_c100": xcit(384, 12, 8, **CIFAR | {"num_classes": 100}),
    "timm_xcit_small_12_p16_224": xcit(384, 12, 8),
    "Debenedetti2022Light_XCiT-S12": xcit(384, 12, 8),
    "Debenedetti2022Light_XCiT-M12": xcit(512, 12, 8),
    "Debenedetti2022Light_XCiT-L12": xcit(768, 12, 16),
    "cait_s12_224": cait(384, 12, 8),
    "cait_s24_224": cait(384, 24, 8),
    "cait_xxs24_224": cait(192, 24, 4),
    "timm_swin_base_patch4_window7_224": swin(128, (4, 8, 16, 32)),
    "timm_swin_large_patch4_window7_224": swin(192, (6, 12, 24, 48)),
    "Liu2023Comprehensive_Swin-B": swin(128, (4, 8, 16, 32), **NORMALIZED),
    "Liu2023Comprehensive_Swin-L": swin(192, (6, 12, 24, 48), **NORMALIZED),
    "resnet50": resnet(R50),
    "resnet50_32_c10": resnet(R50, small_stem=True, num_classes=10),
    "resnet50_gelu": resnet(R50, activation="gelu"),
    "wide_resnet50_2": resnet(R50, width=128),
    "Salman2020Do_R18": resnet((2, 2, 2, 2), bottleneck=False, **NORMALIZED),
    "Salman2020Do_R50": resnet(R50, **NORMALIZED),
    "Salman2020Do_50_2": resnet(R50, width=128, **NORMALIZED),
    "Engstrom2019Robustness": resnet(R50, **NORMALIZED),
    "Standard_R50": resnet(R50, **NORMALIZED),
    "Wong2020Fast": resnet(R50, **NORMALIZED),
    "Chen2024Data_WRN_50_2": resnet(R50, width=128),
    "wrn_D222_W573": robust(),
    "robustres_D222_W573": robust(block="hierarchical", se="residual", first_conv="raw"),
    "robnet_large_v2_C16_L5": searched("robnet"),
    "advrush_C16_L5": searched("advrush"),
    "racl_C16_L5": searched("racl"),
    "vgg16_bn": ("cifar_vgg", {}),
    "wrn_40_10_biased": ("cifar_wide_resnet", {"depths": (6, 6, 6), "width": 10}),
    "densenet_16x4_k12": ("cifar_densenet", {}),
    "preactresnet50": ("cifar_preact_resnet", {}),
    "resnext29_2x64d": ("cifar_resnext", {}),
    "vit_p8": cifar("vit", patch=8),
    "vit_p4_d512_L6_mlphead": cifar("vit"),
    "vit_p2": cifar("vit", patch=2),
    "mlp_mixer_h128_s512_c64_L8_cls": cifar("mixer"),
    "poolformer_s12_k3s2p1": cifar("poolformer"),
    "cct_7_3x1_32": cifar("cct"),
    "botnet50_3x3stem_nopool": ("cifar_botnet", {}),
    "ceit_t_32_4tokens": ("cifar_ceit", {}),
    "levit_128s_32_stem4": ("cifar_levit", {}),
    "mobilevit_s_32_s11": ("cifar_mobilevit", {}),
    "vitae_14_10c": ("cifar_vitae", {}),
    "coatnet0_CCTT": ("cifar_coatnet", {}),
    "pvt_v2_b1_linear": ("cifar_pvt_v2", {}),
    "swin_t_ws4_ds2122": ("cifar_swin", {}),
    "cvt_s1k3_stride2": ("cifar_cvt", {}),
}
# Rule of the weights and listing. The fast suite has a small network of each file.
FAST = [
    ("seeded", "timm_convnext_tiny"),
    ("seeded", "meta_convnext_isotropic_small"),
    ("seeded", "timm_vit_small_patch16_224"),
    ("seeded", "cait_xxs24_224"),
    ("seeded", "Salman2020Do_R18"),
    ("filled", "xcit_nano_12_p16_224"),
    ("filled", "xcit_small_12_p4_32_c10"),
]
SLOW = [
    ("seeded", "Singh2023Revisiting_ConvNeXt-T-ConvStem"),
    ("seeded", "Liu2023Comprehensive_ConvNeXt-B"),
    ("seeded", "paper_vit_m_cvst"),
    ("seeded", "Singh2023Revisiting_ViT-S-ConvStem"),
    ("seeded", "Debenedetti2022Light_XCiT-S12"),
    ("seeded", "Salman2020Do_50_2"),
    ("seeded", "cait_s24_224"),
    ("seeded", "timm_swin_large_patch4_window7_224"),
    ("filled", "xcit_small_12_p16_224"),
    ("filled", "xcit_medium_12_p16_224"),
    ("filled", "xcit_large_12_p16_224"),
    ("filled", "cait_s12_224"),
    ("filled", "deit_small_patch16_224"),
    ("filled", "resnet50_gelu"),
    ("filled", "wide_resnet50_2"),
]


def built(listing: str):
    from jaxrobust.convert import torch_networks  # which needs PyTorch

    file, row = NETWORKS[listing]
    module, layers = (torch_networks.module(name) for name in (file, "layers"))
    row = dict(row)
    mean, std = row.pop("mean", None), row.pop("std", None)
    return layers.normalized(module.model(**row), mean, std)


def relative(ours, theirs) -> float:
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())
