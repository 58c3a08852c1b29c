"""`python -m jaxrobust.evaluate (--workdir RUN | --model NAME --weights PATH --dataset NAME) ...`.

A folder that tools/import_torch.py wrote says itself what it is: --weights FOLDER without --model.

Attacks a network, prints what it withstands and writes the record of it. The same command again
continues an evaluation that was interrupted, and prints one that is done. On a pod, start it with
--multihost on every host: they share the images; any number of hosts continues.

Exit codes: 0 done; 2 a mistake in the command or the data, with one sentence on stderr; 3 it
stopped for another reason that it names (full disk); 130 interrupted. Where a host dies, JAX aborts
the others.
"""

import traceback
from dataclasses import replace
from functools import partial
from pathlib import Path

from absl import app, flags, logging

from jaxrobust.runtime.commandline import (
    define_host_flags,
    hosts,
    leave,
    mapping,
    number,
    parse,
    stop,
)
from jaxrobust.runtime.launch import join_hosts, keep_large_buffers, use_every_core

_text = partial(flags.DEFINE_string, default=None)
_WORKDIR = _text(  # jaxrobust.main has this flag too
    "workdir", help="A run to evaluate: its network, data and radius.", allow_override=True
)
_PHASE = _text("phase", help="pretrain or train; default: the last one with weights.")
_MODEL = _text("model", help="Instead of a run: a network of models.available().")
_WEIGHTS = _text("weights", help="Its weights: .safetensors, .pth or .pt, or an imported folder.")
_OPTIONS = _text(
    "options",
    help="Of --model, where its weights do not say: fields of its row, \"{'stem_strides': (1,)}\".",
)
_CLASSES = flags.DEFINE_integer("num_classes", None, "Of --model; default: the data set's.")
_SIZE = flags.DEFINE_integer("image_size", None, "Pixels; default: the run's, or the data set's.")
_DATASET = _text(
    "dataset", help="digits, cifar10, imagenet2012, folder:PATH, ...; default: the run's."
)
_SPLIT = _text(
    "split",
    help="Such as test[:1000]; default: the run's test split, or test; of imagenet2012 "
    "validation@robustbench.",
)
_NAMES = _text("classes", help="Only these: imagenet100, or a file of names; default: the run's.")
_DATA_DIR = _text("data_dir", help="Where data sets lie; default: the run's, or $TFDS_DATA_DIR.")
_PREPROCESSING = _text("preprocessing", help="Such as Res256Crop224; default: as training tests.")
_NORM = _text("norm", help="linf, l2 or l1; default: the run's, or linf.")
_EPSILON = _text("epsilon", help="Radius, such as 4/255, in [0, 1] pixels; default: the run's.")
_ATTACK = _text("attack", default="autoattack", help="clean, pgd-K, apgd-ce or autoattack.")
_VERSION = _text("version", default="standard", help="Of AutoAttack: standard or plus.")
_SEARCH = _text(
    "search_dtype", default="float32", help="bfloat16 searches faster; float32 always judges."
)
_N = flags.DEFINE_integer("n", 0, "How many images, the first ones of the split; 0: all.")
_BATCH = flags.DEFINE_integer(
    "batch", None, "Images at a time, of AutoAttack in each process; no verdict depends on it."
)
_SEED = flags.DEFINE_integer("seed", 0, "Of the attacks' random draws.")
_OUT = _text("out", help="Where records go; default: RUN/evaluation or runs/evaluation-NAME.")
define_host_flags()


def main(argv: list[str]) -> None:
    """Read the flags and evaluate."""
    if len(argv) > 1:
        stop(f"{argv[1]!r} is no flag; every value goes to one, see --help", 2)
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.FATAL)  # Orbax logs 30 lines a checkpoint
    pod = hosts()
    end = partial(leave, at_once=pod is not None)  # other hosts may wait for this one
    try:
        if pod is not None:
            join_hosts(**pod)
        answer, first = _evaluate()
        if first:
            print(answer, flush=True)
    except KeyboardInterrupt:
        resumes = _ATTACK.value in ("autoattack", "apgd-ce")
        again = f"the same command {'continues' if resumes else 'starts again'}"
        end(f"interrupted; {again}", 130)
    except ValueError as error:
        end(error, 2)
    except OSError as error:
        end(f"{error}. With that solved, run the same command again", 3)
    except Exception as error:
        if pod is None:
            raise
        traceback.print_exc()
        end(error, 1)


def _evaluate() -> tuple[str, bool]:
    """Return the answer, and whether this process is the one that prints it."""
    run, folder = (Path(f.value) if f.value else None for f in (_WORKDIR, _WEIGHTS))
    if folder and (run or not folder.is_dir()):
        folder = None  # a file, which does not say whose it is
    if (run is None) == (_MODEL.value is None and folder is None):
        raise ValueError(
            "give --workdir RUN, or --model NAME --weights PATH --dataset NAME (no --model where "
            "PATH is a folder that tools/import_torch.py wrote)"
        )
    if _MODEL.value and not _WEIGHTS.value:
        raise ValueError("--model needs --weights PATH, its weights")
    given = {"--weights": _WEIGHTS.value, "--num_classes": _CLASSES.value}
    given |= {"--options": _OPTIONS.value}
    if _WORKDIR.value and (extra := [k for k, v in given.items() if v is not None]):
        raise ValueError(f"{' and '.join(extra)} would replace the run's own; that takes --model")
    if _WEIGHTS.value and _PHASE.value:
        raise ValueError("--phase is one of a --workdir; --weights has but one")
    epsilon = None if _EPSILON.value is None else number("epsilon", _EPSILON.value)
    options = mapping("options", _OPTIONS.value)
    import jax  # after the flags: --help needs no JAX

    from jaxrobust.evaluation import command, subject
    from jaxrobust.runtime import compilation
    from jaxrobust.weights import runs

    beside = run or Path(_OUT.value or "runs/evaluation")
    compilation.use_persistent_cache(beside.parent / "xla-cache")
    if run:
        origin = subject.of_run(run)
    elif folder:
        origin = subject.of_folder(folder, _MODEL.value, options)
    else:
        origin = subject.of_file(_MODEL.value, Path(_WEIGHTS.value), options)
    own = origin.network.num_classes
    if None not in (own, _CLASSES.value) and own != _CLASSES.value:
        raise ValueError(f"--num_classes={_CLASSES.value}, but {folder} holds {own}; leave it out")
    asked, source = subject.settled(
        origin,
        network={"num_classes": _CLASSES.value, "image_size": _SIZE.value},
        dataset=_DATASET.value,
        split=_SPLIT.value,
        classes=_NAMES.value,
        data_dir=_DATA_DIR.value,
        norm=_NORM.value,
        epsilon=epsilon,
    )
    size = asked.network.image_size or 0  # settled
    if run:
        runs.check_classes(run, source, renamed=True)
        which, weights = runs.run_weights(run, _PHASE.value, image_size=size)
    else:
        which, network, weights = subject.file_weights(asked.network, Path(_WEIGHTS.value))
        asked = replace(asked, network=network)
    question = command.Question(
        attack=_ATTACK.value,
        version=_VERSION.value,
        images=_N.value,
        batch=_BATCH.value,
        seed=_SEED.value,
        preprocessing=subject.preprocessing(origin, size, source, _PREPROCESSING.value),
        search_dtype=_SEARCH.value,
    )
    records = run / "evaluation" if run else Path("runs") / f"evaluation-{asked.network.name}"
    out = Path(_OUT.value or records)
    answer = command.evaluate(asked, source, which, weights, question, out=out)
    return answer, jax.process_index() == 0


if __name__ == "__main__":
    keep_large_buffers()
    use_every_core()
    app.run(main, flags_parser=partial(parse, hint="--help lists the flags"))
