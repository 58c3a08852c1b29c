"""Runs of "Revisiting Adversarial Training for ImageNet" (Singh, Croce, Hein 2023) at 4/255.

    jaxrobust train --config configs/revisiting_at.py:convnext_t_cvst,epochs=300

The first argument is a network of Table 2; the others, with their defaults first, are

    start=stem|clean|random|21k    stem (of a ConvStem): timm's clean weights get a new stem and are
                                   trained clean before (A.1), which is a separate run that all
                                   rows of a network share: that of `convstem_pretraining.py`,
                                   next to this one's workdir, trained first where it is not
                                   finished; clean: they are attacked at once, with a new stem where
                                   theirs is different; 21k: pre-trained there. internimage_t has
                                   its ConvStem from the start, and internimage_t_ps a new PatchStem
    augmentation=heavy|light|basic of the epochs against the attack; light: the 3-Aug of Table 16
    epochs=50|250|300, steps=2|1|3, attack=apgd|pgd
    weight_decay=0.05|0.5|0.005, label_smoothing=0.1|0.0|0.2 (Table 17), of these epochs too
    batch=4096                     instead of the paper's, in its start too, for slices of 256
                                   chips, with the learning rate times the square root of the ratio
                                   (as suits Adam: Malladi et al. 2022, arXiv 2205.10287): ours, not
                                   the paper's, and not yet measured
    stem=...                       with start=clean (Tables 7 to 9): of convnext_t_cvst 7x7/4,
                                   7x7/4+3x3/1, 7x7/2+3x3/2, 5x5/2+3x3/2; of convnext_b_cvst C1; of
                                   vit_s_cvst C2, C3, C4, C5

What is published of the runs, in %: clean, and under AutoAttack Linf 4/255, L2 2, L1 75 (Table 1;
rows with two decimals are Table 2's; * Tables 11 and 12, + Table 15, ^ Table 16):

    convnext_t,start=random,augmentation=basic            64.0   37.1   28.9    8.8
    convnext_t,augmentation=basic                         69.4   41.6   42.4   18.9
    convnext_t                                            71.0   46.5   38.1   14.9
    convnext_t,epochs=300                                 72.40  48.60  38.02  14.88
    convnext_t,attack=pgd                               * 72.8   45.4   39.1   16.5
    convnext_t,start=21k                                + 71.6   46.7
    convnext_t,start=21k,epochs=300                     + 72.2   48.3
    convnext_t_cvst,start=random,augmentation=basic       64.2   37.6   40.2   18.6
    convnext_t_cvst,start=clean (Table 7)                 69.5   46.2   47.8   27.7
    convnext_t_cvst,augmentation=basic                    69.1   42.2   42.4   19.7
    convnext_t_cvst,augmentation=light                  ^ 71.2   45.3   45.6   19.6
    convnext_t_cvst                                       69.1   47.5   47.8   24.6
    convnext_t_cvst,steps=1                             * 71.0   46.4
    convnext_t_cvst,epochs=300                            72.72  49.46  48.42  24.52
    convnext_t_cvst,epochs=300,steps=3                    72.70  50.16  49.00  24.16
    convnext_s                                            74.10  52.32  43.84  19.52
    convnext_s_cvst                                       74.10  52.42  50.88  25.64
    convnext_b                                            75.62  54.34  48.52  23.70
    convnext_b_cvst                                       75.32  54.38  50.06  24.76
    convnext_b_cvst,epochs=250                            75.90  56.14  49.12  23.34
    convnext_b_cvst,epochs=250,steps=3                    75.18  56.28  49.40  23.60
    iso_convnext_s,start=random,augmentation=basic        60.5   31.7   20.8    4.0
    iso_convnext_s,augmentation=basic                     68.0   38.9   38.3   17.0
    iso_convnext_s                                        64.5   38.5   36.5   17.7
    iso_convnext_s,epochs=300                             69.04  44.22  36.64  14.88
    iso_convnext_s_cvst,start=random,augmentation=basic   62.1   33.5   40.0   23.8
    iso_convnext_s_cvst,augmentation=basic                69.5   41.8   46.2   26.9
    iso_convnext_s_cvst                                   69.5   42.1   47.2   28.9
    iso_convnext_s_cvst,epochs=300                        70.02  45.90  49.24  27.84
    vit_s,start=random,augmentation=basic                 61.5   31.8   35.5   15.1
    vit_s,augmentation=basic                              66.8   39.1   34.5   12.6
    vit_s                                                 65.2   39.2   37.3   16.2
    vit_s,epochs=300                                      69.22  44.04  37.52  15.12
    vit_s_cvst,start=random,augmentation=basic            62.8   34.4   39.2   20.4
    vit_s_cvst,start=clean (Table 9)                      68.0   43.3   46.3   27.0
    vit_s_cvst,augmentation=basic                         71.2   44.3   47.1   23.2
    vit_s_cvst,augmentation=light                       ^ 70.1   43.6   46.1   23.4
    vit_s_cvst                                            69.9   44.0   47.1   25.9
    vit_s_cvst,epochs=300                                 72.56  48.08  50.40  26.68
    vit_m                                                 71.72  47.24  49.02  29.20
    vit_m_cvst                                            72.40  48.80  50.56  28.12
    vit_b                                                 73.32  50.02  52.14  33.12
    vit_b,start=21k                                     + 73.5   49.6
    vit_b_cvst                                            74.38  52.58  54.38  31.20
    vit_b_cvst,epochs=250                                 76.30  54.66  56.30  32.06
    internimage_t (Table 13)                              72.9   47.0   48.5   25.9
    internimage_t_ps (Table 13)                           72.7   47.0   47.2   24.5

Stems, with start=clean: 7x7/4 69.8, 46.6, 38.4, 17.6; 7x7/4+3x3/1 67.5, 43.6, 37.9, 15.7;
7x7/2+3x3/2 69.6, 47.6, 38.8, 18.7; 5x5/2+3x3/2 70.2, 47.4, 44.2, 21.2; C1 75.2, 54.2, 48.9, 24.0;
C2 64.8, 41.1, 45.3, 28.3; C3 64.5, 40.3, 46.2, 32.3; C4 64.7, 40.4, 46.4, 32.6; C5 64.6, 39.3,
45.8, 33.2. Table 17 has robust accuracies only: weight_decay=0.5 37.2 for ViT-S + ConvStem and 27.5
for ConvNeXt-T + ConvStem, 0.005 44.0 and 47.2; label_smoothing=0.0 44.0, 47.4, and 0.2 44.2, 47.3.

Keys that are not defaults, by `jaxrobust why configs/revisiting_at.py:vit_s_cvst`:

    model.name             "vit_s_cvst": Tables 2 and 13
    model.dtype            "bfloat16": ours: what TPUs multiply; the authors' code uses float16
          autocast
    init.weights           "run:convstem_pretraining:vit_s_cvst": appendix A.1: a run with the new
          stem's clean epochs; without these Table 18, even where the authors' code uses
          ImageNet-21k's (ViT-S, ViT-B); for ImageNet-21k Table 15, which does not name ConvNeXt-T's
          weights: timm's are our choice; for InternImage appendix C.3: its authors' ImageNet-1k
          weights
    init.normalize         "imagenet": RobustBench: only its ViT-S + ConvStem normalizes; the
          authors' code does not, and for the runs of other rows it is unknown
    data.augmentation      "heavy": Tables 1 (basic and heavy) and 16 (light, its 3-Aug); appendix
          A.2
    pretrain.batch_size    1408: appendix A.3: 1392, 1024, 864 and 756; ours: 1408 and 768, which 64
          devices divide, and 4096 for batch=4096; for InternImage ConvNeXt-T's
    train.batch_size       1408: appendix A.3: 1392, 1024, 864 and 756; ours: 1408 and 768, which 64
          devices divide, and 4096 for batch=4096; for InternImage ConvNeXt-T's
    evaluation.batch_size  512: ours: what fits in memory, which changes no result
    evaluation.steps       1: appendix A.3: one step chooses the epoch of small networks, ten steps
          that of others
    test.batch_size        512: ours: what fits in memory, which changes no result

Where paper and code differ we follow the paper for the clean weights, and the code for label
smoothing, which belongs to mixing and so is off with basic and light augmentation, and for the
moving average of 0.9999, the default. Of InternImage (appendix C.3) neither the batch is told nor
what is decayed nor how the best epoch is chosen: here these are ConvNeXt-T's. Its head has the only
batch norm of these networks, whose running statistics the attack reads.

Cost at best: an epoch against the attack takes 0.13 hours of one v5e chip for convnext_t_cvst, 0.46
for convnext_b_cvst and 0.14 for vit_s_cvst by peak FLOPs, 0.45 for convnext_t_cvst and 0.26 for
vit_s_cvst by the compiler's schedule, and 1.21 for convnext_b_cvst by the cycles that the compiler
and our kernels declare; with steps=3 5/4 and a clean one 3/8 of that. So much the compiled step
allows (`python tools/bench_step.py configs/revisiting_at.py:vit_s_cvst --topology v5e:4x4 --batch
88 --fsdp 0 --bundles`); no chip has measured it, nor wall time or accuracies of ours. The other
networks are not yet compiled.
"""

import math
from typing import Any, NamedTuple

from jaxrobust.config import ArgumentError, base, read_arguments

_META = "https://dl.fbaipublicfiles.com/convnext/convnext_iso_small_1k_224_ema.pth"
_OPENGV = "https://huggingface.co/OpenGVLab/InternImage/resolve/main/internimage_t_1k_224.pth"


class Network(NamedTuple):
    """A network of the paper."""

    clean: str  # weights of ImageNet-1k that it starts from
    batch: int
    stem_epochs: int  # of clean training, where it has a ConvStem
    large: str = ""  # weights of ImageNet-21k, where the paper has such a run
    selection_steps: int = 10  # of APGD, that choose the best epoch
    other: str = "_cvst"  # suffix of the network with a stem that its clean weights do not have


NETWORKS = {
    "convnext_t": Network(
        "convnext_tiny.fb_in1k", 1408, 100, "convnext_tiny.fb_in22k_ft_in1k", selection_steps=1
    ),
    "convnext_s": Network("convnext_small.fb_in1k", 1024, 50),
    "convnext_b": Network("convnext_base.fb_in1k", 768, 50),
    "iso_convnext_s": Network(_META, 1408, 100, selection_steps=1),
    "vit_s": Network("deit_small_patch16_224.fb_in1k", 1408, 100, selection_steps=1),
    "vit_m": Network("deit3_medium_patch16_224.fb_in1k", 1024, 50),
    "vit_b": Network(
        "vit_base_patch16_224.augreg_in1k", 864, 50, "vit_base_patch16_224.augreg_in21k_ft_in1k"
    ),
    "internimage_t": Network(_OPENGV, 1408, 50, selection_steps=1, other="_ps"),
}
# Which the published weights normalize by ImageNet's mean and std; the others take raw images.
NORMALISED = ("vit_s_cvst",)
# (network, stem) -> widths, strides and kernels of its convolutions. The paper says nothing of the
# widths of Table 7, where these give its multiply-adds, nor of the kernels of stride 1 in Table 9.
STEMS = {
    ("convnext_t_cvst", "7x7/4"): ((96,), (4,), (7,)),
    ("convnext_t_cvst", "7x7/4+3x3/1"): ((48, 96), (4, 1), (7, 3)),
    ("convnext_t_cvst", "7x7/2+3x3/2"): ((48, 96), (2, 2), (7, 3)),
    ("convnext_t_cvst", "5x5/2+3x3/2"): ((48, 96), (2, 2), (5, 3)),
    ("convnext_b_cvst", "C1"): ((64, 128), (2, 2), (3, 3)),
    ("vit_s_cvst", "C2"): ((48, 48, 48, 384), (2, 2, 2, 2), (3, 3, 3, 3)),
    ("vit_s_cvst", "C3"): ((48, 384), (4, 4), (7, 7)),
    ("vit_s_cvst", "C4"): ((48, 96, 192, 384), (4, 2, 2, 1), (7, 3, 3, 3)),
    ("vit_s_cvst", "C5"): ((48, 96, 192, 384), (4, 4, 1, 1), (7, 7, 3, 3)),
}
MODELS = tuple(f"{name}{stem}" for name, row in NETWORKS.items() for stem in ("", row.other))
# The text of these rows is reviewed in tests/golden_configs.
ROWS = (
    "convnext_t,start=random,augmentation=basic",
    "convnext_t,attack=pgd",
    "convnext_t,start=21k,epochs=300",
    "convnext_t_cvst,start=clean,stem=7x7/2+3x3/2",
    "convnext_t_cvst,epochs=300,steps=3",
    "convnext_b_cvst,batch=4096",
    "iso_convnext_s_cvst",
    "vit_s_cvst,augmentation=light",
    "vit_m",
    "vit_b_cvst,epochs=250,weight_decay=0.5,label_smoothing=0.2",
    "internimage_t",
    "internimage_t_ps",
)
# Where the value of each key comes from that is not a default: `jaxrobust why` prints it.
SOURCES = {
    "model.name": "Tables 2 and 13",
    "model.dtype": "ours: what TPUs multiply; the authors' code uses float16 autocast",
    "model.options": "Tables 7 to 9; widths and kernels that they leave out are ours",
    "init.weights": "appendix A.1: a run with the new stem's clean epochs; without these Table "
    "18, even where the authors' code uses ImageNet-21k's (ViT-S, ViT-B); for ImageNet-21k Table "
    "15, which does not name ConvNeXt-T's weights: timm's are our choice; for InternImage "
    "appendix C.3: its authors' ImageNet-1k weights",
    "init.stem": "appendix A.1: a random stem on a body with clean weights",
    "init.normalize": "RobustBench: only its ViT-S + ConvStem normalizes; the authors' code does "
    "not, and for the runs of other rows it is unknown",
    "data.augmentation": "Tables 1 (basic and heavy) and 16 (light, its 3-Aug); appendix A.2",
    "label_smoothing": "Table 17; authors' code: it belongs to mixing",
    "pretrain.epochs": "appendix A.1: 100 clean epochs for small networks, 50 for others; C.3: 50 "
    "for InternImage with a PatchStem",
    "*.batch_size": "appendix A.3: 1392, 1024, 864 and 756; ours: 1408 and 768, which 64 devices "
    "divide, and 4096 for batch=4096; for InternImage ConvNeXt-T's",
    "evaluation.batch_size": "ours: what fits in memory, which changes no result",
    "test.batch_size": "ours: what fits in memory, which changes no result",
    "*.lr": "ours: batch=4096 has the paper's rate times the square root of the ratio",
    "train.epochs": "Tables 1 and 2: 50, 250 and 300",
    "train.warmup_epochs": "appendix A.2: the peak is at epoch 10, or 20 for 250 and 300 epochs",
    "train.weight_decay": "Table 17",
    "train.from_random": "Table 1: an attack on random weights is intended",
    "attack.name": "Table 12, which does not state PGD's step and start; ours: the attack's own "
    "step, from the image",
    "attack.steps": "Tables 2, 11 and 12",
    "evaluation.steps": "appendix A.3: one step chooses the epoch of small networks, ten steps "
    "that of others",
}


def get_config(arguments: str = ""):
    a = read_arguments(
        arguments,
        model=MODELS,
        start=(None, "stem", "clean", "random", "21k"),
        augmentation=("heavy", "light", "basic"),
        epochs=(50, 250, 300),
        steps=(2, 1, 3),
        attack=("apgd", "pgd"),
        weight_decay=(0.05, 0.5, 0.005),
        label_smoothing=(None, 0.1, 0.0, 0.2),
        stem=(None, *dict.fromkeys(stem for _, stem in STEMS)),
        batch=(None, 4096),
    )
    config = start_from(a["model"], a["start"] or default_start(a["model"]))
    network = network_of(a["model"])
    config.data.augmentation = a["augmentation"]
    if a["stem"]:
        _set_stem(config, a["stem"], a["start"])
    if a["label_smoothing"] is not None:
        if a["augmentation"] != "heavy":
            raise ArgumentError("label_smoothing belongs to mixing; use augmentation=heavy for it")
        config.label_smoothing = a["label_smoothing"]
    config.attack.update(name=a["attack"], steps=a["steps"])
    config.train.update(epochs=a["epochs"], weight_decay=a["weight_decay"])
    config.train.update(warmup_epochs=10 if a["epochs"] == 50 else 20)
    config.train.from_random = a["start"] == "random"  # as the paper's first rows
    config.evaluation.steps = network.selection_steps
    if a["batch"]:
        for part in (config.pretrain, config.train):
            scale(part, a["batch"])
        if str(config.init.weights).startswith("run:"):
            config.init.weights += f",batch={a['batch']}"
    return config


def scale(part: Any, batch: int) -> None:
    """Give a phase another batch, and the learning rate that suits it under Adam."""
    lr = part.lr * math.sqrt(batch / part.batch_size)
    part.update(batch_size=batch, lr=round(lr, 6))


def _set_stem(config: Any, stem: str, start: str | None) -> None:
    """Give a network a stem of Tables 7 to 9."""
    model = config.model.name
    own = [known for name, known in STEMS if name == model]
    if stem not in own:
        meant = f"choose one of {', '.join(own)}" if own else "leave it out"
        raise ArgumentError(f"stem={stem} is not a stem of {model}; {meant}")
    if start != "clean":
        raise ArgumentError(f"stem={stem} was trained without clean epochs; add start=clean")
    names = ("stem_widths", "stem_strides", "stem_kernels")
    config.model.options = dict(zip(names, STEMS[model, stem], strict=True))


def default_start(model: str) -> str:
    """Find the start of the paper's best run of a network."""
    return "clean" if model in NETWORKS else "stem"


def network_of(model: str) -> Network:
    """Return the row of a network, which it shares with that of another stem."""
    return next(row for name, row in NETWORKS.items() if model in (name, name + row.other))


def start_from(model: str, start: str) -> Any:
    """Return the config of a network on ImageNet, up to where the attack begins."""
    config = base()
    network, has_stem = network_of(model), model not in NETWORKS
    if start == "stem" and not has_stem:
        stem, other = {"_cvst": "ConvStem", "_ps": "PatchStem"}[network.other], network.other
        raise ArgumentError(f"start=stem needs a {stem}; take {model}{other}, or start=clean")
    if start == "21k" and (has_stem or not network.large):
        names = ", ".join(name for name, row in NETWORKS.items() if row.large)
        raise ArgumentError(f"start=21k is only for networks with ImageNet-21k weights: {names}")
    config.model.update(name=model, dtype="bfloat16")
    shared = f"run:convstem_pretraining:{model}"
    weights = {"random": None, "21k": network.large, "stem": shared}
    config.init.weights = weights.get(start, network.clean)
    if has_stem and start == "clean":
        config.init.stem = "fresh"
    if model in NORMALISED:
        config.init.normalize = "imagenet"
    config.pretrain.update(batch_size=network.batch, epochs=0)
    config.train.batch_size = network.batch
    config.evaluation.batch_size = config.test.batch_size = 512
    return config
