"""What the tests of every architecture take of each: its references, and small networks of it."""

import contextlib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
from absl.testing import absltest

from jaxrobust import models
from jaxrobust.models.interface.family import Family
from jaxrobust.models.modules import positions
from jaxrobust.models.published import PUBLISHED
from tests.support import parity, paths


def all_families() -> list[Family]:
    """Import every architecture, of the core and of the optional rooms."""
    return [*{(found := models.family(name)).file: found for name in models.available()}.values()]


def by_family(names: Iterable[str]) -> list[tuple[str, list[str]]]:
    """Names of networks or of published weights, sorted, by their architecture."""
    found: dict[str, list[str]] = {}
    for name in sorted(names):
        model = PUBLISHED[name].model if name in PUBLISHED else name
        found.setdefault(models.family(model).file, []).append(name)
    return list(found.items())


class Case(NamedTuple):
    """One family. Names are ours, listings those of the references' state dicts."""

    listings: dict[str, str]  # name -> the names of its reference's weights
    counts: dict[str, int]  # name -> number of the reference's parameters
    golden32: dict[str, str]  # name -> listing of golden logits: in float32
    golden64: dict[str, str]  # the same in float64
    references: dict[str, int]  # name -> side of the images that both sides are given
    more_listings: dict[str, str] = {}  # noqa: RUF012  # listing -> name
    fast32: tuple[str, ...] = ()  # of `golden32`, on every run
    fast64: tuple[str, ...] = ()  # of `golden64`, with the slow tests
    forward: dict[str, tuple[str, dict[str, Any]]] = {}  # noqa: RUF012  # listing -> name, options
    rows: dict[str, tuple[str, dict[str, Any]]] = {}  # noqa: RUF012  # the same without golden logits
    # Name -> its options for 8x8 gray digits: drop path, batch statistics in groups and recomputed
    # blocks take part.
    digits: dict[str, dict[str, Any]] = {}  # noqa: RUF012
    small: str = ""  # name of the small network below; empty: the family has tests of its own
    tiny: dict[str, Any] = {}  # noqa: RUF012  # its options
    scanned: tuple[dict[str, Any], ...] = ()  # changes of it with which blocks are scanned
    outcomes: int = 0  # different logits under stochastic depth: 2 ** (branches)
    batch: int = 2  # images that the reference is given
    stored: Callable[[], Any] = contextlib.nullcontext  # around what golden logits are compared in
    here: Callable[[], Any] = contextlib.nullcontext  # the same for a reference in process


def torchs_waves(length: int) -> np.ndarray:
    """The waves of XCiT's positions as the reference's float32 sine and cosine round them here."""
    import torch

    frequencies = torch.from_numpy((10000 ** (np.arange(0, 32, 2) / 32)).astype(np.float32))
    at = torch.arange(1, length + 1, dtype=torch.float32)
    angles = (at / (at[-1] + 1e-6) * (2 * np.pi))[:, None] / frequencies
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(1).numpy()


def stored_waves(length: int) -> np.ndarray:
    """The same of the reference that made the golden logits (torch 2.13.0, AVX-512)."""
    return np.load(parity.MODELS / "xcit_waves.npz")[str(length)]


def rounded_as(waves):
    """Positions with the reference's rounding of sine and cosine.

    It takes them in float32 even for float64 networks, through a library that is 0.59 ulp from the
    exact value where ours is 0.5: one value in 30 differs, by the last bit, which moves float64
    logits by 3e-9. With the same bits they agree to 1e-14.
    """
    return mock.patch.object(positions, "waves", waves)


@contextlib.contextmanager
def reference_here():
    """Skips without the reference; with it, positions rounded as it does it on this machine."""
    try:
        import torch  # noqa: F401

        from jaxrobust.publish import torch_networks  # noqa: F401
    except ImportError as error:
        raise absltest.SkipTest(paths.PARITY) from error
    with rounded_as(torchs_waves):
        yield


_LIGHT = "Debenedetti2022Light_XCiT-"
_CONVNEXT = {
    "convnext_t": "timm_convnext_tiny",
    "convnext_t_cvst": "Singh2023Revisiting_ConvNeXt-T-ConvStem",
    "convnext_s": "timm_convnext_small",
    "convnext_s_cvst": "Singh2023Revisiting_ConvNeXt-S-ConvStem",
    "convnext_b": "timm_convnext_base",
    "convnext_b_cvst": "Singh2023Revisiting_ConvNeXt-B-ConvStem",
    "convnext_l": "timm_convnext_large",
    "convnext_l_cvst": "Singh2023Revisiting_ConvNeXt-L-ConvStem",
}
_VIT = {
    "vit_s": "timm_vit_small_patch16_224",
    "vit_s_cvst": "Singh2023Revisiting_ViT-S-ConvStem",
    "vit_m": "timm_deit3_medium_patch16_224",
    "vit_m_cvst": "paper_vit_m_cvst",
    "vit_b": "timm_vit_base_patch16_224",
    "vit_b_cvst": "Singh2023Revisiting_ViT-B-ConvStem",
    "deit_s": "timm_deit_small_patch16_224",
}
_XCIT = {
    "xcit_n12": "xcit_nano_12_p16_224",
    "xcit_t12": "xcit_tiny_12_p16_224",
    "xcit_t24": "xcit_tiny_24_p16_224",
    "xcit_s12": "xcit_small_12_p16_224",
    "xcit_s24": "xcit_small_24_p16_224",
    "xcit_m12": "xcit_medium_12_p16_224",
    "xcit_l12": "xcit_large_12_p16_224",
    "xcit_s12_p8": "xcit_small_12_p8_224",
}
_CAIT = {
    "cait_xxs24": "cait_xxs24_224",
    "cait_s24": "cait_s24_224",
    "cait_s12": "cait_s12_224",
}
_ISO = {
    "iso_convnext_s": "meta_convnext_isotropic_small",
    "iso_convnext_s_cvst": "paper_convnext_iso_small_cvst",
}
_INTERNIMAGE = {"internimage_t": "internimage_t", "internimage_t_ps": "internimage_t_ps"}
_SWIN = {
    "swin_b": "timm_swin_base_patch4_window7_224",
    "swin_l": "timm_swin_large_patch4_window7_224",
}

_D222_W573 = {"depths": (2, 2, 2), "widths": (5, 7, 3), "planes": ()}
_SEARCHED = {"robnet_large_v2": "robnet_large_v2", "advrush": "advrush_7_96", "racl": "racl_7_104"}


def _some(listings: dict[str, str], *names: str) -> dict[str, str]:
    return {name: listings[name] for name in names}


def _study(
    name: str,
    listing: str = "",
    scanned=({},),
    *,
    digits: dict[str, dict[str, Any]],
    rows: dict[str, tuple[str, dict[str, Any]]] | None = None,
    **tiny: Any,
) -> Case:
    """A network of the study at 32 px: its listing, and options of a small one of three blocks."""
    listings = {name: listing} if listing else {}
    # Rates 0, 0.3 and 0.6: two blocks of two branches.
    how = {"small": name, "tiny": tiny, "scanned": scanned, "outcomes": 2**4}
    how |= {"digits": digits, "rows": rows or {}}
    return Case(listings, {}, {}, {}, {}, **how)


# The counts are the papers' (Singh, Croce, Hein 2023; Debenedetti's thesis) and torchvision's.
CASES = {
    "convnext": Case(
        listings=_CONVNEXT,
        counts={
            "convnext_t": 28_589_128,
            "convnext_t_cvst": 28_627_432,
            "convnext_s": 50_223_688,
            "convnext_s_cvst": 50_261_992,
            "convnext_b": 88_591_464,
            "convnext_b_cvst": 88_753_416,
            "convnext_l": 197_767_336,
            "convnext_l_cvst": 198_134_680,
        },
        golden32=_some(_CONVNEXT, "convnext_t", "convnext_t_cvst")
        | {"convnext_b": "Liu2023Comprehensive_ConvNeXt-B"},
        fast32=("convnext_t", "convnext_t_cvst"),
        golden64=_some(_CONVNEXT, "convnext_t", "convnext_t_cvst")
        | {"convnext_b": "Liu2023Comprehensive_ConvNeXt-B"},
        fast64=("convnext_t_cvst",),
        references=dict.fromkeys(["convnext_n", *_CONVNEXT], 64) | {"convnext_n_cvst": 32},
        small="convnext_n",
        tiny={"depths": (2, 2), "dims": (6, 8), "image_size": 8, "gamma_init": 0.1},
        scanned=({}, {"stem_widths": (4, 6), "stem_strides": (2, 1)}),
        outcomes=2**3,  # rates 0, 0.2, 0.4 and 0.6: three blocks of one branch
        rows={
            "convnext_tiny": ("convnext_t", {}),
            "Liu2023Comprehensive_ConvNeXt-B": ("convnext_b", {}),
            "Liu2023Comprehensive_ConvNeXt-L": ("convnext_l", {}),
        },
    ),
    "internimage": Case(
        listings=_INTERNIMAGE,
        counts={"internimage_t": 29_918_424, "internimage_t_ps": 29_902_104},
        # Golden logits and gradients: tests/models/families/test_internimage.py.
        golden32={},
        golden64={},
        references=dict.fromkeys(_INTERNIMAGE, 64),
        small="internimage_t",
        tiny={
            **{"depths": (2, 2), "dims": (8, 12), "groups": (2, 3), "stem_widths": (4, 8)},
            **{"stem_strides": (2, 1), "image_size": 12, "gamma_init": 0.1, "head_dim": 10},
        },
        scanned=({}, {"stem_widths": (), "stem_strides": (2,)}),
        outcomes=2**6,  # rates 0, 0.2, 0.4 and 0.6: three blocks of two branches
        digits={
            "internimage_t": {
                **{"depths": (1, 1), "dims": (16, 32), "groups": (2, 4), "stem_widths": (8, 16)},
                **{"stem_strides": (2, 1), "head_dim": 32, "drop_path": 0.1, "bn_group": 4},
            }
        },
    ),
    "iso_convnext": Case(
        listings=_ISO,
        counts={"iso_convnext_s": 22_308_712, "iso_convnext_s_cvst": 23_035_624},
        golden32=_some(_ISO, "iso_convnext_s"),
        fast32=("iso_convnext_s",),
        golden64=_some(_ISO, "iso_convnext_s"),
        fast64=("iso_convnext_s",),
        references=dict.fromkeys(_ISO, 64),  # of convert/torch_modules: timm has neither
        small="iso_convnext_s",
        tiny={"dim": 12, "depth": 3, "stem_strides": (4,), "image_size": 12},
        scanned=({"depth": 2},),
        outcomes=2**2,  # rates 0, 0.3 and 0.6: two blocks of one branch
        digits={"iso_convnext_s": {"dim": 16, "depth": 2, "stem_strides": (2,), "scan": True}},
    ),
    "vit": Case(
        listings=_VIT,
        counts={
            "vit_s": 22_050_664,
            "vit_s_cvst": 22_777_576,
            "vit_m": 38_849_512,
            "vit_m_cvst": 39_527_272,
            "vit_b": 86_567_656,
            "vit_b_cvst": 87_147_112,
            "deit_s": 22_050_664,
        },
        golden32=_some(_VIT, "vit_s", "vit_s_cvst", "vit_m_cvst"),
        fast32=("vit_m_cvst",),
        golden64=_some(_VIT, "vit_s", "vit_s_cvst", "vit_m_cvst"),
        fast64=("vit_s_cvst",),
        forward={"deit_small_patch16_224": ("deit_s", {})},
        references=dict.fromkeys(_VIT, 64) | {"deit_s": 96},
        small="vit_m",
        tiny={"dim": 12, "depth": 3, "heads": 2, "stem_strides": (4,), "image_size": 12},
        scanned=({"depth": 2},),
        outcomes=2**4,  # rates 0, 0.3 and 0.6: two blocks of two branches
        digits={
            "vit_m_cvst": {
                **{"dim": 16, "depth": 2, "heads": 2, "stem_widths": (8,), "stem_strides": (2,)},
                **{"drop_path": 0.1, "gamma_init": 0.1, "scan": True},
            }
        },
        rows={"Mo2022When_ViT-B": ("vit_b", {})},
    ),
    "cait": Case(
        listings=_CAIT,
        counts={"cait_xxs24": 11_956_264, "cait_s24": 46_916_200, "cait_s12": 25_611_688},
        golden32=_some(_CAIT, "cait_xxs24", "cait_s24"),
        golden64=_some(_CAIT, "cait_xxs24", "cait_s24"),
        fast64=("cait_xxs24",),
        forward={"cait_s12_224": ("cait_s12", {})},
        references=dict.fromkeys(_CAIT, 64),
        small="cait_s12",
        tiny={"dim": 12, "depth": 2, "heads": 2, "stem_strides": (4,), "image_size": 12},
        scanned=({"class_depth": 1},),
        outcomes=2**4,  # the same rate in both blocks, none in the layers of the class token
        digits={
            "cait_xxs24": {
                "dim": 16,
                "depth": 2,
                "heads": 2,
                "stem_strides": (2,),
                "gamma_init": 0.1,
            }
        },
    ),
    "xcit": Case(
        listings=_XCIT,
        counts={
            "xcit_n12": 3_053_224,
            "xcit_t12": 6_716_272,
            "xcit_t24": 12_116_896,
            "xcit_s12": 26_253_304,
            "xcit_s24": 47_671_384,
            "xcit_m12": 46_401_160,
            "xcit_l12": 103_792_648,
            "xcit_s12_p8": 26_213_032,
        },
        more_listings={
            f"{_LIGHT}S12": "xcit_s12",
            f"{_LIGHT}M12": "xcit_m12",
            f"{_LIGHT}L12": "xcit_l12",
            "timm_xcit_small_12_p16_224": "xcit_s12",
            "xcit_small_12_p4_32_c10": "xcit_s12_p4",
        },
        golden32={"xcit_s12": f"{_LIGHT}S12"},
        fast32=("xcit_s12",),
        golden64={"xcit_s12": f"{_LIGHT}S12"},
        forward={
            **{
                _XCIT[name]: (name, {}) for name in ("xcit_n12", "xcit_s12", "xcit_m12", "xcit_l12")
            },
            "xcit_small_12_p4_32_c10": ("xcit_s12_p4", {"num_classes": 10, "image_size": 32}),
        },
        references=dict.fromkeys(_XCIT, 64) | {"xcit_n12_p4": 32, "xcit_s12_p4": 32},
        small="xcit_s12",
        tiny={"dim": 8, "depth": 2, "heads": 2, "stem_strides": (4,), "image_size": 12},
        scanned=({},),
        outcomes=2**6,  # the same rate in both blocks of three branches
        stored=lambda: rounded_as(stored_waves),
        here=reference_here,
        digits={
            "xcit_n12": {
                **{"dim": 16, "depth": 2, "heads": 2, "stem_strides": (2,), "bn_group": 4},
                **{"drop_path": 0.1, "scan": True},
            }
        },
        rows={"xcit_small_12_p4_32_c100": ("xcit_s12_p4", {"num_classes": 100})},
    ),
    "swin": Case(
        listings=_SWIN,
        counts={"swin_b": 87_768_224, "swin_l": 196_532_476},
        more_listings={
            "Liu2023Comprehensive_Swin-B": "swin_b",
            "Liu2023Comprehensive_Swin-L": "swin_l",
            "Mo2022When_Swin-B": "swin_b",
            "RodriguezMunoz2024Characterizing_Swin-B": "swin_b",
            "RodriguezMunoz2024Characterizing_Swin-L": "swin_l",
        },
        golden32=_some(_SWIN, "swin_l"),
        golden64=_some(_SWIN, "swin_l"),
        references={},  # at several sizes: tests/models/families/test_swin.py
        small="swin_b",
        # A map of 5, padded to 6 and shifted, and one of 3 in windows of 2, padded to 4.
        tiny={
            **{"dim": 6, "depths": (2, 1), "heads": (1, 2), "patch": 2, "window": 3},
            "image_size": 10,
        },
        outcomes=2**4,  # rates 0, 0.3 and 0.6: two blocks of two branches
        digits={"swin_b": {"dim": 8, "depths": (2, 2), "heads": (1, 2), "patch": 1, "window": 3}},
    ),
    "resnet": Case(
        listings={"resnet50": "resnet50", "wide_resnet50_2": "wide_resnet50_2"}
        | {"resnet18": "Salman2020Do_R18", "resnet50_gelu": "resnet50_gelu"}
        | {"cifar_resnet50": "resnet50_32_c10"},
        counts={
            "resnet18": 11_689_512,
            "resnet50": 25_557_032,
            "resnet50_gelu": 25_557_032,
            "wide_resnet50_2": 68_883_240,
            "cifar_resnet50": 23_520_842,
        },
        more_listings={
            "Salman2020Do_R50": "resnet50",
            "Standard_R50": "resnet50",
            "Engstrom2019Robustness": "resnet50",
            "Wong2020Fast": "resnet50",
            "resnet50_32_c10": "resnet50",
            "Salman2020Do_50_2": "wide_resnet50_2",
            "Chen2024Data_WRN_50_2": "wide_resnet50_2",
        },
        # Units near 0, where ReLU's derivative jumps: tests/models/families/test_resnet.py.
        golden32={},
        golden64={"resnet18": "Salman2020Do_R18", "wide_resnet50_2": "Salman2020Do_50_2"},
        fast64=("resnet18",),
        forward={name: (name, {}) for name in ("resnet50_gelu", "wide_resnet50_2")},
        references=dict.fromkeys(("resnet50", "resnet50_gelu", "wide_resnet50_2"), 64),
        digits={"resnet18": {"depths": (1, 1), "small_stem": True, "bn_group": 4}},
    ),
    "robust_resnet": Case(
        listings={},  # of smaller ones: tests/models/families/test_robust_resnet.py
        counts={"wrn_28_10": 36_479_194},
        golden32={},
        golden64={},
        references={},
        digits={
            "robustresnet_a1": {
                "depths": (2, 1),
                "planes": (16, 16),
                "bn_group": 4,
                "drop_path": 0.1,
            }
        },
        rows={
            "wrn_D222_W573": ("wrn_28_10", _D222_W573),
            "robustres_D222_W573": ("robustresnet_a1", _D222_W573),
        },
    ),
    "searched": Case(
        listings={},  # of smaller ones: tests/zoo/test_searched.py
        counts={},
        golden32={},
        golden64={},
        references={},
        digits={"racl_7_104": {"channels": 4, "cells": 3, "bn_group": 4}},
        rows={
            f"{cell}_C16_L5": (name, {"channels": 16, "cells": 5})
            for cell, name in _SEARCHED.items()
        },
    ),
    # Golden logits: tests/zoo/test_convolutional.py.
    "cifar_vgg": Case(
        listings={"cifar_vgg16": "vgg16_bn"},
        counts={"cifar_vgg16": 14_728_266},
        golden32={},
        golden64={},
        references={"cifar_vgg16_224": 224},
        digits={"cifar_vgg16": {"widths": (8, 16), "bn_group": 4}},
    ),
    "cifar_wide_resnet": Case(
        listings={"cifar_wrn_40_10": "wrn_40_10_biased"},
        counts={"cifar_wrn_40_10": 55_856_330},
        golden32={},
        golden64={},
        references={},
        digits={"cifar_wrn_40_10": {"depths": (1, 1), "width": 1, "bn_group": 4}},
    ),
    "cifar_densenet": Case(
        listings={"cifar_densenet": "densenet_16x4_k12"},
        counts={"cifar_densenet": 1_121_860},
        golden32={},
        golden64={},
        references={"cifar_densenet_224": 224},
        digits={
            "cifar_densenet": {
                "depths": (2, 1),
                "growth": 4,
                "stem": 8,
                "bn_group": 4,
                "drop_path": 0.1,
            }
        },
    ),
    "cifar_preact_resnet": Case(
        listings={"cifar_preactresnet50": "preactresnet50"},
        counts={"cifar_preactresnet50": 23_509_066},
        golden32={},
        golden64={},
        references={"cifar_preactresnet50_224": 224},
        digits={
            "cifar_preactresnet50": {"depths": (1, 1), "width": 4, "bn_group": 4, "drop_path": 0.1}
        },
    ),
    "cifar_resnext": Case(
        listings={"cifar_resnext29": "resnext29_2x64d"},
        counts={"cifar_resnext29": 9_128_778},
        golden32={},
        golden64={},
        references={"cifar_resnext50_224": 224},
        digits={"cifar_resnext29": {"depths": (1, 1), "width": 4, "bn_group": 4, "drop_path": 0.1}},
    ),
    # Golden logits and RobustBench's own: tests/zoo/test_deepmind.py.
    "dm_wide_resnet": Case(
        listings={},
        counts={"dm_wrn_28_10": 36_479_194, "ra_wrn_70_16": 267_240_802},
        golden32={},
        golden64={},
        references={},
        digits={
            "dm_wrn_28_10": {"depths": (2, 1), "channels": (8, 16), "stem": 8, "bn_group": 4},
            "ra_wrn_70_16": {
                **{"depths": (1, 2), "channels": (8, 16), "stem": 8, "bn_group": 4},
                **{"drop_path": 0.1, "scan": True},
            },
        },
    ),
    "ra_resnet": Case(
        listings={},
        counts={"ra_wrn_101_2": 104_065_776},
        golden32={},
        golden64={},
        references={},
        digits={"ra_wrn_101_2": {"depths": (2, 1), "channels": (16, 24), "stem": 8, "bn_group": 4}},
    ),
    "dm_preact_resnet": Case(
        listings={},
        counts={"dm_preactresnet18": 12_548_426},
        golden32={},
        golden64={},
        references={},
        digits={"dm_preactresnet18": {"depths": (1, 2), "width": 8, "bn_group": 4}},
    ),
    # Golden logits and references of the study's networks: tests/zoo.
    "cifar_vit": _study(
        *("cifar_vit", "vit_p4_d512_L6_mlphead"),
        **{"dim": 12, "depth": 3, "heads": 2, "hidden": 8, "dropout": 0.0, "image_size": 8},
        digits={
            "cifar_vit": {"patch": 2, "dim": 16, "depth": 2, "heads": 2, "hidden": 16, "scan": True}
        },
        rows={f"vit_p{patch}": ("cifar_vit", {"patch": patch}) for patch in (8, 2)},
    ),
    "cifar_mixer": _study(
        *("cifar_mixer", "mlp_mixer_h128_s512_c64_L8_cls"),
        **{"dim": 12, "depth": 3, "token_hidden": 8, "hidden": 8, "image_size": 8},
        digits={
            "cifar_mixer": {"patch": 2, "dim": 16, "depth": 2, "token_hidden": 16, "hidden": 16}
        },
    ),
    "cifar_poolformer": _study(
        *("cifar_poolformer", "poolformer_s12_k3s2p1", ()),
        **{"depths": (1, 2), "dims": (8, 12), "gamma_init": 0.1, "image_size": 8},
        digits={"cifar_poolformer": {"depths": (1, 1), "dims": (16, 16), "gamma_init": 0.1}},
    ),
    "cifar_cpvt": _study(
        "cifar_cpvt",
        **{"dim": 12, "depth": 3, "heads": 2, "hidden": 8, "dropout": 0.0, "image_size": 8},
        digits={"cifar_cpvt": {"patch": 2, "dim": 16, "depth": 2, "heads": 2, "hidden": 16}},
    ),
    "cifar_cct": _study(
        *("cifar_cct", "cct_7_3x1_32"),
        **{"dim": 12, "depth": 3, "heads": 2, "hidden": 8, "attention_dropout": 0.0},
        **{"image_size": 6},
        digits={"cifar_cct": {"dim": 16, "depth": 2, "heads": 2, "hidden": 16, "drop_path": 0.05}},
    ),
    # Golden logits and options: tests/zoo/test_hybrids.py.
    "cifar_botnet": Case(
        listings={"cifar_botnet50": "botnet50_3x3stem_nopool"},
        counts={"cifar_botnet50": 18_827_082},
        golden32={},
        golden64={},
        references={"cifar_botnet50_224": 224},
        digits={
            "cifar_botnet50": {
                "depths": (1, 1),
                "width": 4,
                "heads": 2,
                "bn_group": 4,
                "drop_path": 0.1,
            }
        },
    ),
    "cifar_ceit": Case(
        listings={"cifar_ceit": "ceit_t_32_4tokens"},
        counts={"cifar_ceit": 5_562_634},
        golden32={},
        golden64={},
        references={"cifar_ceit_224": 224},
        digits={
            "cifar_ceit": {
                **{"dim": 16, "depth": 2, "heads": 1, "patch": 2, "stem_width": 8, "bn_group": 4},
                **{"drop_path": 0.1, "scan": True},
            }
        },
    ),
    "cifar_levit": Case(
        listings={"cifar_levit": "levit_128s_32_stem4"},
        counts={"cifar_levit": 7_006_522},
        golden32={},
        golden64={},
        references={"cifar_levit_224": 224},
        digits={
            "cifar_levit": {
                **{
                    "dims": (16, 16),
                    "depths": (1, 1),
                    "heads": (2, 2),
                    "key_width": 8,
                    "bn_group": 4,
                },
                **{"stem_strides": (1, 1, 1, 1), "drop_path": 0.1},
            }
        },
    ),
    "cifar_mobilevit": Case(
        listings={"cifar_mobilevit": "mobilevit_s_32_s11"},
        counts={"cifar_mobilevit": 5_003_120},
        golden32={},
        golden64={},
        references={"cifar_mobilevit_224": 224},
        digits={
            "cifar_mobilevit": {
                **{"channels": (8, 8, 8), "strides": (1, 1, 2), "dims": (8,), "depths": (1,)},
                **{"ratios": (2,), "heads": 2, "bn_group": 4, "drop_path": 0.1},
            }
        },
    ),
    "cifar_vitae": Case(
        listings={"cifar_vitae": "vitae_14_10c"},
        counts={"cifar_vitae": 22_806_282},
        golden32={},
        golden64={},
        references={"cifar_vitae_224": 224},
        digits={
            "cifar_vitae": {
                **{"widths": (8, 8), "dims": (8, 16), "ratios": (2, 2), "kernels": (5, 3)},
                **{
                    "dilations": (2, 2),
                    "depth": 2,
                    "heads": 2,
                    "groups": 4,
                    "bn_group": 4,
                    "scan": True,
                },
            }
        },
    ),
    # Golden logits and behavior with batch norm: tests/zoo/test_stages.py.
    "cifar_coatnet": Case(
        listings={"cifar_coatnet": "coatnet0_CCTT"},
        counts={"cifar_coatnet": 16_997_816, "cifar_coatnet_224": 17_029_304},
        golden32={},
        golden64={},
        references={"cifar_coatnet_224": 224},
        digits={
            "cifar_coatnet": {
                **{
                    "dims": (8, 8, 8),
                    "depths": (1, 1, 1),
                    "order": "CT",
                    "heads": 2,
                    "head_dim": 4,
                },
                **{"bn_group": 4, "drop_path": 0.1},
            }
        },
    ),
    "cifar_pvt_v2": Case(
        listings={"cifar_pvt_v2": "pvt_v2_b1_linear"},
        counts={"cifar_pvt_v2": 12_406_474, "cifar_pvt_v2_224": 12_406_474},
        golden32={},
        golden64={},
        references={"cifar_pvt_v2_224": 224},
        small="cifar_pvt_v2",
        tiny={
            **{"dims": (6, 8), "depths": (1, 2), "heads": (1, 2), "ratios": (2, 2), "patch": 2},
            "image_size": 8,
        },
        outcomes=2**4,  # rates 0, 0.3 and 0.6: two blocks of two branches
        digits={
            "cifar_pvt_v2": {
                **{
                    "dims": (8, 16),
                    "depths": (1, 1),
                    "heads": (1, 2),
                    "ratios": (2, 2),
                    "patch": 2,
                },
                **{"drop_path": 0.1},
            }
        },
    ),
    "cifar_swin": Case(
        listings={"cifar_swin": "swin_t_ws4_ds2122"},
        counts={"cifar_swin": 27_428_086, "cifar_swin_224": 27_488_278},
        golden32={},
        golden64={},
        references={"cifar_swin_224": 224},
        small="cifar_swin",
        tiny={
            **{"dim": 6, "depths": (2,), "heads": (2,), "merges": (), "window": 2},
            "image_size": 8,
        },
        outcomes=2**2,  # rates 0 and 0.6: one block of two branches
        digits={
            "cifar_swin": {"dim": 8, "depths": (2, 2), "heads": (1, 2), "patch": 1, "merges": (2,)}
        },
    ),
    "cifar_cvt": Case(
        listings={"cifar_cvt": "cvt_s1k3_stride2"},
        counts={"cifar_cvt": 19_547_466, "cifar_cvt_224": 19_555_146},
        golden32={},
        golden64={},
        references={"cifar_cvt_224": 224},
        digits={
            "cifar_cvt": {
                **{
                    "dims": (8, 16),
                    "depths": (1, 1),
                    "heads": (1, 2),
                    "head_dim": 8,
                    "bn_group": 4,
                },
                **{"drop_path": 0.1},
            }
        },
    ),
}


def networks() -> dict[str, tuple[str, dict[str, Any]]]:
    """Listing of a reference network -> our name of it, and the options that make ours the same."""
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for case in CASES.values():
        found |= {listing: (name, {}) for listing, name in case.more_listings.items()}
        found |= {listing: (name, {}) for name, listing in case.listings.items()}
        found |= case.forward | case.rows
    return found
