"""`python -m jaxrobust.doctor (RUN | WEIGHTS | my_net.py:logits_fn | --config FILE) ...`.

Looks for the usual faults of a network, with the flags of jaxrobust.evaluate, or of a config, with
its --config.key=value: one line for each check, green, yellow or red, with cause, remedy and paper.
Of a run it looks at both. It takes a minute or two, attacks a hundred images with ten steps of PGD,
and writes nothing but compiled programs.

Exit codes: 0 nothing is red; 1 something is; 2 a mistake in the command or the data, with one
sentence on stderr; 3 it stopped for another reason that it names (network, disk); 130 interrupted.
"""

import json
import os
import shutil
import sys
from functools import partial
from typing import Any

from absl import app, flags
from ml_collections import config_flags

from jaxrobust.runtime.commandline.arguments import (
    config_name,
    ending,
    mapping,
    number,
    parse,
    quiet_libraries,
    stop,
)
from jaxrobust.runtime.processes.launch import keep_large_buffers, use_every_core
from jaxrobust.runtime.text import patience

_CONFIG = config_flags.DEFINE_config_file("config", lock_config=True)
_FLAGS = {
    "workdir": "Run to examine: its network and its config.",
    "phase": "Phase of the run, such as pretrain or train; default: the last one that has weights.",
    "model": "Network of weights that are no run's: a name of models.available().",
    "weights": "Its weights: a file, an imported folder, a URL, hf://ORG/REPO, a RobustBench id, "
    "or a timm id.",
    "options": "Fields of the row of --model that its weights do not say: {'stem_strides': (1,)}.",
    "function": "Function of images in [0, 1] to logits instead: my_net.py:logits_fn.",
    "torch": "Network in PyTorch instead: my_models.py:build, or a .pt2 of torch.export.save.",
    "torch_args": 'Arguments of that function, as JSON: {"depth": 28}.',
    "torch_output": "Which of several results of the module are the logits: a key or a place.",
    "dataset": "Data set: digits, cifar10, imagenet2012, folder:PATH, npz:PATH, hf:NAME; default: "
    "that of the run.",
    "split": "Split, such as test[:1000]; default: the test split of the run, or test.",
    "classes": "List of the classes that are kept; default: that of the run.",
    "data_dir": "Folder of data sets; default: that of the run, or $TFDS_DATA_DIR.",
    "preprocessing": "Preprocessing, such as Res256Crop224; default: that of the run's tests.",
    "norm": "Norm of the attacks: linf, l2 or l1; default: that of the run, or linf.",
    "epsilon": "Radius, such as 4/255, in units of [0, 1] pixels; default: that of the run, or "
    "8/255, 0.5 and 12 by norm.",
}
_NUMBERS = {
    "num_classes": (None, "Number of classes of --model; default: that of the data set."),
    "image_size": (None, "Side of the images in pixels; default: that of the run or data set."),
    "n": (200, "Number of images, drawn from the whole split; 32 to 1000."),
    "seed": (0, "Seed of the attacks' random draws."),
    "devices": (None, "Number of devices a config is to train on; default: those that are here."),
}
for _name, _help in _FLAGS.items():  # jaxrobust.main and evaluate have some too
    flags.DEFINE_string(_name, None, _help, allow_override=True)
for _name, (_default, _help) in _NUMBERS.items():
    flags.DEFINE_integer(_name, _default, _help, allow_override=True)
_JSON = flags.DEFINE_boolean("json", False, "Whether to print one JSON object instead.")


def main(argv: list[str]) -> None:
    """Read the flags, examine, and exit with what was found."""
    if len(argv) > 2:
        stop(f"{argv[2]!r} is one word too many; name one run, weights or function", 2)
    quiet_libraries()
    again = "the same command starts again"
    with ending(again, ". With that solved, run the same command again"):
        given: dict[str, Any] = {name: flags.FLAGS[name].value for name in (*_FLAGS, *_NUMBERS)}
        devices, images = given.pop("devices"), given["n"]
        if not 32 <= images <= 1000:
            raise ValueError(f"--n={images} is outside of 32 to 1000; leave it out for 200")
        if given["epsilon"] is not None:
            given["epsilon"] = number("epsilon", given["epsilon"])
        for name in ("options", "torch_args"):
            given[name] = mapping(name, given[name])
        named = None
        if _CONFIG.value is not None:
            named = config_name(config_flags.get_config_filename(flags.FLAGS["config"]))
        with patience.of(patience.LOADING):
            from jaxrobust.doctor import command  # after the flags: --help needs no JAX

        terminal = sys.stdout.isatty() and not _JSON.value
        place = argv[1] if len(argv) == 2 else None
        told, code = command.answer(
            given,
            place,
            config=_CONFIG.value,
            named=named,
            devices=devices,
            coloured=terminal and not os.environ.get("NO_COLOR"),  # https://no-color.org
            as_json=_JSON.value,
            columns=shutil.get_terminal_size().columns if terminal else None,
            show=partial(print, flush=True),
        )
        if _JSON.value:
            print(json.dumps(told), flush=True)
    sys.exit(code)


if __name__ == "__main__":
    keep_large_buffers()
    use_every_core()
    patience.begin(patience.LOADING)  # a config imports the package too
    app.run(main, flags_parser=partial(parse, hint="--help lists the flags"))
