"""Which planted faults `python -m jaxrobust.doctor` finds, and its alarms on healthy networks.

python tools/bench_doctor.py RUN [RUN ...] [--plant RUN] [--photographs FOLDER] [--only FAULT,...]

Each fault of a network is planted into the run --plant (default: the first), each fault of a config
into a config of the package; all RUNs count as healthy. --photographs has one folder per class: two
small networks are trained on them, one with PIL's resizing and one with array resizing. Each row is
one command in a separate process with nothing cached. A fault is found if its check is red. The
blame is wrong if another check is red or yellow without saying that it follows.
Exits with 1 if a fault is missed, blamed wrongly, or a healthy network raises an alarm.
"""

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from jaxrobust.data import Prepared, open_source
from jaxrobust.doctor.patient import resized
from jaxrobust.runtime.commandline.arguments import Arguments, answer
from jaxrobust.weights.trained import runs
from tools import timed

NETWORKS = {  # function of planted/networks.py -> the check that should find it
    "noise": "determinism",
    "dropout_key": "determinism",
    "train_mode": "train-mode",
    "not_a_number": "finite-logits",
    "softmax": "softmax",
    "in_0_to_255": "input-range",
    "not_normalised": "missing-normalisation",
    "normalised_twice": "double-normalisation",
    "bgr": "channel-order",
    "other_order": "label-order",
    "shifted_order": "label-order",
    "one_class": "one-class",
    "rounded": "zero-gradients",
    "saturated": "zero-gradients",
    "common_term": "dlr-against-ce",
    "downhill": "pgd-against-noise",
    "detector": "radius",
}
_QUICK, _OWN = "--config=quickstart", "tools/planted/own_network.py:make"
_RESNET = ("--config=cifar10_convnext", "--config.model.name=resnet18")
CONFIGS = {  # check -> a config with its fault
    "heavy-augmentation": (
        *(_QUICK, "--config.pretrain.epochs=0", "--config.data.augmentation=crop|randaugment"),
    ),
    "step-rule": (_QUICK, "--config.attack.name=pgd", "--config.attack.step_size=2/255"),
    "one-step": (_QUICK, "--config.attack.steps=1"),
    "normalised-twice": (
        *("--config=cifar10_convnext", f"--config.model.name={_OWN}"),
        "--config.init.normalize=imagenet",
    ),
    "batch-statistics": (
        *(*_RESNET, "--config.train.objective=trades", "--config.attack.start=random"),
        "--config.attack.statistics=batch",
    ),
    "ema-horizon": (_QUICK, "--config.train.ema_decay=0.9999"),
    "warm-up": (_QUICK, "--config.train.warmup_epochs=20"),
    "batch-and-mesh": (_QUICK, "--devices=200"),
    "image-size": (_QUICK, "--config.model.image_size=32"),
}
REMARKS = ("batch-statistics",)  # only yellow, because papers have trained like this
_SIZE, _RESIZED = 64, "bilinear-72-crop-64"  # of the photographs
_TRAINING = (  # on them
    *("--config.data.train_split=train", "--config.data.selection_split=test"),
    *("--config.data.augmentation=none", "--config.pretrain.epochs=60"),
    *("--config.pretrain.batch_size=20", "--config.train.epochs=0"),
)


class Case(NamedTuple):
    """One command, and the check that should find its fault."""

    name: str
    words: tuple[str, ...]
    check: str | None  # None: nothing
    run: str = ""  # in which the fault is planted


class Row(NamedTuple):
    """The findings of one command."""

    name: str
    check: str | None
    red: list[str]
    yellow: list[str]  # that do not follow from others
    follow: list[str]
    seconds: float

    @property
    def right(self) -> bool:
        """Tell whether only the fault was blamed; for a healthy network, nothing."""
        wanted = [self.check] if self.check else []
        level = ([], wanted) if self.check in REMARKS else (wanted, [])
        return (self.red, self.yellow) == level


def parse() -> argparse.Namespace:
    parser = Arguments(__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="Folders of healthy runs.")
    parser.flag("plant", type=Path, help="Run to plant the faults in; default: the first.")
    parser.flag("photographs", type=Path, help="Photographs in one folder for each class.")
    parser.flag("only", default="", help="Names of the rows to run, separated by commas.")
    parser.flag("json", action="store_true", help="Print one JSON object on the last line.")
    return parser.parse_args()


def planted(run: Path, folder: Path) -> Iterator[Case]:
    config = runs.run_config(run)
    data, size = config.data, config.model.image_size
    words = ["--dataset", data.name, "--split", data.test_split, f"--image_size={size}"]
    words += [f"--norm={config.attack.norm}", f"--epsilon={config.attack.epsilon!r}"]
    words += [f"--data_dir={data.dir}"] if data.dir else []
    words += [f"--preprocessing={data.preprocessing}"] if data.preprocessing else []
    for fault, check in NETWORKS.items():
        if fault == "bgr" and config.model.in_channels != 3:
            continue
        own = list(words)
        if fault == "detector":  # it uses the first images
            own[3] = f"{data.test_split}[:200]"
        file = ROOT / "tools" / "planted" / f"networks.py:{fault}"
        yield Case(fault, (str(file), *own), check, str(run))
    if other := _other_record(run, folder):
        yield Case("other_weights", (str(other),), "accuracy")


def _other_record(run: Path, folder: Path) -> Path | None:
    records = [json.loads(line) for line in (run / "results.jsonl").read_text().splitlines()]
    if max(record["clean"] for record in records) > 0.8:
        return None
    copy = folder / run.name
    copy.mkdir()
    for path in run.iterdir():
        if path.name != "results.jsonl":
            (copy / path.name).symlink_to(path.resolve())
    raised = [record | {"clean": record["clean"] + 0.2} for record in records]
    (copy / "results.jsonl").write_text("".join(json.dumps(r) + "\n" for r in raised))
    return copy


def of_photographs(photographs: Path, folder: Path) -> Iterator[Case]:
    """Yield a network trained with PIL's resizing, and one trained on resized arrays."""
    (folder / "photographs").mkdir()
    (folder / "photographs" / "train").symlink_to(photographs.resolve())
    name = f"folder:{folder / 'photographs'}"
    source = open_source(name, "train")
    places = np.arange(len(source))
    prepared = Prepared(source, image_size=_SIZE, preprocessing=_RESIZED, images=len(source))
    settings: dict[str, Any] = {"preprocessing": _RESIZED, "image_size": _SIZE}
    parts = [resized(source, places[i : i + 100], **settings) for i in range(0, len(places), 100)]
    arrays = np.concatenate([part for part in parts if part is not None])
    for row, check, images in (
        ("resized_by_pil", None, prepared[places]),
        ("resized_as_arrays", "resizing", arrays),
    ):
        run = folder / row
        _train(run, np.round(255 * images).astype(np.uint8), prepared.labels(), source.classes)
        words = (str(run), f"--dataset={name}", "--split=train", f"--preprocessing={_RESIZED}")
        yield Case(row, words, check)


def _train(run: Path, images: np.ndarray, labels: np.ndarray, classes: tuple[str, ...]) -> None:
    file = run.with_suffix(".npz")
    both = {"images": images, "labels": labels}
    arrays: dict[str, Any] = {f"{s}_{k}": v for s in ("train", "test") for k, v in both.items()}
    np.savez(file, class_names=np.asarray(classes), **arrays)
    changes = {
        "model.image_size": _SIZE,
        "model.num_classes": len(classes),
        "data.name": f"npz:{file}",
        "test.images": len(images),
    }
    words = [f"--config.{key}={value}" for key, value in changes.items()] + [*_TRAINING]
    config = ROOT / "configs" / "cifar_study.py:patch"
    done = _done("jaxrobust.main", f"--config={config}", *words, f"--workdir={run}")
    if done.returncode:
        raise OSError(f"the training on photographs exited with {done.returncode}: {done.stderr}")


def _done(module: str, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command, env = [sys.executable, "-m", module, *words], os.environ | environment
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)


def examined(case: Case, cache: Path) -> Row:
    environment = {"JAX_COMPILATION_CACHE_DIR": str(cache), "PLANTED_IN": case.run}
    doctor = functools.partial(_done, "jaxrobust.doctor", *case.words, "--json", **environment)
    done, seconds, _ = timed(doctor)
    if done.returncode not in (0, 1):
        raise OSError(f"{case.name}: the doctor exited with {done.returncode}: {done.stderr}")
    return judged(case, json.loads(done.stdout.splitlines()[-1]), seconds)


def judged(case: Case, printed: dict[str, Any], seconds: float) -> Row:
    findings = [finding for each in printed["examined"] for finding in each["findings"]]

    def named(level: str, follows: bool) -> list[str]:
        wanted = (level, follows)
        return [f["check"] for f in findings if (f["level"], bool(f["follows_from"])) == wanted]

    red, yellow, follow = named("red", False), named("yellow", False), named("yellow", True)
    return Row(case.name, case.check, red, yellow, follow, seconds)


def _line(row: Row) -> str:
    checks = (", ".join(names) or "-" for names in (row.red, row.yellow, row.follow))
    right = "yes" if row.right else "NO"
    cells = (row.name, row.check or "nothing: healthy", *checks, right, f"{row.seconds:.0f}")
    return f"| {' | '.join(cells)} |"


def _summary(rows: list[Row]) -> str:
    faulty = [row for row in rows if row.check]
    healthy = [row for row in rows if not row.check]
    detected = sum(row.check in row.red for row in faulty)
    wrong = sum(not row.right for row in faulty)
    alarms = sum(not row.right for row in healthy)
    longest = max((row.seconds for row in rows), default=0)
    return (
        f"\n{detected} of {len(faulty)} planted faults found, {wrong} missed or blamed wrongly; "
        f"{alarms} of {len(healthy)} healthy networks raise an alarm; longest: {longest:.0f} s"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    only = {name for name in args.only.split(",") if name}
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        cases = [Case(str(run), (str(run),), None) for run in args.runs]
        cases += planted(args.plant or args.runs[0], folder)
        cases += [Case(name, words, name) for name, words in CONFIGS.items()]
        if unknown := only - {case.name for case in cases} - {"photographs"}:
            raise ValueError(f"--only={min(unknown)} is not a row; leave it out for all rows")
        print("| fault or run | to be red | red | yellow | follow | right | seconds |")
        print("|---|---|---|---|---|---|---|", flush=True)
        chosen: list[Case] = [case for case in cases if not only or case.name in only]
        if args.photographs and (not only or "photographs" in only):
            chosen += of_photographs(args.photographs, folder)
        for number, case in enumerate(chosen):
            rows.append(examined(case, folder / f"cache{number}"))
            print(_line(rows[-1]), flush=True)
    print(_summary(rows))
    if not args.json and not all(row.right for row in rows):
        sys.exit(1)
    return {"rows": [row._asdict() | {"right": row.right} for row in rows]}


if __name__ == "__main__":
    answer(run, parse(), "nothing is kept")
