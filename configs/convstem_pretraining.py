"""Clean training of new stems (Singh, Croce, Hein 2023, Table 10 and appendix C.3).

    jaxrobust train --config configs/convstem_pretraining.py:convnext_t_cvst

The arguments are a network and, as in `revisiting_at.py`, batch=4096. All weights are trained, not
those of the new ConvStem (of internimage_t_ps: PatchStem) alone.

Keys that are not defaults, by `jaxrobust why configs/convstem_pretraining.py:convnext_t_cvst`:

    model.dtype            "bfloat16": ours: what TPUs multiply; the authors' code uses float16
          autocast
    init.weights           "convnext_tiny.fb_in1k": Table 18, even where the authors' code has
          others (ViT-S, ViT-B); for InternImage appendix C.3: its authors' ImageNet-1k weights
    init.stem              "fresh": appendix A.1: a random stem on a body with clean weights
    data.augmentation      "heavy": Tables 1 (basic and heavy) and 16 (light, its 3-Aug); appendix
          A.2
    phases                 ["pretrain"]: Table 10: clean training only
    pretrain.epochs        100: appendix A.1: 100 clean epochs for small networks, 50 for others;
          C.3: 50 for InternImage with a PatchStem
    pretrain.batch_size    1408: appendix A.3: 1392, 1024, 864 and 756; ours: 1408 and 768, which 64
          devices divide, and 4096 for batch=4096; for InternImage ConvNeXt-T's
    train.batch_size       1408: appendix A.3: 1392, 1024, 864 and 756; ours: 1408 and 768, which 64
          devices divide, and 4096 for batch=4096; for InternImage ConvNeXt-T's
    evaluation.batch_size  512: ours: what fits in memory, which changes no result
    evaluation.steps       1: appendix A.3: one step chooses the epoch of small networks, ten steps
          that of others
    test.batch_size        512: ours: what fits in memory, which changes no result
    test.steps             1: ours: clean networks withstand no step

Published clean accuracies, in %: convnext_t_cvst 80.9, iso_convnext_s_cvst 79.2, vit_s_cvst 79.3,
all after 100 epochs; vit_m_cvst 81.8, convnext_s_cvst 81.6, vit_b_cvst 81.6, convnext_b_cvst 82.6,
internimage_t_ps 82.8, after 50.

`revisiting_at.py:MODEL` starts from the run of this config next to its own, and makes it first
where it is not finished. Without a network, begin it with timm's weights from a folder that
`jaxrobust import` wrote, by `--config.init.weights=FOLDER`: it is the same run. An epoch costs 3/8
of one against the attack, for which `revisiting_at.py` has figures. Hardware, wall time, accuracies
of ours: not yet measured.
"""

from configs import revisiting_at
from configs.revisiting_at import MODELS, NETWORKS, network_of, scale, start_from
from jaxrobust.config import read_arguments

ROWS = ("convnext_t_cvst", "vit_b_cvst", "internimage_t_ps")
SOURCES = revisiting_at.SOURCES | {
    "init.weights": "Table 18, even where the authors' code has others (ViT-S, ViT-B); for "
    "InternImage appendix C.3: its authors' ImageNet-1k weights",
    "phases": "Table 10: clean training only",
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
