"""The architectures of the core: the names of their networks -> "module:OBJECT"."""

FAMILIES = {
    (
        "convnext_t convnext_t_cvst convnext_s convnext_s_cvst convnext_b convnext_b_cvst "
        "convnext_l convnext_l_cvst convnext_n convnext_n_cvst"
    ): "jaxrobust.models.families.convnext:FAMILY",
    "internimage_t internimage_t_ps": "jaxrobust.models.families.internimage:FAMILY",
    "resnet18 resnet50 resnet50_gelu wide_resnet50_2 cifar_resnet50 resnet18_32px": (
        "jaxrobust.models.families.resnet:FAMILY"
    ),
    "iso_convnext_s iso_convnext_s_cvst": "jaxrobust.models.families.iso_convnext:FAMILY",
    "vit_s vit_s_cvst vit_m vit_m_cvst vit_b vit_b_cvst deit_s": (
        "jaxrobust.models.families.vit:FAMILY"
    ),
    "cait_xxs24 cait_s24 cait_s12": "jaxrobust.models.families.cait:FAMILY",
    (
        "xcit_n12 xcit_n12_p8 xcit_n12_p4 xcit_t12 xcit_t12_p8 xcit_t12_p4 xcit_t24 xcit_t24_p8 "
        "xcit_t24_p4 xcit_s12 xcit_s12_p8 xcit_s12_p4 xcit_s24 xcit_s24_p8 xcit_s24_p4 xcit_m12 "
        "xcit_m12_p8 xcit_m12_p4 xcit_l12 xcit_l12_p8 xcit_l12_p4"
    ): "jaxrobust.models.families.xcit:FAMILY",
    "swin_b swin_l swin_b_mimir swin_l_mimir": "jaxrobust.models.families.swin:FAMILY",
    (
        "wrn_28_10 wrn_34_10 wrn_34_12 wrn_46_14 wrn_70_16 wrn_34_r wrn_a1 wrn_a2 wrn_a3 wrn_a4 "
        "wrn_a4_silu robustresnet_a1 robustresnet_a2 robustresnet_a3 robustresnet_a4"
    ): "jaxrobust.models.families.robust_resnets.robust_resnet:FAMILY",
    (
        "dm_wrn_28_10 dm_wrn_34_10 dm_wrn_34_20 dm_wrn_70_16 dm_wrn_82_8 dm_wrn_94_16 "
        "dm_wrn_106_16 ra_wrn_70_16"
    ): "jaxrobust.models.families.robust_resnets.dm_wide_resnet:FAMILY",
    "dm_preactresnet18": "jaxrobust.models.families.robust_resnets.dm_preact_resnet:FAMILY",
    "ra_wrn_101_2": "jaxrobust.models.families.robust_resnets.ra_resnet:FAMILY",
}
