"""From 4/255 to 8/255 (Singh, Croce, Hein 2023, Table 4): 25 epochs of fine-tuning.

    jaxrobust train --config configs/larger_radius.py:convnext_t_cvst

The arguments are a network and start=published|trained: the published network at 4/255, by its
RobustBench id, or that of `configs/revisiting_at.py:MODEL` (50 epochs), whose run next to this
one's workdir is used, or made first where it is not finished.

Keys that are not defaults, by `jaxrobust why configs/larger_radius.py:convnext_t_cvst`:

    model.dtype            "bfloat16": ours: what TPUs multiply; the authors' code uses float16
          autocast
    init.weights           "Singh2023Revisiting_ConvNeXt-T-ConvStem": Table 4: the networks at
          4/255; their names are RobustBench's
    data.augmentation      "heavy": Tables 1 (basic and heavy) and 16 (light, its 3-Aug); appendix
          A.2
    train.epochs           25: appendix A.5
    train.batch_size       1408: appendix A.3: 1392, 1024, 864 and 756; ours: 1408 and 768, which 64
          devices divide, and 4096 for batch=4096; for InternImage ConvNeXt-T's
    train.lr               0.0001: appendix A.5
    train.warmup_epochs    5: appendix A.5: the peak is at epoch 5
    attack.epsilon         0.03137254901960784: Table 4
    evaluation.batch_size  512: ours: what fits in memory, which changes no result
    evaluation.steps       1: appendix A.3: one step chooses the epoch of small networks, ten steps
          that of others
    test.batch_size        512: ours: what fits in memory, which changes no result

Published in %, clean and under AutoAttack at 8/255: vit_s_cvst 67.5, 28.2; convnext_t_cvst 68.6,
29.6; convnext_b_cvst 71.7, 33.2. The paper's ConvNeXt-B had 50 epochs at 4/255 (start=trained), and
RobustBench's has 250, whose weights alone are public. `--config.init.weights=RUN` starts from
another run. An epoch costs what it does in `revisiting_at.py`. Hardware, wall time, accuracies of
ours: not yet measured.
"""

from configs import revisiting_at
from configs.revisiting_at import NETWORKS
from jaxrobust.config import base, read_arguments

PUBLISHED = {
    "convnext_t_cvst": "Singh2023Revisiting_ConvNeXt-T-ConvStem",
    "vit_s_cvst": "Singh2023Revisiting_ViT-S-ConvStem",
    "convnext_b_cvst": "Singh2023Revisiting_ConvNeXt-B-ConvStem",
}
ROWS = ("convnext_t_cvst",)
SOURCES = revisiting_at.SOURCES | {
    "init.weights": "Table 4: the networks at 4/255; their names are RobustBench's",
    "attack.epsilon": "Table 4",
    "train.epochs": "appendix A.5",
    "train.lr": "appendix A.5",
    "train.warmup_epochs": "appendix A.5: the peak is at epoch 5",
}


def get_config(arguments: str = ""):
    a = read_arguments(arguments, model=tuple(PUBLISHED), start=("published", "trained"))
    model = a["model"]
    config = base()
    config.model.update(name=model, dtype="bfloat16")
    config.init.weights = PUBLISHED[model]
    if a["start"] == "trained":
        config.init.weights = f"run:revisiting_at:{model}"
    config.data.augmentation = "heavy"
    config.attack.epsilon = 8 / 255
    network = NETWORKS[model.removesuffix("_cvst")]
    config.train.update(epochs=25, lr=1e-4, warmup_epochs=5, batch_size=network.batch)
    config.evaluation.steps = network.selection_steps
    config.evaluation.batch_size = config.test.batch_size = 512
    return config
