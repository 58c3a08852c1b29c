"""Clean training of new stems (Singh, Croce, Hein 2023, Table 10 and appendix C.3).

    jaxrobust train --config configs/convstem_pretraining.py:convnext_t_cvst

The arguments are a network and, as in `revisiting_at.py`, batch=4096. timm's clean weights get a
new ConvStem, InternImage's authors' a PatchStem, and all weights are trained clean with heavy
augmentation; vit_s_cvst normalises
images as in `revisiting_at.py`, the others take them raw. Published clean accuracies, in %:
convnext_t_cvst 80.9, iso_convnext_s_cvst 79.2, vit_s_cvst 79.3, all after 100 epochs; vit_m_cvst
81.8, convnext_s_cvst 81.6, vit_b_cvst 81.6, convnext_b_cvst 82.6, internimage_t_ps 82.8, after 50.

`revisiting_at.py:MODEL` starts from the run of this config beside its own, and makes it first where
it is not finished. Without a network, begin it with timm's weights from a folder that `jaxrobust
import` wrote, by `--config.init.weights=FOLDER`: it is the same run. An epoch costs 3/8 of one
against the attack, for which `revisiting_at.py` has figures. Hardware, wall time, accuracies of
ours: not yet measured.
"""

from configs import revisiting_at
from configs.revisiting_at import MODELS, NETWORKS, network_of, scale, start_from
from jaxrobust.config import read_arguments

ROWS = ("convnext_t_cvst", "vit_b_cvst", "internimage_t_ps")
SOURCES = revisiting_at.SOURCES | {
    "init.weights": "Table 18, also where the authors' code has others (ViT-S, ViT-B); of "
    "InternImage appendix C.3: its authors' weights of ImageNet-1k",
    "phases": "Table 10: clean training alone",
    "*.steps": "ours: clean networks withstand no step",
}


def get_config(arguments: str = ""):
    models = tuple(name for name in MODELS if name not in NETWORKS)
    a = read_arguments(arguments, model=models, batch=(None, 4096))
    config = start_from(a["model"], "clean")
    network = network_of(a["model"])
    config.data.augmentation = "heavy"
    config.phases = ("pretrain",)
    config.pretrain.epochs = network.stem_epochs
    if a["batch"]:
        scale(config.pretrain, a["batch"])
    config.test.steps = 1  # clean networks withstand nothing
    config.evaluation.steps = 1
    return config
