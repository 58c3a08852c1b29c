"""A network as a repository of the model hub: `--layout hub`.

`model.safetensors` and `config.json` as timm has them, where timm builds the network; else the
self-contained module next to its `model.safetensors`. README.md is the model card. Its facts come
from `account`; unknown facts are marked to be filled in by hand.
Source: timm 1.0.9, timm/models/_hub.py (`load_model_config_from_hf`), for the keys of config.json;
the hub's documentation of model cards for those of the card's head.
"""

import json
import re
from typing import Any

from jaxrobust import models
from jaxrobust.data import imagenet
from jaxrobust.models.published import PUBLISHED, Paper, paper
from jaxrobust.publish import network_account, references
from jaxrobust.publish.network_account import Account
from jaxrobust.publish.references import Network
from jaxrobust.publish.robustbench_entry import BY_HAND
from jaxrobust.weights.naming import convert

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
_RESIZED = re.compile(r"(bicubic|bilinear)-(\d+)-crop-(\d+)")
_SHARE = re.compile(r"(bicubic|bilinear)-(0?\.\d+|1\.0)")
_ROBUSTBENCH = {  # in timm's terms: interpolation, the share of the side that the crop keeps
    "Res256Crop224": ("bilinear", 224 / 256),
    "BicubicRes256Crop224": ("bicubic", 224 / 256),
}
_AUTOATTACK = Paper(
    "Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free "
    "attacks",
    "Francesco Croce, Matthias Hein",
    "ICML 2020",
    "https://arxiv.org/abs/2003.01690",
)
# How the card explains use: of a timm network, of a self-contained module, of both.
_TIMM = f"""With timm (`local-dir:` needs 1.0.16 or newer):

```python
import timm

# or "local-dir:FOLDER", a clone of it
net = timm.create_model("hf-hub:ORG/REPO", pretrained=True).eval()
```

With PyTorch, as tensors with timm's names:

```python
from safetensors.torch import load_file

state_dict = load_file("{WEIGHTS}")
```

"""
_MODULE = """With only PyTorch and safetensors, use {name}.py from this repository:

```python
import sys

from huggingface_hub import snapshot_download

sys.path.append(snapshot_download("ORG/REPO"))
from {name} import load

logits = load()(images)  # f32[B,{shape}] in [0, 1]
```

"""
_JAX = """With JAX:

```python
import jaxrobust

net, params, stats, about = jaxrobust.load("hf://ORG/REPO")  # or a clone of it
logits, _ = net.apply(params, stats, images)  # f32[B,H,W,C] in [0, 1]
```

To attack the network, run `jaxrobust evaluate --weights hf://ORG/REPO --dataset NAME`."""


def timm_name(network: Network) -> tuple[str, dict[str, Any]] | None:
    """Look up timm's name and other arguments of `create_model`; None: timm does not build it."""
    reference, row = models.member(network.name).reference, models.variant(network.name)
    other = reference.base.endswith(".py") or reference.strides or getattr(row, "stem_widths", ())
    if other or references.deviations(network, network.name):
        return None
    arguments = dict(reference.options)
    if not models.family(network.name).any_size and network.image_size != 224:
        arguments["img_size"] = network.image_size
    if network.in_channels != 3:
        arguments["in_chans"] = network.in_channels
    return reference.base, arguments


def config(network: Network, account: Account, sha256: str) -> dict[str, Any]:
    """Write `config.json`: timm's keys, and under `jaxrobust` what our import reads."""
    built = timm_name(network)
    size, channels = network.image_size, network.in_channels
    mean, std = (network.stats[f"normalize.{key}"].tolist() for key in ("mean", "std"))
    plain = {"mean": [0.0] * channels, "std": [1.0] * channels}
    timm: dict[str, Any] = {
        "tag": "",
        "custom_load": False,
        "input_size": [channels, size, size],
        "fixed_input_size": not models.family(network.name).any_size,
        **_resized(account.preprocessing),
        "crop_mode": "center",
        **({"mean": mean, "std": std} if built else plain),  # the module normalizes inside
        "num_classes": network.num_classes,
        **_ends(network),
        **({"license": account.license.lower()} if account.license else {}),
    }
    facts = {
        "architecture": network.name,
        "options": models.essential(network.name, network.options),
        "preprocessing": account.preprocessing,
        **(account.threat.settings() if account.threat else {"norm": None, "epsilon": None}),
        "accuracies": [record.to_json() for record in account.records] or None,
        "training": account.training,
        "weights_sha256": sha256,
    }
    names = account.classes or (imagenet.synsets() if account.imagenet else ())
    return {
        **({"architecture": built[0]} if built else {}),
        "num_classes": network.num_classes,
        **({"label_names": list(names)} if len(names) == network.num_classes else {}),
        **({"model_args": built[1]} if built and built[1] else {}),
        "pretrained_cfg": timm,
        "jaxrobust": facts,
    }


def _resized(preprocessing: str | None) -> dict[str, Any]:
    """Translate a preprocessing into timm's keys; empty: unknown, or timm cannot express it."""
    name = preprocessing or ""
    if name in _ROBUSTBENCH:
        interpolation, share = _ROBUSTBENCH[name]
    elif match := _RESIZED.fullmatch(name):
        interpolation, share = match[1], int(match[3]) / int(match[2])
    elif match := _SHARE.fullmatch(name):
        interpolation, share = match[1], float(match[2])
    elif name == "none":
        interpolation, share = "bicubic", 1.0
    else:
        return {}
    return {"interpolation": interpolation, "crop_pct": share}


def _ends(network: Network) -> dict[str, str]:
    """Find timm's names of the first and last layer, replaced for other images and classes."""
    names = models.family(network.name).names
    arrays = network.params | network.stats
    stored = convert.names(network.name, references.named(network, wrapped=False))
    first: dict[str, str] = {}
    last: dict[str, str] = {}
    for key, _, targets in stored.matched:
        target = targets[0] if len(targets) == 1 else ""
        if re.fullmatch(names.stem, target) and arrays[target].ndim == 4:
            first.setdefault("first_conv", key.removesuffix(".weight"))
        if any(re.fullmatch(names.head, target) for target in targets) and key.endswith(".bias"):
            last["classifier"] = key.removesuffix(".bias")
    return first | last


def card(network: Network, account: Account) -> str:
    """Return README.md: YAML that the hub reads, then text for people."""
    built = timm_name(network)
    shape = f"{network.in_channels},{network.image_size},{network.image_size}"
    torch = _TIMM if built else _MODULE.format(name=network.name, shape=shape)
    title = f"{network.name}, {network.num_classes:,} classes"
    title += "" if account.threat is None else f", threat model {account.threat.written()}"
    inside = network_account.normalisation(network)
    outside = "applied by timm's transforms" if built else "applied by the network's first layer"
    facts = {
        "Architecture": f"`{network.name}` of jaxrobust"
        + (f", timm's `{built[0]}`" if built else ", which timm does not have"),
        "Images": f"{network_account.channels(network)} in [0, 1], "
        + network_account.prepared(network, account),
        "Normalization": f"{inside}; {outside}" if inside else "none: raw [0, 1] images",
        "Classes": network_account.classes(network, account),
        "Threat model": network_account.threat(account),
        "Training": account.trained or network_account.UNKNOWN,
        "Weights": account.which
        + (f", from {account.source}" if account.source else "")
        + (f" (sha256 {account.source_sha256})" if account.source_sha256 else ""),
        "License": network_account.licence(account) or f"({BY_HAND}: the license of the weights)",
    }
    lines = [
        *_head(built is not None, account),
        f"# {title}",
        "",
        *(f"- **{key}**: {value}" for key, value in facts.items()),
        "",
        "## Accuracy",
        "",
        *_accuracies(account),
        "",
        "## Use",
        "",
        *(torch + _JAX).splitlines(),
        "",
        "## Citation",
        "",
        *_citation(account),
    ]
    return "\n".join(lines) + "\n"


def _head(timm: bool, account: Account) -> list[str]:
    tags = ["image-classification", "adversarial-robustness", "jaxrobust"] + ["timm"] * timm
    datasets = ["imagenet-1k"] if account.imagenet else []
    return [
        "---",
        "pipeline_tag: image-classification",
        f"library_name: {'timm' if timm else 'pytorch'}",
        f"license: {(account.license or 'unknown').lower()}",
        "tags:",
        *(f"- {tag}" for tag in tags),
        *(["datasets:"] if datasets else []),
        *(f"- {name}" for name in datasets),
        "---",
        "",
    ]


def _accuracies(account: Account) -> list[str]:
    if not account.records:
        return [f"There is no record of these weights ({BY_HAND}, or export with `--record`)."]
    rows = [network_account.row(record) for record in account.records]
    return [
        "| images | attack | clean | robust | record |",
        "|---|---|---|---|---|",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]


def _citation(account: Account) -> list[str]:
    weights_papers = [paper(account.published)] if account.published in PUBLISHED else []
    attacked = any(str(one.method).startswith("autoattack") for one in account.records)
    papers = weights_papers + [_AUTOATTACK] * attacked
    lines = [f"- {p.authors}: {p.title}. {p.venue}. <{p.link}>" for p in papers]
    return lines if weights_papers else [f"- ({BY_HAND}: the paper of these weights)", *lines]


def texts(network: Network, account: Account, sha256: str) -> dict[str, str]:
    """Return name -> text of the files next to the weights."""
    return {
        CONFIG: json.dumps(config(network, account, sha256), indent=2) + "\n",
        CARD: card(network, account),
    }
