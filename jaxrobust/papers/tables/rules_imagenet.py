"""What measures the rows of the papers on ImageNet: Singh, Croce, Hein 2023; Debenedetti 2022."""

from jaxrobust.papers.tables import training_words
from jaxrobust.papers.tables.rules import ANY, Argument, Row, Rule

_THEIRS = (
    Rule({"origin": ANY, "own": (False,), "robustbench": ANY}, published=True),
    Rule(
        {"origin": ANY, "own": (False,)},
        why="{name} was trained by others ({origin}), and no id that is known here is of these "
        "weights.",
    ),
)
_SIZES = Rule({"kind": ("size",)}, commands=("jaxrobust models {model}",))
_DATA = {"oxford_flowers102": "flowers", "caltech101": "caltech", "imagenet2012": "imagenet"}
_STARTS = {"clean+stem": "stem", "fresh-stem": "clean", "clean-21k": "21k"}


def _start(row: Row) -> str | None:
    """Return the word of a start, unless it is the one that the network has by itself."""
    usual = "clean+stem" if row["model"].endswith(("_cvst", "_ps")) else "clean"
    return None if row["start"] == usual else _STARTS.get(row["start"], row["start"])


def _stem(row: Row) -> str | None:
    """Return the run with a new stem's clean epochs, where a row starts from them."""
    return f"convstem_pretraining:{row['model']}" if row["start"] == "clean+stem" else None


def _trained_on(row: Row) -> str:
    return "trained" if row.get("start_epochs") == 50 else "published"


REVISITING_AT = (
    _SIZES,
    Rule(
        {"table": ("table_18",)},
        commands=("jaxrobust import {weights} --model {model} --out weights/{model}",),
    ),
    Rule(
        {"table": ("text_2",), "origin": ("wang2023",)},
        commands=(
            f"jaxrobust import {training_words.INTERNIMAGE} --model {{model}} "
            "--normalize imagenet --out weights/{model}",
            "jaxrobust evaluate --weights weights/{model} --dataset imagenet2012 --attack clean",
        ),
        why="The appendix does not say on which images it was measured.",
    ),
    Rule(
        {"table": ("text_2",), "start": ("fresh-stem",)},
        commands=(
            "jaxrobust train --config configs/convstem_pretraining.py:{model}",
            "jaxrobust evaluate --workdir runs/convstem_pretraining-{model} --attack clean",
        ),
        why="The appendix does not say on which images it was measured.",
    ),
    Rule(
        {"name": ("GPU hours of the whole work",)},
        why="It is a sum over all runs of the authors, which they do not list; `jaxrobust "
        "estimate` says what one run costs.",
    ),
    Rule(
        {"table": ("text_3",)},
        why="It is a difference between two attacks on networks that the text does not name; "
        "`jaxrobust evaluate --attack apgd-t --steps 40 --targets 3` is the weaker one.",
    ),
    Rule({"model": (None,)}, why="{name} is no network of `jaxrobust models`."),
    *_THEIRS,
    Rule(
        {"objective": ("clean",)},
        "convstem_pretraining",
        (Argument("", "model"),),
        split="validation@robustbench",
    ),
    Rule(
        {"table": ("table_4",)},
        "larger_radius",
        (Argument("", "model"), Argument("start", _trained_on, "published")),
        start=lambda row: f"revisiting_at:{row['model']}" if row["start_epochs"] == 50 else None,
        split="validation@robustbench",
    ),
    Rule(
        {"table": ("table_6",)},
        "transfer",
        (Argument("", "model"), Argument("data", "train_dataset", words=_DATA)),
        start=lambda row: f"larger_radius:{row['model']}",
    ),
    Rule(
        {},
        "revisiting_at",
        (
            Argument("", "model"),
            Argument("start", _start),
            Argument("augmentation", "augmentation", "heavy"),
            Argument("epochs", "epochs", 50),
            Argument("steps", "attack_steps", 2),
            Argument("attack", "train_attack", "apgd"),
            Argument("weight_decay", "weight_decay", 0.05),
            Argument("label_smoothing", "label_smoothing", 0.1),
            Argument("stem", "design"),
        ),
        start=_stem,
        split="validation@robustbench",
    ),
)

_LETTERS = {"m": "mixup", "c": "cutmix", "r": "randaugment", "e": "random_erasing"}


def _letters(row: Row) -> str:
    """Write the augmentations of a row in the letters of configs/light_ablation.py."""
    if row["augmentation"] is not None:
        return {"deit": "mcre", "light": "none"}[row["augmentation"]]
    return "".join(letter for letter, name in _LETTERS.items() if row[name]) or "none"


_POD = "--on v4:2x4x4"  # 64 cores
_JUDGED = (
    "jaxrobust analyse semantic-score --weights {weights} --dataset imagenet2012 --norm linf "
    "--epsilon 4/255 --n 5000 --judges swin_large_patch4_window7_224.ms_in22k_ft_in1k "
    "torch:judges.py:convnext_xl torch:judges.py:beit_l"
)
_WITH_LIGHT = {"weight_decay": (0.5,), "train_dataset": ("imagenet2012",)}
_ABLATION = (
    Argument("", "model"),
    Argument("data", "train_dataset", "imagenet100", _DATA),
    Argument("augmentation", _letters, "none"),
    Argument("weight_decay", "weight_decay", 0.05),
    Argument("warmup", "epsilon_warmup_epochs", 20),
    Argument("objective", "objective", "adversarial"),
    Argument("views", "repeated_augmentation", 1),
)
_RECIPE = (
    Argument("", "model"),
    Argument("epsilon", "epsilon_train", "4/255", {"8/255": 8}),
    Argument("batch", "batch_size", 512),
)
_SMALL = (
    Argument("", "model", words={"xcit_s12_p4": "xcit_s12"}),
    Argument("data", "train_dataset", words=_DATA),
    Argument("objective", "objective", "adversarial", {"trades": "adversarial"}),
    Argument("start", lambda row: "random" if row["start"] == "random" else None),
)

XCIT_LIGHT_RECIPE = (
    _SIZES,
    Rule(
        {"kind": ("cost",)},
        commands=("jaxrobust estimate configs/light_recipe.py:{model},batch={batch} " + _POD,),
    ),
    Rule(
        {"table": ("table_9",), "weights": ANY},
        commands=(_JUDGED,),
        why="judges.py is a file of yours, of two functions that return timm's "
        "convnext_xlarge.fb_in22k_ft_in1k and beit_large_patch16_224.in22k_ft_in22k_in1k, each "
        "behind its normalisation.",
    ),
    Rule(
        {"table": ("text_5",)},
        why="The thesis does not say which of timm's weights of {name} these are, nor on which "
        "images they were measured.",
    ),
    *_THEIRS,
    Rule(
        {"table": ("text_2",)},
        why="The thesis does not give the settings of these attacks: neither steps, restarts nor "
        "starts.",
    ),
    Rule(
        {"start_origin": ("salman2020",)},
        why="It starts from the ResNet-50 of Salman et al. 2020 at 8/255, whose weights are "
        "published under no id that is known here; `configs/transfer.py:resnet50` takes them as a "
        "folder.",
    ),
    Rule(
        {"table": ("table_7", "table_8")},
        "transfer",
        _SMALL,
        changes=lambda row: {"data.extra": "npz:FILE"} if row.get("synthetic_share") else {},
        start=lambda row: None if row["start"] == "random" else "light_recipe:xcit_s12,epsilon=8",
    ),
    Rule(
        _WITH_LIGHT | {"objective": ("adversarial",)},
        "light_recipe",
        _RECIPE,
        split="validation@robustbench",
    ),
    Rule({}, "light_ablation", _ABLATION, split="validation@robustbench"),
)
