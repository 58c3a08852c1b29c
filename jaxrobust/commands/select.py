"""Choose a run's weights on its selection split: `jaxrobust select RUN`.

Candidates are the weights that the run kept (`checkpoint.keep_every_epochs`), raw and averaged, at
each --image_size. RUN/selection.json gets what each reaches, and the choice with its reason;
RUN/selection.png the curves. With --attack autoattack, adversarial images of earlier candidates are
tried first, and only a candidate that may be the best after APGD-CE meets the other attacks: what
the rest reaches is an upper bound. The test split is not looked at: afterwards `python -m
jaxrobust.evaluate --workdir RUN --selected` tests the choice, once. The same command again computes
only what is missing.

Exit codes: 0 done; 2 a mistake, with one sentence on stderr; 3 another reason that it names, such
as a full disk; 130 interrupted.
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from jaxrobust.analysis.comparison import begun
from jaxrobust.analysis.comparison.candidates import draw
from jaxrobust.runtime.commandline.arguments import Arguments, answer, how_many, quiet_libraries
from jaxrobust.runtime.processes.launch import keep_large_buffers
from jaxrobust.runtime.text import patience

RULE = "of equal ones the later epoch, then ema before raw, then the smaller images"
ONE_CLASS = "one that answers one class only where all do"

# (weights, in full) -> clean, robust, images; not in full: `robust` may be an upper bound.
Measure = Callable[[Any, bool], dict[str, Any]]
_REPLAYED = 4  # candidates whose adversarial images are kept; neighbours resemble each other most


class Size(NamedTuple):
    """How candidates are evaluated at one image size."""

    preprocessing: str
    measure: Measure
    network: Any  # (params, stats, images) -> logits
    images: Any  # `data.Prepared`


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the command line; hyphens and underscores are the same."""
    parser = Arguments(__doc__ or "")
    parser.add_argument("run", type=Path, metavar="RUN", help="Workdir of the run.")
    parser.flag("phase", help="Phase of the run; default: the last one that kept weights.")
    parser.flag(
        "image_size",
        type=int,
        nargs="+",
        metavar="PIXELS",
        help="Sides of the images in pixels, one or several; default: that of the run.",
    )
    parser.flag(
        "attack",
        choices=["apgd-ce", "autoattack"],
        default="apgd-ce",
        help="Attack; AutoAttack takes longer.",
    )
    parser.flag("steps", type=int, help="Number of steps of APGD-CE, such as 1 or 10; default: 10.")
    parser.flag(
        "split", help="Split to choose on; default: the selection split of the run, never its test."
    )
    parser.flag(
        "n", default="all", help="Number of images, the first ones of the split; default: all."
    )
    parser.flag("batch", type=int, help="Images at a time; default: evaluation.batch_size.")
    parser.flag("json", action="store_true", help="Print one JSON object on the last line.")
    return parser.parse_args(argv)


def _checked(args: argparse.Namespace) -> None:
    """Refuse numbers out of range, before anything is read."""
    if args.attack == "autoattack" and args.steps is not None:
        raise ValueError("--steps are those of APGD-CE; leave it out of --attack autoattack")
    steps = 10 if args.steps is None else args.steps
    least = [("steps", steps, 1), ("batch", args.batch, 1)]
    least += [("image_size", size, 1) for size in args.image_size or ()]
    for name, value, low in least:
        if value is not None and value < low:
            raise ValueError(f"--{name}={value} must be at least {low}")
    args.n = how_many("n", args.n)
    args.steps = None if args.attack == "autoattack" else steps


def _phase(args: argparse.Namespace) -> str:
    """Return the phase whose weights are the candidates."""
    from jaxrobust.weights.trained import kept, runs

    config = runs.run_config(args.run, args.phase)
    having = [name for name in config.phases if kept.steps_of(args.run, name)]
    if not having or args.phase not in (None, *having):
        of = f"the phase {args.phase} of {args.run}" if having else str(args.run)
        raise ValueError(
            f"{of} has kept no weights to choose from; train with "
            "--config.checkpoint.keep_every_epochs=N"
        )
    return args.phase or having[-1]


def _at(config: Any, changes: dict[str, dict[str, Any]]) -> Any:
    """Return a copy of a config, where sections have some other values."""
    from jaxrobust.config import Values, plain

    own = plain(config)
    for section, values in changes.items():
        own[section] |= {key: value for key, value in values.items() if value is not None}
    return json.loads(json.dumps(own), object_hook=Values)


def _config(args: argparse.Namespace, phase: str) -> Any:
    """Return the run's config as the phase sees it, with the flags' split and images.

    Raises:
      ValueError: the choice would look at the test split.
    """
    from jaxrobust.data.splits import grammar as splits
    from jaxrobust.evaluation.records import trained
    from jaxrobust.runtime.text.progress import say
    from jaxrobust.weights.trained import runs

    config = runs.run_config(args.run, phase)
    settings = {"images": args.n, "batch_size": args.batch}
    config = _at(config, {"data": {"selection_split": args.split}, "evaluation": settings})
    data = config.data
    if splits.overlap(data.selection_split, data.test_split, data.name):
        same = data.selection_split == data.test_split
        said = "is" if same else f"holds images, or may, of {data.test_split},"
        raise ValueError(
            f"{data.selection_split} {said} the test split of {args.run}, which a choice must not "
            "look at; give another --split"
        )
    for images in trained.trained_on(config):
        if splits.same_images(images, (data.name, data.selection_split)):
            say(
                f"WARNING: {data.selection_split} holds images of {images[1]}, which {phase} is "
                "trained on: the choice does not see where the weights overfit"
            )
    return config


def _size(args: argparse.Namespace, phase: str, config: Any, image_size: int, folder: Path) -> Size:
    """Return how candidates are evaluated at an image size; nothing compiles yet.

    Raises:
      ValueError: a network that does not take such images.
    """
    from jaxrobust.config import network_of
    from jaxrobust.data import Prepared
    from jaxrobust.data.stream import pipeline
    from jaxrobust.evaluation.engine import accuracy
    from jaxrobust.evaluation.questions import target as subjects
    from jaxrobust.runtime.devices import sharding
    from jaxrobust.training import build
    from jaxrobust.training.run import splits

    source = splits.opened(config, "selection_split")
    wanted = subjects.preprocessing(subjects.of_run(args.run, phase), image_size, source)
    config = _at(config, {"model": {"image_size": image_size}})
    config["data"]["preprocessing"] = wanted
    images = splits.evaluated(config, "selection_split", config.evaluation, args.run)
    said = pipeline.preprocessing_id(source, image_size, wanted)
    net = network_of(config, dtype="float32")
    how: dict[str, Any] = {"image_size": image_size, "preprocessing": said}
    shown = Prepared(images.source, images=len(images), **how)

    def forward(params: Any, stats: Any, given: Any) -> Any:
        return net.apply(params, stats, given)[0]

    if args.attack == "autoattack":
        return Size(said, _autoattack(config, forward, shown, folder), forward, shown)
    mesh = sharding.make_mesh()
    build.divides(images.batch_size, mesh.size, "--batch")
    evaluate = build.evaluation(config, mesh, steps=args.steps)

    def measure(weights: Any, full: bool) -> dict[str, Any]:
        del full  # this attack is one
        return accuracy.count(evaluate, weights, images, mesh, bar="images")

    return Size(said, measure, forward, shown)


def _autoattack(config: Any, forward: Any, shown: Any, folder: Path) -> Measure:
    """Return what AutoAttack says of weights, or, not in full, its first attack.

    The ledgers of the last candidates, in `folder`, are replayed.
    """
    import jax

    from jaxrobust import evaluation
    from jaxrobust.evaluation.network import collapse
    from jaxrobust.types import Threat

    size = config.model.image_size
    ledgers: list[Path] = []

    def measure(weights: Any, full: bool) -> dict[str, Any]:
        ledger = folder / f"ledger-{size}-{len(ledgers)}.jsonl"
        result = evaluation.autoattack(
            jax.tree_util.Partial(forward, *weights),
            shown,
            shown.labels(),
            **Threat.of(config.attack).settings(),
            attacks=None if full else ("apgd-ce",),
            seed=config.seed,
            batch_size=config.evaluation.batch_size,
            ledger=ledger,
            replay=ledgers[-_REPLAYED:],
        )
        ledgers.append(ledger)
        for old in ledgers[-_REPLAYED - 1 : -_REPLAYED]:
            old.with_suffix(".images").unlink(missing_ok=True)
        reached: dict[str, Any] = {
            "clean": float(result.clean.mean()),
            "robust": float(result.robust.mean()),
        }
        passes = sum(cost.forward + 2 * cost.backward for cost in result.costs)
        if one := collapse.of(result.answers, result.verdicts.labels):
            reached["collapse"] = one._asdict()
        return reached | {"images": len(shown), "passes": passes}

    return measure


def _question(args: argparse.Namespace, phase: str, config: Any) -> dict[str, Any]:
    """Return what every candidate of a file is asked."""
    from jaxrobust.types import Threat

    attack = {"name": args.attack, "steps": args.steps}
    return {
        "phase": phase,
        "metric": "clean" if config[phase].objective == "clean" else "robust",
        "dataset": config.data.name,
        "split": config.data.selection_split,
        "first_images": args.n or None,  # null: all
        "seed": config.seed,
        "dtype": "float32" if args.attack == "autoattack" else config.model.dtype,
        "attack": attack | Threat.of(config.attack).settings(),
    }


def _key(row: dict[str, Any]) -> tuple[int, str, int]:
    return row["step"], row["weights"], row["image_size"]


def choose(candidates: list[dict[str, Any]], metric: str) -> tuple[dict[str, Any], str]:
    """Return the best of the candidates, and why it is that.

    A network of one class keeps its answer under attack, which is no robustness: it is chosen only
    where all are such networks.
    """
    from jaxrobust.evaluation.network import collapse

    def rank(row: dict[str, Any]) -> tuple[Any, ...]:
        one = collapse.proven(row)
        return not one, row[metric], row["step"], row["weights"] == "ema", -row["image_size"]

    best = max(candidates, key=rank)
    aside = [] if collapse.proven(best) else [row for row in candidates if collapse.proven(row)]
    equal = sum(row[metric] == best[metric] for row in candidates if row not in aside) - 1
    reason = (
        f"the highest {metric} accuracy of {len(candidates)} candidates, {best[metric]:.2%} of "
        f"{best['images']:,} images"
    )
    if aside:
        left = "one that answers" if len(aside) == 1 else f"{len(aside)} that answer"
        reason += f"; {left} one class left out, at most {max(r[metric] for r in aside):.2%}"
    bounded = sum(not row.get("exact", True) for row in candidates)
    reason += f"; {bounded} reach no more after APGD-CE alone" if bounded else ""
    others = "another one reaches" if equal == 1 else f"{equal} others reach"
    return best, reason + (f"; {others} as much: {RULE}" if equal else "")


def _measured(
    args: argparse.Namespace, phase: str, sizes: dict[int, Size], done: set[tuple[int, str, int]]
) -> Iterator[dict[str, Any]]:
    """Yield the candidates that are not done, each with what it reaches."""
    from jaxrobust.evaluation.network import collapse
    from jaxrobust.runtime.text.progress import say
    from jaxrobust.weights.store import hashes
    from jaxrobust.weights.trained import kept

    for step in kept.steps_of(args.run, phase):
        missing = [
            (which, size)
            for which in kept.WHICH
            for size in sizes
            if (step, which, size) not in done
        ]
        if not missing:
            continue
        epoch, both = kept.read(args.run, phase, step)
        for which, size in missing:
            weights = kept.at_size(args.run, phase, both.of(which), size)
            reached = sizes[size].measure(weights, False)
            exact = args.attack != "autoattack"
            say(
                f"{phase}, epoch {epoch:g}, {which}, {size} px: clean {reached['clean']:.2%}, "
                f"robust {'' if exact else 'at most '}{reached['robust']:.2%} of "
                f"{reached['images']:,} images"
                + (", collapsed to one class" if collapse.proven(reached) else "")
            )
            yield {
                "phase": phase,
                "step": step,
                "epoch": epoch,
                "weights": which,
                "image_size": size,
                "preprocessing": sizes[size].preprocessing,
                "weights_sha256": hashes.weights_sha256(*weights),
                **{key: reached[key] for key in ("clean", "robust", "images")},
                "passes": reached.get("passes"),  # of AutoAttack; a backward one counts 2
                "exact": exact,
                "collapse": reached.get("collapse"),  # null: not seen
            }


def _in_full(
    args: argparse.Namespace, phase: str, sizes: dict[int, Size], row: dict[str, Any]
) -> dict[str, Any]:
    """Return a candidate with what AutoAttack leaves of the upper bound."""
    from jaxrobust.runtime.text.progress import say
    from jaxrobust.weights.trained import kept

    size, which = row["image_size"], row["weights"]
    if size not in sizes:
        raise ValueError(
            f"{size} px may be the best size, and has only met the first attack; give "
            f"--image_size {size} too"
        )
    epoch, both = kept.read(args.run, phase, row["step"])
    reached = sizes[size].measure(kept.at_size(args.run, phase, both.of(which), size), True)
    robust = min(row["robust"], reached["robust"])
    say(f"{phase}, epoch {epoch:g}, {which}, {size} px, in full: robust {robust:.2%}")
    passes = (row["passes"] or 0) + reached.get("passes", 0)
    return row | {"robust": robust, "exact": True, "passes": passes}


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Evaluate what is missing, choose, and return what stands in the file."""
    _checked(args)
    with patience.of(patience.LOADING):
        from jaxrobust.runtime.devices import compilation
        from jaxrobust.runtime.files import locks, provenance
        from jaxrobust.weights.trained import kept

    phase = _phase(args)
    config, path = _config(args, phase), args.run / kept.SELECTION
    sides = sorted(set(args.image_size or [config.model.image_size]))
    question = _question(args, phase, config)
    code = {"commit": provenance.commit(), "versions": provenance.versions()}
    compilation.use_persistent_cache(args.run.parent)
    lock = args.run / "selection.lock"
    held = locks.held(lock, what=f"the choice in {args.run}", otherwise="copy the run")
    with tempfile.TemporaryDirectory() as folder, held:
        sizes = {size: _size(args, phase, config, size, Path(folder)) for size in sides}
        candidates, computed = begun.candidates(
            path, question, begun.computed(args.run, phase, sizes)
        )
        begun.check_weights(args.run, candidates)
        code |= computed
        for row in _measured(args, phase, sizes, {_key(row) for row in candidates}):
            candidates = sorted([*candidates, row], key=_key)
            _write(path, question, candidates, code)
        chosen, reason = choose(candidates, question["metric"])
        while not chosen.get("exact", True):  # what is below an exact best, no attack makes better
            own = _in_full(args, phase, sizes, chosen)
            candidates = [own if _key(row) == _key(own) else row for row in candidates]
            _write(path, question, candidates, code)
            chosen, reason = choose(candidates, question["metric"])
        said = _write(path, question, candidates, code, chosen=chosen, reason=reason)
        picture = draw(said, args.run / "selection.png")
    words = kept.selected(args.run).words
    print(f"{words}, {chosen['image_size']} px: {reason}")
    for line in _doubts(chosen, candidates):
        print(f"WARNING: {line}")
    print(f"{path}\n{picture}")
    print(f"test it once: python -m jaxrobust.evaluate --workdir {args.run} --selected")
    return said


def _doubts(chosen: dict[str, Any], candidates: list[dict[str, Any]]) -> Iterator[str]:
    """Yield what puts a choice in doubt: it answers one class, or nobody looked."""
    if chosen.get("collapse"):
        yield chosen["collapse"]["words"]
    if older := sum("collapse" not in row for row in candidates):
        yield (
            f"{older} of {len(candidates)} candidates were measured by an older version, which did "
            "not look whether they answer one class; move the file away to measure them again"
        )


def _write(
    path: Path, question: Any, candidates: Any, code: Any, *, chosen: Any = None, reason: Any = None
) -> dict[str, Any]:
    """Write the file, whole; nothing is chosen before all candidates are done."""
    from jaxrobust.runtime.files import jsonl
    from jaxrobust.weights.trained import kept

    said = {"schema": kept.SCHEMA, **question, "rule": f"the highest; {ONE_CLASS}; {RULE}"}
    said |= {"chosen": chosen, "reason": reason, "candidates": candidates} | code
    jsonl.replace(path, json.dumps(said, indent=2) + "\n")
    return said


def main(argv: list[str] | None = None) -> None:
    """Choose as the command line says."""
    args = parse(argv)
    quiet_libraries()
    answer(run, args, "the same command continues")


if __name__ == "__main__":
    keep_large_buffers()
    main()
