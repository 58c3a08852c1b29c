"""The public names, which docs/versions.md promises to keep and the reference shows."""

import importlib
from typing import Any

import jaxrobust

MODULES = ("attacks", "convert", "data", "evaluation", "models", "tasks")
# Names that pages use in addition to the modules' `__all__`, by the file that defines them.
BESIDE = {
    "Configs and training": (
        *("config.base", "config.phase", "config.network_of", "training.run.run.run"),
        *("weights.trained.runs.run_config", "weights.trained.runs.run_weights"),
    ),
    "Types": ("types.Batch", "types.Classifier", "types.Threat", "types.Weights"),
    "Import, export, PyTorch": (
        *("convert.import_torch.import_weights", "weights.naming.networks.Request"),
        *("convert.export_torch.ExportSettings", "convert.export_torch.export"),
        *("convert.certificate.compare", "interop.torch.from_module", "interop.torch.from_file"),
    ),
    "Records": (
        *("evaluation.records.record.AccuracyRecord", "evaluation.records.records.read"),
        *("evaluation.records.stopping.StopRule", "evaluation.bundles.of_task.write"),
        "evaluation.bundles.of_task.check",
    ),
}


def sections() -> dict[str, list[str]]:
    """List the public names by title, without `jaxrobust.`, in the order of the reference."""
    own = [name for name in jaxrobust.__all__ if name not in (*MODULES, "__version__")]
    found = {"jaxrobust": own}
    for module in MODULES:
        found[f"jaxrobust.{module}"] = [f"{module}.{n}" for n in getattr(jaxrobust, module).__all__]
    return found | {title: list(names) for title, names in BESIDE.items()}


def names() -> list[str]:
    """List all public names, without `jaxrobust.`."""
    return [name for listed in sections().values() for name in listed]


def value(name: str) -> Any:
    """Import a public name; `AttributeError`: it is gone."""
    module, _, own = name.rpartition(".")
    return getattr(importlib.import_module(f"jaxrobust.{module}".rstrip(".")), own)
