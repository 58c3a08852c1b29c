"""RobustBench's zoo: one network of each kind, with random weights and statistics.

An id is written DATASET/THREAT/ID, as in robustbench's own tables.
"""

import contextlib
import hashlib
import io
import socket
from collections.abc import Iterator
from unittest import mock

import numpy as np
import torch

from jaxrobust.publish import torch_networks
from tests.support import torch_families

SIDES = {"cifar10": 32, "cifar100": 32, "imagenet": 224}
# The first id of each network that is printed differently or has weights of other shapes.
NETWORKS = (
    "cifar10/Linf/Andriushchenko2020Understanding",
    "cifar10/Linf/Carmon2019Unlabeled",
    "cifar10/Linf/Hendrycks2019Using",
    "cifar10/Linf/Zhang2019Theoretically",
    "cifar10/Linf/Engstrom2019Robustness",
    "cifar10/Linf/Chen2020Adversarial",
    "cifar10/Linf/Wong2020Fast",
    "cifar10/Linf/Ding2020MMA",
    "cifar10/Linf/Wu2020Adversarial",
    "cifar10/Linf/Gowal2020Uncovering_28_10_extra",
    "cifar10/Linf/Sehwag2021Proxy_R18",
    "cifar10/Linf/Sehwag2021Proxy_ResNest152",
    "cifar10/Linf/Chen2020Efficient",
    "cifar10/Linf/Sridhar2021Robust_34_15",
    "cifar10/Linf/Rebuffi2021Fixing_R18_ddpm",
    "cifar10/Linf/Rade2021Helper_extra",
    "cifar10/Linf/Huang2021Exploring",
    "cifar10/Linf/Dai2021Parameterizing",
    "cifar10/Linf/Standard",
    "cifar10/Linf/Debenedetti2022Light_XCiT-S12",
    "cifar10/Linf/Debenedetti2022Light_XCiT-M12",
    "cifar10/Linf/Debenedetti2022Light_XCiT-L12",
    "cifar10/Linf/Huang2022Revisiting_WRN-A4",
    "cifar10/Linf/Wang2023Better_WRN-28-10",
    "cifar10/Linf/Bartoldson2024Adversarial_WRN-82-8",
    "cifar10/L2/Augustin2020Adversarial",
    "cifar10/L2/Rice2020Overfitting",
    "cifar10/L2/Rony2019Decoupling",
    "cifar10/L2/Augustin2020Adversarial_34_10",
    "cifar10/corruptions/Diffenderfer2021Winning_LRR",
    "cifar10/corruptions/Diffenderfer2021Winning_Binary",
    "cifar10/corruptions/Diffenderfer2021Winning_Binary_CARD_Deck",
    "cifar10/corruptions/Hendrycks2020AugMix_WRN",
    "cifar10/corruptions/Hendrycks2020AugMix_ResNeXt",
    "cifar10/corruptions/Kireev2021Effectiveness_Gauss50percent",
    "cifar10/corruptions/Modas2021PRIMEResNet18",
    "cifar100/Linf/Cui2020Learnable_34_10_LBGAT0",
    "cifar100/Linf/Chen2020Efficient",
    "cifar100/Linf/Wu2020Adversarial",
    "cifar100/Linf/Sehwag2021Proxy",
    "cifar100/Linf/Hendrycks2019Using",
    "cifar100/Linf/Rice2020Overfitting",
    "cifar100/Linf/Rebuffi2021Fixing_28_10_cutmix_ddpm",
    "cifar100/Linf/Rebuffi2021Fixing_R18_ddpm",
    "cifar100/Linf/Addepalli2021Towards_PARN18",
    "cifar100/Linf/Addepalli2022Efficient_RN18",
    "cifar100/Linf/Debenedetti2022Light_XCiT-S12",
    "cifar100/Linf/Debenedetti2022Light_XCiT-M12",
    "cifar100/Linf/Debenedetti2022Light_XCiT-L12",
    "cifar100/Linf/Wang2023Better_WRN-28-10",
    "cifar100/corruptions/Diffenderfer2021Winning_LRR",
    "cifar100/corruptions/Diffenderfer2021Winning_Binary",
    "cifar100/corruptions/Diffenderfer2021Winning_Binary_CARD_Deck",
    "cifar100/corruptions/Hendrycks2020AugMix_WRN",
    "cifar100/corruptions/Hendrycks2020AugMix_ResNeXt",
    "cifar100/corruptions/Modas2021PRIMEResNet18",
    "imagenet/Linf/Wong2020Fast",
    "imagenet/Linf/Salman2020Do_R18",
    "imagenet/Linf/Salman2020Do_50_2",
    "imagenet/Linf/Debenedetti2022Light_XCiT-S12",
    "imagenet/Linf/Debenedetti2022Light_XCiT-M12",
    "imagenet/Linf/Debenedetti2022Light_XCiT-L12",
    "imagenet/Linf/Singh2023Revisiting_ViT-S-ConvStem",
    "imagenet/Linf/Singh2023Revisiting_ViT-B-ConvStem",
    "imagenet/Linf/Singh2023Revisiting_ConvNeXt-T-ConvStem",
    "imagenet/Linf/Singh2023Revisiting_ConvNeXt-S-ConvStem",
    "imagenet/Linf/Singh2023Revisiting_ConvNeXt-B-ConvStem",
    "imagenet/Linf/Liu2023Comprehensive_ConvNeXt-B",
    "imagenet/Linf/Liu2023Comprehensive_Swin-B",
    "imagenet/Linf/Peng2023Robust",
    "imagenet/Linf/Chen2024Data_WRN_50_2",
    "imagenet/Linf/Mo2022When_ViT-B",
    "imagenet/Linf/Xu2024MIMIR_Swin-B",
    "imagenet/corruptions/AlexNet",
    "imagenet/corruptions/Tian2022Deeper_DeiT-S",
    "imagenet/corruptions/Tian2022Deeper_DeiT-B",
)
LARGE = (  # more than 150 million parameters: one image at a time in float64, for memory
    "cifar10/Linf/Rice2020Overfitting",
    "cifar10/Linf/Pang2020Boosting",
    "cifar10/Linf/Gowal2020Uncovering_70_16",
    "cifar10/Linf/Gowal2020Uncovering_34_20",
    "cifar10/Linf/Cui2020Learnable_34_20",
    "cifar10/Linf/Rebuffi2021Fixing_106_16_cutmix_ddpm",
    "cifar10/Linf/Chen2021LTD_WRN34_20",
    "cifar10/Linf/Jia2022LAS-AT_70_16",
    "cifar10/Linf/Wang2023Better_WRN-70-16",
    "cifar10/Linf/Peng2023Robust",
    "cifar10/Linf/Amini2024MeanSparse_Ra_WRN_70_16",
    "cifar10/Linf/Amini2024MeanSparse_S-WRN-94-16",
    "cifar10/Linf/Bartoldson2024Adversarial_WRN-94-16",
    "cifar10/L2/Amini2024MeanSparse_S-WRN-70-16",
    "cifar10/corruptions/Diffenderfer2021Winning_LRR_CARD_Deck",
    "cifar100/Linf/Gowal2020Uncovering",
    "cifar100/Linf/Cui2020Learnable_34_20_LBGAT6",
    "cifar100/Linf/Jia2022LAS-AT_34_20",
    "cifar100/Linf/Wang2023Better_WRN-70-16",
    "cifar100/Linf/Amini2024MeanSparse_S-WRN-70-16",
    "cifar100/corruptions/Diffenderfer2021Winning_LRR_CARD_Deck",
    "imagenet/Linf/Singh2023Revisiting_ConvNeXt-L-ConvStem",
    "imagenet/Linf/Liu2023Comprehensive_ConvNeXt-L",
    "imagenet/Linf/Liu2023Comprehensive_Swin-L",
    "imagenet/Linf/Amini2024MeanSparse_ConvNeXt-L",
    "imagenet/Linf/Amini2024MeanSparse_Swin-L",
    "imagenet/Linf/Xu2024MIMIR_Swin-L",
)
MIXED = r"data-dependent .*mixing_net\.py"  # it asserts that no result of the images is NaN
REFUSED = {  # id -> what our message says
    "cifar10/Linf/Kang2021Stable": "data-dependent",  # an ODE, in as many steps as images need
    "cifar10/Linf/Bai2024MixedNUTS": MIXED,
    "cifar100/Linf/Bai2024MixedNUTS": MIXED,
    "imagenet/Linf/Bai2024MixedNUTS": MIXED,
}
CUDA = "its builder moves the mean of the images to a CUDA device, whether there is one or not"
OUT = {  # id -> why robustbench cannot make it
    "cifar10/Linf/Bai2023Improving_edm": CUDA,
    "cifar100/Linf/Bai2023Improving_edm": CUDA,
    "cifar100/Linf/Bai2023Improving_trades": CUDA,
}


def ids() -> list[str]:
    """Return all ids of the installed robustbench."""
    torch_networks.import_robustbench()
    from robustbench.model_zoo.models import model_dicts

    return [
        f"{dataset.value}/{threat.value}/{name}"
        for dataset, threats in model_dicts.items()
        for threat, entries in threats.items()
        for name in entries
    ]


def module(key: str) -> torch.nn.Module:
    """Return the module of an id, as robustbench makes it without its weights.

    Raises:
      Exception: robustbench cannot make it, or asks for a download.
    """
    torch_networks.import_robustbench()
    import timm
    from robustbench.model_zoo.enums import BenchmarkDataset, ThreatModel
    from robustbench.model_zoo.models import model_dicts

    dataset, threat, name = key.split("/")
    # Builders that ask for weights of the network that they build, under the name that robustbench
    # has registered it with: its table has 2020 for the 2022 of XCiT, and no threat for AlexNet.
    registered = f"{name.lower().replace('-', '_')}_{dataset}_{threat.lower()}"
    with _offline(), contextlib.redirect_stdout(io.StringIO()):
        if timm.is_model(registered):
            return timm.create_model(registered, pretrained=False)
        if name == "Standard_R50":  # as its neighbors, with weights of torchvision
            name = {"Linf": "Salman2020Do_R50", "corruptions": "Hendrycks2020Many"}[threat]
        return model_dicts[BenchmarkDataset(dataset)][ThreatModel(threat)][name]["model"]()


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Refuse every host name, so that a builder that wants weights fails at once."""
    refused = OSError("robustbench's zoo is built without a network")
    with mock.patch.object(socket, "getaddrinfo", side_effect=refused):
        yield


def network(key: str) -> torch.nn.Module:
    """Return the network of an id in eval mode and float64."""
    torch.manual_seed(0)
    net = torch_families.randomised(module(key))
    for name, buffer in net.named_buffers():
        if name.endswith("threshold"):  # of MeanSparse, which at 0 does nothing
            buffer.fill_(0.25)
    return net


def images(key: str) -> np.ndarray:
    """Return images for it, as many as `torch_side.errors` asks for."""
    return torch_families.images(SIDES[key.split("/")[0]], 16)


def kind(net: torch.nn.Module) -> str:
    """Return what tells networks apart: how they are printed, and the shapes of their arrays."""
    shapes = {name: tuple(array.shape) for name, array in net.state_dict().items()}
    return hashlib.sha256(f"{net} {shapes}".encode()).hexdigest()
