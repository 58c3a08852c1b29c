"""Clean training of new ConvStems (Singh, Croce, Hein 2023, Table 10).

    jaxrobust train --config configs/convstem_pretraining.py:convnext_t_cvst

timm's clean weights get a new ConvStem, and all weights are trained clean with heavy augmentation;
vit_s_cvst normalises images as in `revisiting_at.py`, the others take them raw.
Published clean accuracies, in %: convnext_t_cvst 80.9, iso_convnext_s_cvst 79.2, vit_s_cvst 79.3,
all after 100 epochs; vit_m_cvst 81.8, convnext_s_cvst 81.6, vit_b_cvst 81.6, convnext_b_cvst 82.6,
after 50. An adversarial run starts from such a one with `--config.init.weights=RUN
--config.init.stem=keep --config.pretrain.epochs=0`; `revisiting_at.py` does both in one run.
An epoch costs 3/8 of one against the attack, for which `revisiting_at.py` has figures. Hardware,
wall time, accuracies of ours: not yet measured.
"""

from configs import revisiting_at
from configs.revisiting_at import MODELS, start_from
from jaxrobust.config import read_arguments

ROWS = ("convnext_t_cvst", "vit_b_cvst")
SOURCES = revisiting_at.SOURCES | {
    "phases": "Table 10: clean training alone",
    "*.steps": "ours: clean networks withstand no step",
}


def get_config(arguments: str = ""):
    models = tuple(name for name in MODELS if name.endswith("_cvst"))
    config = start_from(read_arguments(arguments, model=models)["model"], "stem")
    config.data.augmentation = "heavy"
    config.phases = ("pretrain",)
    config.test.steps = 1  # clean networks withstand nothing
    config.evaluation.steps = 1
    return config
