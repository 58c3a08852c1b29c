"""`python -m jaxrobust.evaluate (--workdir RUN | --model NAME --weights PATH --dataset NAME) ...`.

An imported folder (jaxrobust.convert.import_torch), a RobustBench id and a timm id say themselves
what they are: --weights FOLDER without --model. What is on the internet is kept in a cache.
--function my_net.py:logits_fn --dataset NAME evaluates a network of any library, --torch
my_models.py:build --dataset NAME one in PyTorch.

Attacks a network, prints what it withstands and writes the record of it. The same command again
continues an evaluation that was interrupted, and prints one that is done. On a pod, start it with
--multihost on every host: they share the images; any number of hosts continues.

Exit codes: 0 done; 1 a fault of the program, with its traceback; 2 a mistake in the command or the
data, with one sentence on stderr; 3 it stopped for another reason that it names (full disk). The
same command continues after: 75 another process of the pod is gone; 143 SIGTERM; 130 interrupted.
"""

import sys
import traceback
from functools import partial
from typing import Any

from absl import app, flags

from jaxrobust.runtime.commandline.arguments import (
    define_host_flags,
    hosts,
    how_many,
    mapping,
    number,
    parse,
    quiet_libraries,
    stop,
    unable,
)
from jaxrobust.runtime.commandline.ending import Ending
from jaxrobust.runtime.processes.launch import keep_large_buffers, use_every_core
from jaxrobust.runtime.text import patience, terminal

_FLAGS = {
    "workdir": "Run to evaluate: its network, data, norm and radius.",
    "phase": "Phase of the run, such as pretrain or train; default: the last one that has weights.",
    "model": "Network of weights that are no run's: a name of models.available().",
    "weights": "Its weights: a file, an imported folder, a URL, hf://ORG/REPO, a RobustBench id "
    "such as Salman2020Do_R18, or a timm id such as convnext_tiny.fb_in1k.",
    "options": "Fields of the row of --model that its weights do not say: {'stem_strides': (1,)}.",
    "function": "Function of images in [0, 1] to logits instead: my_net.py:logits_fn, or "
    "my_package.nets:logits_fn.",
    "torch": "Network in PyTorch instead: my_models.py:build or my_package.nets:build, a function "
    "that returns the module and whose code is run, or a file of torch.export.save or "
    "torch.jit.save.",
    "torch_args": 'Arguments of that function, as JSON: {"depth": 28}.',
    "torch_output": "Which of several results of the module are the logits: a key or a place.",
    "dataset": "Data set: digits, cifar10, imagenet2012, folder:PATH, npz:PATH, hf:NAME, or "
    "cifar10-c:DIR; default: that of the run.",
    "split": "Split, such as test[:1000]; default: the test split of the run, or test, or of "
    "imagenet2012 validation@robustbench.",
    "classes": "List of the classes that are kept, imagenet100 or a file of names; default: that "
    "of the run.",
    "data_dir": "Folder of data sets; default: that of the run, or $TFDS_DATA_DIR.",
    "preprocessing": "Preprocessing, such as Res256Crop224; default: that of the run's tests.",
    "norm": "Norm of the attack: linf, l2 or l1; default: that of the run, or linf.",
    "epsilon": "Radius, such as 4/255, in units of [0, 1] pixels; default: that of the run.",
    "attack": "Attack: clean, autoattack, attacks of it such as apgd-ce or apgd-ce,apgd-t, or one "
    "of K steps such as pgd-20.",
    "version": "Version of AutoAttack: standard, plus, rand, or custom for named attacks.",
    "rule": "How --version=rand judges the draws of an image: majority (more than half are right; "
    "the default), mean (of their softmax probabilities), or one-draw, as auto-attack judges; its "
    "number stands beside that of the others.",
    "ladder": "Radii that share what they find, such as linf:0:16/255:9, the smallest first.",
    "relative_step": "Length of a step of an attack of K steps, as a multiple of epsilon / K; "
    "default: the attack's own.",
    "step": "Length of a step of these instead, such as 0.8/255, in the units of the radius.",
    "start": "Where these start: image, random (AutoAttack's, or of --l1_rule art ART's), uniform "
    "(in the ball of linf or l2, not brought into [0, 1] before the first gradient) or "
    "uniform-boxed (foolbox's); default: the attack's own.",
    "l1_rule": "How these step and project on l1: sparse, as APGD does (the default), or art, as "
    "ART 1.10 does: along the whole gradient, and scaled back.",
    "search_dtype": "Type to search in: float32, or bfloat16, which is faster; float32 judges.",
    "corruptions": "Common corruptions to evaluate under in place of an attack: all, or kinds such "
    "as fog,snow, or with a severity fog-3.",
    "frost": "Folder of the photographs of frost, frost1.png to frost5.jpg.",
    "n": "Number of images, the first ones of the split, or all.",
    "bundle": "New folder for adversarial images, hashes and a program that checks the number.",
    "out": "Folder of the records; default: RUN/evaluation or runs/evaluation-NAME.",
}
_DEFAULTS = {"attack": "autoattack", "version": "standard", "search_dtype": "float32", "n": "all"}
_NUMBERS = {
    "num_classes": (None, "Number of classes of --model; default: that of the data set."),
    "batch": (
        None,
        "Number of images at a time, for AutoAttack in each process; no verdict depends on it.",
    ),
    "seed": (0, "Seed of the attacks' random draws."),
    "draws": (None, "Number of draws of an image that --version=rand judges by; default: 20."),
    "steps": (None, "Number of steps of a named attack; default: its own."),
    "targets": (None, "Number of classes that a named targeted attack aims at; default: its own."),
    "restarts": (None, "Number of restarts of a named attack; default: its own."),
}
_SEVERAL: dict[str, tuple[Any, str]] = {
    "image_size": (
        flags.DEFINE_multi_integer,
        "Side of the images in pixels, one record each; default: that of the run or data set.",
    ),
    "threat": (
        flags.DEFINE_multi_string,
        "Norm and radius, such as linf:4/255; give several for a record each and one of all.",
    ),
    "replay": (
        flags.DEFINE_multi_string,
        "Folder of an evaluation of these images, whose adversarial images are tried first.",
    ),
}
_SWITCHES = {
    "noreplay": "Whether to attack without trying what was found at other radii.",
    "again": "Whether to compute what is done already anew, as a record beside the first.",
    "union_only": "Whether to attack in each --threat, or part of --worst_case, only what stands "
    "before it: cheaper, and the union or worst case is all that is known then.",
    "worst_case": "Whether to run PGD-20 and AutoAttack in linf and PGD-20 in l2 and l1 as Tang et "
    "al. 2022, each on all images, and count those that withstand all: at 8/255, 1.5 and 40 for "
    "32 px, 8/255, 8 and 1600 for 224 px, or at the radius of each --threat.",
    "selected": "Whether to evaluate the weights that jaxrobust select chose.",
}
for _name, _help in _FLAGS.items():  # jaxrobust.main has a --workdir too
    flags.DEFINE_string(_name, _DEFAULTS.get(_name), _help, allow_override=True)
for _name, (_default, _help) in _NUMBERS.items():
    flags.DEFINE_integer(_name, _default, _help)
for _name, (_define, _help) in _SEVERAL.items():
    _define(_name, None, _help)
for _name, _help in _SWITCHES.items():
    flags.DEFINE_boolean(_name, False, _help)
define_host_flags()


def _describe() -> None:
    """Write the attacks that there are into the help of the flags, if that is asked for."""
    if not {"--help", "-help", "--helpfull", "--helpshort", "-h", "--h", "-?"} & set(sys.argv[1:]):
        return
    from jaxrobust.attacks import registry  # which needs JAX: --help alone waits for it
    from jaxrobust.data.source import KINDS
    from jaxrobust.data.sources.registry import written

    known = flags.FLAGS
    known["attack"].help += f" Of K steps:\n{registry.described(registry.fixed)}"
    known["attack"].help += f"\nOf AutoAttack:\n{registry.described(registry.searching)}"
    rows = registry.fixed().values()
    lengths = [f"{row.length:g} of {row.written}" for row in rows]
    starts = [f"{row.fixed.start} of {row.written}" for row in rows if row.fixed]
    kinds = [f"{kind.written}: {kind.help}" for kind in KINDS.values()]
    known["dataset"].help += "\n".join([f" Names are {written()}, or TFDS's.", *kinds])
    known["relative_step"].help += f" These are {', '.join(lengths)}."
    known["start"].help += f" These are {', '.join(starts)}."


def main(argv: list[str]) -> None:
    """Read the flags and evaluate."""
    if len(argv) > 1:
        stop(f"{argv[1]!r} is no flag; every value goes to one, see --help", 2)
    quiet_libraries()
    pod = hosts()
    patience.end()  # the first host speaks for all, and joining has its own words
    end = Ending(_again)
    try:
        with end:
            answer, first = _evaluated(end, pod)
        if first:
            terminal.show(answer)
    except KeyboardInterrupt:
        end(f"interrupted; {_again()}", 130)
    except ValueError as error:
        end(error, 2)
    except (OSError, MemoryError) as error:
        end(f"{unable(error)}. With that solved, run the same command again", 3)
    except Exception as error:
        if pod is None:
            raise
        traceback.print_exc()
        end(error, 1)


def _again() -> str:
    """Say what the same command does with what is written of an evaluation."""
    rows = sys.modules.get("jaxrobust.attacks.fixed_steps")  # else nothing has begun
    is_cascade = getattr(rows, "is_cascade", None)
    if is_cascade and not is_cascade(flags.FLAGS.attack):
        return "the same command starts again, because nothing was saved yet"
    return "the same command continues with the verdicts so far"


def _evaluated(end: Ending, pod: dict[str, Any] | None) -> tuple[str, bool]:
    """Return the answer, and whether this process prints it."""
    if pod is not None:
        end.join(pod)
    given: dict[str, Any] = {name: flags.FLAGS[name].value for name in (*_FLAGS, *_NUMBERS)}
    for name in ("epsilon", "relative_step", "step"):
        given[name] = None if given[name] is None else number(name, given[name])
    given["n"] = how_many("n", given["n"])
    given |= {name: flags.FLAGS[name].value for name in _SWITCHES}
    sizes, threats = (_listed(flags.FLAGS[name].value) for name in ("image_size", "threat"))
    given["image_size"] = sizes[0] if len(sizes) == 1 else None
    given["replay"] = tuple(_listed(flags.FLAGS.replay))
    ladder = given.pop("ladder")
    if given["corruptions"] is not None and flags.FLAGS["attack"].using_default_value:
        given["attack"] = "clean"
    for name in ("options", "torch_args"):
        given[name] = mapping(name, given[name])
    with patience.of(patience.LOADING, here=pod is None):
        from jaxrobust.evaluation.questions import command  # after the flags: --help needs no JAX

    return command.answer(command.Given(**given), sizes, threats, ladder)


def _listed(value: Any) -> list[Any]:
    return [] if value is None else value if isinstance(value, list) else [value]


if __name__ == "__main__":
    keep_large_buffers()
    use_every_core()
    patience.begin(patience.LOADING)
    _describe()
    app.run(main, flags_parser=partial(parse, hint="--help lists the flags"))
