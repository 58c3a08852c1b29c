"""timm's families at their smallest, with random weights and statistics."""

import numpy as np
import torch

from jaxrobust.publish import torch_networks

# timm's name -> side of its images: the smallest of each file of timm's, and kinds that are rare.
FAMILIES = {
    "bat_resnext26ts": 256,
    "beit_base_patch16_224": 224,
    "botnet26t_256": 256,
    "caformer_s18": 224,
    "cait_xxs24_224": 224,
    "coat_tiny": 224,
    "coatnet_0_rw_224": 224,
    "coatnet_nano_rw_224": 224,
    "convformer_s18": 224,
    "convmixer_768_32": 224,
    "convnext_atto": 224,
    "crossvit_9_240": 240,
    "cs3darknet_focus_s": 256,
    "davit_tiny": 224,
    "deit_tiny_patch16_224": 224,
    "densenet121": 224,
    "dla46x_c": 224,
    "dm_nfnet_f0": 192,
    "dpn48b": 224,
    "eca_nfnet_l0": 224,
    "edgenext_xx_small": 256,
    "efficientformer_l1": 224,
    "efficientformerv2_s0": 224,
    "efficientnet_b0": 224,
    "efficientnet_lite0": 224,
    "efficientvit_b0": 224,
    "efficientvit_m0": 224,
    "ese_vovnet19b_slim": 224,
    "eva02_tiny_patch14_224": 224,
    "fastvit_t8": 256,
    "focalnet_tiny_srf": 224,
    "gcvit_xxtiny": 224,
    "gernet_s": 224,
    "ghostnet_050": 224,
    "gmlp_ti16_224": 224,
    "halonet26t": 256,
    "hardcorenas_b": 224,
    "hgnetv2_b0": 224,
    "hiera_tiny_224": 224,
    "hrnet_w18_small": 224,
    "hrnet_w18_small_v2": 224,
    "inception_next_tiny": 224,
    "inception_resnet_v2": 299,
    "inception_v3": 299,
    "inception_v4": 299,
    "lambda_resnet26rpt_256": 256,
    "legacy_seresnet18": 224,
    "legacy_xception": 299,
    "levit_128s": 224,
    "maxvit_tiny_rw_224": 224,
    "mixer_s32_224": 224,
    "mobilenetv2_035": 224,
    "mobilenetv3_small_050": 224,
    "mobilenetv4_conv_small": 224,
    "mobileone_s0": 224,
    "mobilevit_xxs": 256,
    "mvitv2_tiny": 224,
    "nasnetalarge": 331,
    "nest_tiny": 224,
    "nextvit_small": 224,
    "nf_regnet_b0": 192,
    "pit_ti_224": 224,
    "pnasnet5large": 331,
    "poolformer_s12": 224,
    "pvt_v2_b0": 224,
    "rdnet_tiny": 224,
    "regnetx_002": 224,
    "repghostnet_050": 224,
    "repvgg_a0": 224,
    "repvit_m1": 224,
    "res2next50": 224,
    "resmlp_12_224": 224,
    "resnest14d": 224,
    "resnet10t": 176,
    "resnetv2_50": 224,
    "resnext26ts": 256,
    "rexnet_100": 224,
    "sam2_hiera_tiny": 224,
    "samvit_base_patch16_224": 224,
    "sebotnet33ts_256": 256,
    "selecsls42": 224,
    "sequencer2d_s": 224,
    "skresnet18": 224,
    "swin_tiny_patch4_window7_224": 224,
    "swinv2_cr_tiny_ns_224": 224,
    "swinv2_tiny_window8_256": 256,
    "tf_efficientnet_b0": 224,
    "tiny_vit_5m_224": 224,
    "tnt_s_patch16_224": 224,
    "tresnet_m": 224,
    "twins_pcpvt_small": 224,
    "twins_svt_small": 224,
    "vgg11": 224,
    "visformer_tiny": 224,
    "vit_relpos_small_patch16_224": 224,
    "vit_tiny_patch16_224": 224,
    "vit_tiny_r_s16_p8_224": 224,
    "vitamin_small_224": 224,
    "volo_d1_224": 224,
    "xception41p": 299,
    "xcit_nano_12_p8_224": 224,
}
# torchvision's smallest of each file -> side of its images, and its options.
TORCHVISION = {
    "alexnet": (64, {}),
    "convnext_tiny": (64, {}),
    "densenet121": (64, {}),
    "efficientnet_b0": (64, {}),
    "googlenet": (64, {"aux_logits": False, "init_weights": False}),
    "inception_v3": (160, {"aux_logits": False, "init_weights": False}),
    "maxvit_t": (224, {}),
    "mnasnet0_5": (64, {}),
    "mobilenet_v2": (64, {}),
    "mobilenet_v3_small": (64, {}),
    "regnet_y_400mf": (64, {}),
    "resnet18": (64, {}),
    "shufflenet_v2_x0_5": (64, {}),
    "squeezenet1_1": (64, {}),
    "swin_t": (64, {}),
    "vgg11_bn": (64, {}),
    "vit_b_32": (64, {"image_size": 64}),
}
SINGLE = {"convit_tiny": 224}  # PyTorch cannot multiply its float32 positions with float64 weights
SMALL = {  # at a size that fast tests can afford
    "resnet10t": {},
    "convnext_atto": {"depths": (1, 1, 1, 1)},
    "mobilenetv3_small_050": {},
    "vit_tiny_patch16_224": {"img_size": 64, "depth": 2},
    "xcit_nano_12_p8_224": {"depth": 2},
}
# Where PyTorch's own float64 is less exact: name -> (logits, gradients), why.
HARDSIGMOID = "its gradient has 1/6 in float32"
FLOAT = "its code says .float() or dtype=torch.float32"
LESS_EXACT = {
    "edgenext_xx_small": (1e-9, 1e-8, FLOAT),
    "efficientvit_b0": (1e-6, 1e-5, FLOAT),
    "hardcorenas_b": (1e-12, 1e-6, HARDSIGMOID),
    "rdnet_tiny": (1e-12, 1e-7, HARDSIGMOID),
    "repghostnet_050": (1e-12, 1e-8, HARDSIGMOID),
    "mobilenetv3_small_050": (1e-12, 1e-7, HARDSIGMOID),
    "ese_vovnet19b_slim": (1e-12, 1e-7, HARDSIGMOID),
}


def network(name: str, **options) -> torch.nn.Module:
    """Return timm's network in eval mode and float64."""
    torch.manual_seed(0)
    return randomised(torch_networks.import_timm().create_model(name, **options))


def of_torchvision(name: str, **options) -> torch.nn.Module:
    """Return torchvision's network in eval mode and float64."""
    import torchvision

    torch.manual_seed(0)
    return randomised(torchvision.models.get_model(name, weights=None, **options))


def randomised(net: torch.nn.Module) -> torch.nn.Module:
    """Return a network in eval mode and float64, with statistics and scales unlike those at first.

    All numbers are those of float32, so `net.float()` is the same network.
    """
    for key, buffer in net.eval().named_buffers():
        if key.endswith(("running_mean", "running_var")):
            buffer.copy_(0.1 * torch.randn(buffer.shape) + (1 if key.endswith("var") else 0))
            buffer.clamp_(min=-1 if key.endswith("mean") else 0.5)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.ndim < 2:  # scales that begin at 0 or 1e-6 would hide what they scale
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return net.double()


def images(size: int, count: int = 2) -> np.ndarray:
    return np.random.default_rng(0).random((count, size, size, 3))
