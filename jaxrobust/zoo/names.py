"""Additions to the registries of the core: name -> "module:OBJECT"."""

FAMILIES = {
    "robnet_large_v2 advrush_7_96 racl_7_104": "jaxrobust.zoo.searched:FAMILY",
    "cifar_vgg16 cifar_vgg16_224": "jaxrobust.zoo.convolutional.vgg:FAMILY",
    "cifar_wrn_40_10": "jaxrobust.zoo.convolutional.wide_resnet:FAMILY",
    "cifar_densenet cifar_densenet_224": "jaxrobust.zoo.convolutional.densenet:FAMILY",
    "cifar_preactresnet50 cifar_preactresnet50_224": (
        "jaxrobust.zoo.convolutional.preact_resnet:FAMILY"
    ),
    "cifar_resnext29 cifar_resnext50_224": "jaxrobust.zoo.convolutional.resnext:FAMILY",
    "cifar_vit cifar_vit_224": "jaxrobust.zoo.transformers.cifar_vit:FAMILY",
    "cifar_mixer cifar_mixer_224": "jaxrobust.zoo.transformers.mixer:FAMILY",
    "cifar_poolformer cifar_poolformer_224": ("jaxrobust.zoo.transformers.poolformer:FAMILY"),
    "cifar_cpvt cifar_cpvt_224": "jaxrobust.zoo.transformers.cpvt:FAMILY",
    "cifar_cct cifar_cct_224": "jaxrobust.zoo.transformers.cct:FAMILY",
    "cifar_botnet50 cifar_botnet50_224": "jaxrobust.zoo.transformers.botnet:FAMILY",
    "cifar_ceit cifar_ceit_224": "jaxrobust.zoo.transformers.ceit:FAMILY",
    "cifar_levit cifar_levit_224": "jaxrobust.zoo.transformers.levit:FAMILY",
    "cifar_mobilevit cifar_mobilevit_224": "jaxrobust.zoo.transformers.mobilevit:FAMILY",
    "cifar_vitae cifar_vitae_224": "jaxrobust.zoo.transformers.vitae:FAMILY",
    "cifar_coatnet cifar_coatnet_224": "jaxrobust.zoo.transformers.coatnet:FAMILY",
    "cifar_pvt_v2 cifar_pvt_v2_224": "jaxrobust.zoo.transformers.pvt_v2:FAMILY",
    "cifar_swin cifar_swin_224": "jaxrobust.zoo.transformers.cifar_swin:FAMILY",
    "cifar_cvt cifar_cvt_224": "jaxrobust.zoo.transformers.cvt:FAMILY",
}
OBJECTIVES = {
    "trades-awp": "jaxrobust.zoo.objectives.weight_perturbation:TRADES_AWP",
    "dkl": "jaxrobust.zoo.objectives.improved_kl:DKL",
    "hat": "jaxrobust.zoo.objectives.hat_examples:HAT",
    "ramp": "jaxrobust.zoo.objectives.norms.pairing:RAMP",
}
SEVERAL_NORMS = {
    "check": "jaxrobust.zoo.objectives.several:check",
    "attack": "jaxrobust.zoo.objectives.several:attack_of",
    "memory": "jaxrobust.zoo.objectives.several:memory",
    "averaged": "jaxrobust.zoo.objectives.several:averaged",
}
