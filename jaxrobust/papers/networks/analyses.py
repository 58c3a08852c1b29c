"""The analyses by name: their settings, defaults and output files."""

import importlib
from pathlib import Path
from typing import Any, NamedTuple


class Analysis(NamedTuple):
    """One analysis, named like its file: its defaults, and the settings that only it has."""

    n: int
    steps: tuple[int, ...] = ()
    takes: tuple[str, ...] = ()
    many: bool = False  # whether it runs several numbers of steps
    least: int = 1  # step


ANALYSES = {
    "perturbations": Analysis(16, (100,), ("sign",)),
    "semantic-score": Analysis(256, (100,), ("sign", "judges", "top")),
    "synthesis": Analysis(16, (100,), ("step_size", "targets")),
    "effectiveness": Analysis(256, (1, 2, 5, 10, 200), ("seeds", "checkpoints"), many=True),
    "convergence": Analysis(
        32, (0, 1, 2, 5, 10, 50, 100, 200, 500), ("seeds",), many=True, least=0
    ),
    "augmentations": Analysis(6, (), ("images", "chain", "views")),
}
OWN = {name for row in ANALYSES.values() for name in row.takes}
# Defaults that `AnalysisSettings` has otherwise.
_OTHER: dict[str, Any] = {"semantic-score": {"sign": "code"}, "convergence": {"seeds": 20}}


class AnalysisSettings(NamedTuple):
    """The settings of an analysis; unused ones keep their defaults."""

    analysis: str
    named: dict[str, Any]  # flags of an evaluation that name a network and its images
    n: int
    steps: tuple[int, ...]
    seed: int = 0
    batch: int = 64
    out: Path | None = None
    sign: str = "attack"  # or code: the sign of shown perturbations
    judges: tuple[str, ...] = ()
    top: int | None = None
    step_size: float = 0.225
    targets: tuple[int, ...] = ()
    seeds: int = 3
    checkpoints: tuple[str, ...] = ()
    images: tuple[Path, ...] = ()
    chain: str = "heavy"
    views: int = 6


def checked(values: dict[str, Any], network_flags: dict[str, Any]) -> AnalysisSettings:
    """Fill in an analysis' defaults: of `given` fields of its settings, and of `named` flags."""
    name = values["analysis"]
    row = ANALYSES[name]
    values = {key: value for key, value in values.items() if value not in (None, ())}
    strange = sorted(values.keys() & OWN - set(row.takes))
    if name == "augmentations":
        there = {key for key, value in network_flags.items() if value is not None}
        strange += sorted(there - {"image_size"} | values.keys() & {"steps"})
    if strange:
        raise ValueError(f"--{strange[0]} has no effect on {name}; leave it out")
    defaults: dict[str, Any] = {"n": row.n, "steps": row.steps} | _OTHER.get(name, {})
    settings = AnalysisSettings(named=network_flags, **(defaults | values))
    steps = settings.steps
    if any(step < row.least for step in steps):
        raise ValueError(f"--steps for {name} must be at least {row.least}")
    if len(steps) > 1 and not row.many:
        raise ValueError(f"{name} accepts only one value of --steps")
    if row.many and max(steps) < 1:
        raise ValueError("--steps must name an attack with at least 1 step")
    if settings.step_size <= 0:
        raise ValueError(f"--step_size={settings.step_size} must be above 0")
    from jaxrobust.types import check_length

    check_length("--step_size", settings.step_size)
    if name == "semantic-score" and not settings.judges:
        raise ValueError("semantic-score needs --judges, the networks that classify perturbations")
    return settings._replace(steps=tuple(sorted(set(steps))))


def written(settings: AnalysisSettings) -> tuple[Path, Path]:
    """Compute an analysis, then write both of its files, or neither; return their paths."""
    import jax

    from jaxrobust.papers.networks import network_sample, picture_parts
    from jaxrobust.types import VERDICT_PRECISION

    picture_parts.plotting()  # refuses before anything is computed
    module = importlib.import_module(f"{__package__}.{settings.analysis.replace('-', '_')}")
    own_images = settings.analysis == "augmentations"
    sample = None if own_images else network_sample.seen(settings.named | {"n": settings.n})
    with jax.default_matmul_precision(VERDICT_PRECISION):
        rows, result = module.analyse(sample, settings)
    figure = module.draw(sample, rows, result, settings)
    out = picture_parts.folder(settings.out, settings.named["workdir"])
    return picture_parts.save(out, settings.analysis, figure, rows)
