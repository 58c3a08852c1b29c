"""Write a config for your own images: `jaxrobust new birds.py --data /data/birds`.

It inspects a folder of class folders, an `.npz` file or a named data set, and fills in classes,
sizes, disjoint splits, steps, batch and radius, each line with its reason. `--torch` names your own
PyTorch network, `--from` weights to start from. In a terminal you are asked for missing values.
Existing files are not replaced.

Exit codes: 0 written; 2 a mistake in the command or the data, with one sentence on stderr; 3 it
stopped for another reason, which is printed.
"""

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxrobust.commands.flags.shared import shared
from jaxrobust.runtime.commandline import fields
from jaxrobust.runtime.commandline.arguments import answer, load_config, number
from jaxrobust.runtime.commandline.fields import flag
from jaxrobust.runtime.text import patience, spelling
from jaxrobust.weights.fetch.shipped import KINDS


@dataclass(frozen=True, kw_only=True)
class NewFlags:
    """The data, network and threat of the config."""

    out: Path = flag("Config to write, such as birds.py.", word=True, type=Path)
    data: str | None = flag(
        "Images: a folder of class folders, an .npz file, or the name of a data set; if left out, "
        "the command asks for it."
    )
    torch: str | None = shared("torch")
    torch_args: dict[str, Any] | None = shared("torch_args")
    start: str | None = flag(
        f"Weights to start from: {KINDS}; default: public ones for images above 64 px, otherwise "
        "random ones.",
        name="from",
    )
    model: str | None = shared("model")
    norm: str = flag(
        "Norm of the attack.", "linf", choices=("linf", "l2", "l1"), type=spelling.norm
    )
    epsilon: str | None = flag(
        "Radius, such as 4/255, in units of [0, 1] pixels; default: the usual radius for the norm."
    )
    json: bool = shared("json", False)
    image_size: int | None = flag(
        "Input size in pixels; default: the size of the images, at most 224.", least=1
    )


def main(argv: list[str] | None = None) -> None:
    """Read the command line, inspect the images and write the config."""
    answer(_written, fields.read(NewFlags, __doc__, argv), "run the same command to start again")


def _written(flags: NewFlags) -> dict[str, Any]:
    place = flags.data
    if place is None and sys.stdin.isatty():
        place = input("Images (a folder, an .npz file or the name of a data set): ").strip()
    if not place:
        raise ValueError("name the images with --data: a folder, an .npz file, or a data set")
    if flags.out.suffix != ".py":
        raise ValueError(f"{flags.out} is not a Python file; choose a name that ends in .py")
    if flags.epsilon is not None and number("epsilon", flags.epsilon) <= 0:
        raise ValueError(f"--epsilon={flags.epsilon} must be above 0; leave it out for the default")
    with patience.of(patience.LOADING):
        from jaxrobust.results.configs import chosen_values, data_facts
        from jaxrobust.results.stages import checks

    with patience.of("inspecting the images and the network"):
        data = data_facts.look(place, config=flags.out)
        choice = chosen_values.look(
            data,
            torch=flags.torch,
            torch_args=flags.torch_args,
            weights=flags.start,
            model=flags.model,
            norm=flags.norm,
            epsilon=flags.epsilon,
            image_size=flags.image_size,
        )
        lines = chosen_values.lines(data, choice)
        content = chosen_values.text(data, lines, str(flags.out))
    chosen_values.write(flags.out, content, dict(data.lists))
    print(
        f"{flags.out}: {data.images:,} images to train on, {len(data.classes)} classes, "
        f"{data.sides[1]} px; {data.divided}"
    )
    for name, images in data.lists.items():
        print(f"{name}: {len(images):,} images")
    with patience.of("estimating the training time"):
        costs = checks.lines(load_config(str(flags.out)), (), Path("runs/new"))
    config = shlex.quote(str(flags.out))
    print("\n".join([*costs, f"next: jaxrobust check {config}; jaxrobust train {config}"]))
    return {
        "config": str(flags.out),
        "lists": list(data.lists),
        "values": {line.key: str(line.value) for line in lines},
    }
