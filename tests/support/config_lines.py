"""The lines of the config families: `NAME:ARGUMENTS` of each run that a paper or a study has."""

import contextlib
import importlib
import itertools
import re
from collections.abc import Iterator
from typing import Any
from unittest import mock

from configs import larger_radius, revisiting_at
from jaxrobust.config import ArgumentError
from jaxrobust.papers.tables import lines as papers
from jaxrobust.papers.tables import tables
from tools.generate import refresh_configs

# Families whose runs are all that their arguments allow.
WHOLE = ("cifar_bat", "cifar_aat", "cifar_aligned", "light_recipe", "transfer")
WHOLE += (
    "generated_data",
    "aligned_study",
    "norms_study",
    "objectives_study",
    "extra_data_study",
    "residual_study",
    "cifar_study",
    "convstem_pretraining",
)
# Arguments that change a network: with all values of them, lines would be ten thousands.
OF_NETWORKS = ("block", "se", "se_reduction", "preact", "residual", "order", "patch")
OF_NETWORKS += ("weight_decay", "decay")


class _ChoicesError(Exception):
    """What `read_arguments` was asked."""


def choices(family: str) -> dict[str, list[Any]]:
    """The values of each argument of a family, its default first."""
    module = importlib.import_module(f"configs.{family}")

    def ask(text: str, **asked: Any) -> None:
        raise _ChoicesError(asked)

    with mock.patch.object(module, "read_arguments", ask):
        try:
            module.get_config("")
        except _ChoicesError as found:
            asked: dict[str, Any] = found.args[0]
    named = {name: [v for v in values if v not in (float, str)] for name, values in asked.items()}
    return {name: values[:1] if name in OF_NETWORKS else values for name, values in named.items()}


def whole(family: str) -> Iterator[str]:
    """All that the arguments of a family allow."""
    asked = choices(family)
    for values in itertools.product(*asked.values()):
        given = [f"{name}={v}" for name, v in zip(asked, values, strict=True) if v is not None]
        line = f"{family}:{','.join(given)}"
        with contextlib.suppress(ArgumentError):  # which no paper has
            refresh_configs.load(line)
            yield line


def of_the_main_paper() -> Iterator[str]:
    """Lines that the docstring of the family has figures of, and those of Tables 7 to 9 and 17."""
    stems = [name for name in revisiting_at.MODELS if name.endswith("_cvst")]
    yield from re.findall(
        r"^    ((?:convnext|iso|vit|internimage)_\S+)", revisiting_at.__doc__ or "", re.MULTILINE
    )
    yield from (f"{name},label_smoothing={share}" for name in stems for share in (0.0, 0.2))
    yield from (f"{name},weight_decay={decay}" for name in stems for decay in (0.5, 0.005))
    yield from (f"{name},start=clean,stem={stem}" for name, stem in revisiting_at.STEMS)


def of_the_ablation() -> Iterator[str]:
    """Tables 1 to 6 of the light recipe's thesis, and its clean runs."""
    heavy, both = "augmentation=mcre,warmup=0", ("adversarial", "clean")
    for name, objective in itertools.product(("deit_s", "cait_s12", "xcit_s12"), both):
        yield f"{name},{heavy},views=3,objective={objective}"
    yield from (f"xcit_n12,augmentation=mcre,warmup={w}" for w in (0, 5, 10, 20, 30))
    mixes = ("e", "none", "m", "me", "mc", "r", "re", "mcre")
    decays = (0, 0.001, 0.01, 0.05, 0.1, 0.5, 1.0)
    for objective in both:
        yield from (f"xcit_n12,augmentation={mix},objective={objective}" for mix in mixes)
        yield from (f"xcit_n12,weight_decay={decay},objective={objective}" for decay in decays)
    on = "data=imagenet"
    yield from (f"{name},{on},{heavy}" for name in ("deit_s", "xcit_s12"))
    yield f"xcit_s12,{on},augmentation=mcre,warmup=10"
    yield from (f"xcit_s12,{on},warmup=10,weight_decay={decay}" for decay in (0.05, 0.5))
    yield from (f"{name},{on},warmup=10" for name in ("resnet50", "resnet50_gelu"))
    yield from (f"xcit_{size}12,{on},augmentation=mcre,objective=clean" for size in "sml")


def lines() -> list[str]:
    """Every line of every family, and the configs that are none."""
    found = [*refresh_configs.names()]
    found += [line for family in WHOLE for line in whole(family)]
    found += [f"larger_radius:{name}" for name in larger_radius.PUBLISHED]
    found += [f"revisiting_at:{line}" for line in of_the_main_paper()]
    found += [f"light_ablation:{line}" for line in of_the_ablation()]
    found += [run.config for run in of_the_tables() if not run.changes]
    return [*dict.fromkeys(found)]


def of_the_tables() -> Iterator[papers.Run]:
    """Every run of which a row of a paper is one, or from which one starts."""
    for paper in tables.PAPERS:
        for _, _, line in papers.of_tables(paper):
            yield from [line.start] * bool(line.start)
            yield from [line.run] * bool(line.run)
