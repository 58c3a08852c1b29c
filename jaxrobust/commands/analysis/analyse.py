"""Look at what a network has learnt, and how attacks fare on it: one PNG and one CSV.

`jaxrobust analyse ANALYSIS --workdir RUN` (or --weights, as `python -m jaxrobust.evaluate`
takes them). The analyses are those of Debenedetti's thesis: perturbations, semantic-score,
synthesis, effectiveness, convergence; and augmentations, a contact sheet of a user's own images.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from jaxrobust.analysis.networks import commandline
from jaxrobust.runtime.commandline.arguments import Arguments, mapping, number
from jaxrobust.runtime.processes.launch import keep_large_buffers


class Row(NamedTuple):
    """One analysis: its file, its defaults, and the flags that are its own."""

    module: str
    n: int
    steps: tuple[int, ...] = ()
    takes: tuple[str, ...] = ()
    many: bool = False  # whether --steps are several
    least: int = 1  # step


ANALYSES = {
    "perturbations": Row("perturbations", 16, (100,), ("sign",)),
    "semantic-score": Row("semantic_score", 256, (100,), ("sign", "judges", "top")),
    "synthesis": Row("synthesis", 16, (100,), ("step_size", "targets")),
    "effectiveness": Row(
        "effectiveness", 256, (1, 2, 5, 10, 200), ("seeds", "checkpoints"), many=True
    ),
    "convergence": Row(
        "convergence",
        32,
        (0, 1, 2, 5, 10, 50, 100, 200, 500),
        ("seeds",),
        many=True,
        least=0,
    ),
    "augmentations": Row("augmentations", 6, (), ("images", "chain", "views")),
}
NETWORK = commandline.NETWORK | {
    "norm": "Norm of the attack; default: that of the run, or linf.",
    "epsilon": "Radius, such as 4/255; default: that of the run.",
}
OWN: dict[str, dict[str, Any]] = {
    "sign": {
        "choices": ["attack", "code"],
        "help": "What is shown: x_adv - x (attack), or the authors' x - x_adv (code); default: "
        "attack, for semantic-score code.",
    },
    "judges": {"nargs": "+", "help": "Other networks: runs, folders, ids, or NAME=FILE."},
    "top": {
        "type": int,
        "help": "Number of guesses of a judge; default: 5, or 1 of 20 classes or fewer.",
    },
    "step_size": {"type": float, "help": "Length of a step of synthesis; default: 0.225."},
    "targets": {"type": int, "nargs": "+", "help": "Classes to aim at; default: random ones."},
    "seeds": {
        "type": int,
        "help": "Number of random starts; default: 3, for convergence 20.",
    },
    "checkpoints": {
        "nargs": "+",
        "help": "Networks in the order of training, in place of those of --workdir.",
    },
    "images": {"nargs": "+", "type": Path, "help": "Pictures, or folders of them."},
    "chain": {"help": "Preset or chain, such as heavy or 'resized-crop|flip'; default: heavy."},
    "views": {"type": int, "help": "Views of each picture; default: 6."},
}
_DEFAULTS: dict[str, Any] = {"step_size": 0.225, "seeds": 3, "chain": "heavy", "views": 6}
_DEFAULTS |= {"sign": "attack", "judges": [], "checkpoints": [], "targets": [], "images": []}
_BY_NAME: dict[str, dict[str, Any]] = {
    "semantic-score": {"sign": "code"},
    "convergence": {"seeds": 20},
}


def main(argv: list[str] | None = None) -> None:
    """Read the command line, compute, write both files."""
    commandline.run(lambda: _made(_parsed(argv)), "the same command starts again")


def _parsed(argv: list[str] | None) -> argparse.Namespace:
    parser = Arguments(__doc__ or "")
    parser.add_argument("analysis", choices=list(ANALYSES), help="Which analysis.")
    commandline.add_network(parser, NETWORK)
    parser.flag("n", type=int, help="Number of images, the first of the split, or of samples.")
    parser.flag("steps", type=int, nargs="+", help="Attack steps; some analyses take several.")
    parser.flag("seed", type=int, default=0, help="Seed of all draws; default: 0.")
    parser.flag("batch", type=int, default=64, help="Images at a time; no number depends on it.")
    commandline.add_out(parser)
    for name, how in OWN.items():
        takers = [key for key, row in ANALYSES.items() if name in row.takes]
        parser.flag(name, **how | {"help": f"{how['help']} ({', '.join(takers)})"})
    return _checked(parser.parse_args(argv))


def _checked(args: argparse.Namespace) -> argparse.Namespace:
    """Fill in defaults; refuse what the analysis does not take, and numbers out of range."""
    row, name = ANALYSES[args.analysis], args.analysis
    given = {k for k, v in vars(args).items() if v is not None}
    strange = sorted(given & OWN.keys() - set(row.takes))
    if name == "augmentations":
        strange += sorted(given & NETWORK.keys() | given & {"steps", "num_classes"})
    if strange:
        raise ValueError(f"--{strange[0]} has no effect on {name}; leave it out")
    defaults = _DEFAULTS | _BY_NAME.get(name, {}) | {"n": row.n, "steps": list(row.steps)}
    for key, value in defaults.items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    least = {"n": 1, "batch": 1, "seed": 0, "seeds": 1, "views": 1, "top": 1, "image_size": 1}
    for key, low in least.items():
        if getattr(args, key) is not None and getattr(args, key) < low:
            raise ValueError(f"--{key}={getattr(args, key)} must be at least {low}")
    if any(step < row.least for step in args.steps):
        raise ValueError(f"--steps of {name} must be at least {row.least}")
    if len(args.steps) > 1 and not row.many:
        raise ValueError(f"{name} takes one number of --steps")
    if row.many and max(args.steps) < 1:
        raise ValueError("--steps must name an attack of at least 1 step")
    if args.step_size <= 0:
        raise ValueError(f"--step_size={args.step_size} must be above 0")
    if name == "semantic-score" and not args.judges:
        raise ValueError("semantic-score needs --judges, the networks that classify perturbations")
    args.steps = sorted(set(args.steps))
    return args


def _made(args: argparse.Namespace) -> tuple[Path, Path]:
    import importlib

    from jaxrobust.analysis.networks import pictures

    pictures.plotting()  # refuses before anything is computed
    row = ANALYSES[args.analysis]
    out = commandline.folder(args)
    module = importlib.import_module(f"jaxrobust.analysis.networks.{row.module}")
    seen = None
    if args.analysis != "augmentations":
        from jaxrobust.analysis.networks import network

        named = {key: getattr(args, key) for key in (*NETWORK, "num_classes", "image_size", "n")}
        epsilon = named["epsilon"]
        named["epsilon"] = None if epsilon is None else number("epsilon", epsilon)
        named["options"] = mapping("options", named["options"])
        seen = network.seen(named)
    return _written(module.analyse, module.draw, seen, args, out)


def _written(
    analyse: Callable[..., Any], draw: Callable[..., Any], seen: Any, args: Any, out: Path
) -> tuple[Path, Path]:
    """Compute, then write both files or none."""
    import jax

    from jaxrobust.analysis.networks import pictures
    from jaxrobust.types import VERDICT_PRECISION

    with jax.default_matmul_precision(VERDICT_PRECISION):
        rows, made = analyse(seen, args)
    figure = draw(seen, rows, made, args)
    out.mkdir(parents=True, exist_ok=True)
    table, picture = (out / f"{args.analysis}.{kind}" for kind in ("csv", "png"))
    figure.savefig(picture, dpi=130)
    pictures.write(rows, table)
    return table, picture


if __name__ == "__main__":
    keep_large_buffers()
    main()
