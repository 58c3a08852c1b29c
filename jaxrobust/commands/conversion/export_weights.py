"""Export weights: `jaxrobust export TARGET --layout L --out DIR`.

TARGET is a run, or weights as for `jaxrobust evaluate`. L is one of
  jaxrobust  DIR/weights.safetensors and config.json, as an import writes them: for init.weights,
          --weights and jaxrobust.load;
  timm    DIR/<model>.safetensors with timm's names (for a ConvStem: those of the paper's files);
  hub     a repository of the model hub: model.safetensors, timm's config.json and README.md, the
          model card; for networks that timm does not have, also the module;
  module  DIR/<model>.py and .pt: the network in plain PyTorch, with any options, normalization
          and number of classes; `from <model> import load`;
  state-dict  DIR/state_dict.pt, for a network torch:...: what build().load_state_dict takes;
  robustbench  DIR/robust_<file>.py and .pt, for a network torch:...: a copy of the module's file,
          with these weights; `from robust_<file> import load`;
  a RobustBench id: its file, where `load_model(id, model_dir=DIR)` looks for it; that network
          normalizes images or takes them raw (of Singh2023's, only ViT-S normalizes), and the
          weights must match.
--record FILE also writes RobustBench's JSON entry and the text of its "New Model" issue.
A certificate next to the weights reports how well the exported network agrees with the original;
a file that computes something else is not written.

Exit codes: 0 done; 2 a mistake, with one sentence on stderr; 3 another reason, which is printed,
such as a full disk; then nothing is left under DIR.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from absl import logging

from jaxrobust.commands.flags.shared import shared
from jaxrobust.runtime.commandline import fields, targets
from jaxrobust.runtime.commandline.arguments import answer
from jaxrobust.runtime.commandline.fields import flag
from jaxrobust.runtime.files import buckets
from jaxrobust.runtime.text import patience
from jaxrobust.weights.fetch import shipped


@dataclass(frozen=True, kw_only=True)
class ExportFlags:
    """The weights to export, and the layout."""

    target: str | None = flag(
        "Run (exports its best weights), or weights.", word=True, nargs="?", metavar="TARGET"
    )
    workdir: Path | None = flag("Run whose best weights to export.")
    phase: str | None = shared("phase")
    weights: str | None = flag(f"Weights to export instead of a run: {shipped.KINDS}.")
    model: str | None = shared("model")
    image_size: int | None = flag("Image size in pixels, for a weights file; default: 224.")
    options: dict[str, Any] | None = shared("options")
    which: str | None = flag(
        "Averaged or raw weights; default: the ones that the run evaluates.", choices=["ema", "raw"]
    )
    selected: bool = flag(
        "Export the weights that jaxrobust select chose, instead of the run's best.", False
    )
    layout: str = flag(
        "Layout: jaxrobust, timm, hub, module, state-dict, robustbench, or a RobustBench id.",
        required=True,
    )
    out: Path = flag("Folder to write.", required=True)
    record: Path | None = flag(
        "Evaluation records (results.jsonl) for the model card, docstring or config.json, and with "
        "--id for the RobustBench entry."
    )
    evaluation: str | None = flag("Id of the record; default: the latest record of these weights.")
    id: str | None = flag("RobustBench id for a new network; default: from the layout.")
    confirm: int | None = flag(
        "Number of the record's images to also attack in PyTorch, with pyautoattack; the issue "
        "states whether the verdicts agree.",
        metavar="N",
    )
    data_dir: str | None = shared("data_dir", default="$TFDS_DATA_DIR, only for --confirm")
    license: str | None = flag("License of the weights for the model card, such as mit.")
    nocertificate: bool = shared("nocertificate", False)
    json: bool = shared("json", False)


def main(argv: list[str] | None = None) -> None:
    """Read the command line and export the weights."""
    flags = fields.read(
        ExportFlags, __doc__, argv, usual="layout out phase which selected record id"
    )
    logging.set_verbosity(logging.FATAL)  # Orbax logs 30 lines per checkpoint
    answer(_exported, flags, "nothing is written")


def _exported(flags: ExportFlags) -> dict[str, Any]:
    values = asdict(flags)
    del values["json"]
    if target := values.pop("target"):
        values = targets.with_target(values, target, weights=shipped.RUNS)
        if values.keys() & {"function", "torch"}:
            raise ValueError(f"{target} is a function; name a run or weights to export")
        run = values["workdir"]
        values["workdir"] = run and buckets.opened("workdir", str(run), light=True)
    with patience.of(patience.LOADING):
        from jaxrobust.publish import export_torch
        from jaxrobust.runtime.devices import compilation

    compilation.use_persistent_cache()
    return export_torch.export(export_torch.ExportSettings(**values))
