"""A mistake that the command line alone shows is refused before JAX is imported."""

import json
import os
import subprocess
import sys

from absl.testing import absltest

from jaxrobust.attacks import ensembles, registry
from jaxrobust.evaluation.questions import stated
from tests.support import paths

# Each case in a fork: absl defines flags once per process.
PROGRAM = """
import contextlib, io, json, os, sys
from jaxrobust.__main__ import main

for words in json.load(sys.stdin):
    reading, writing = os.pipe()
    if not os.fork():
        sys.argv, error, code = ["jaxrobust", *words], io.StringIO(), 0
        with contextlib.redirect_stderr(error), contextlib.redirect_stdout(io.StringIO()):
            try:
                main()
            except SystemExit as stop:
                code = stop.code
        loaded = [name for name in ("jax", "flax", "torch") if name in sys.modules]
        os.write(writing, json.dumps([code, error.getvalue(), loaded]).encode())
        os._exit(0)
    os.close(writing)
    with open(reading) as answer:
        print(answer.read(), flush=True)
    os.wait()
"""
RECIPE = "configs/quickstart.py"
CASES = {
    "evalute quickstart": "did you mean evaluate",
    "train": "name one config",
    "train configs/quickstrat.py": "did you mean",
    f"train {RECIPE} extra": "unexpected argument 'extra'",
    f"train {RECIPE} --config quickstart": f"{RECIPE} and --config both name the config; leave",
    f"train {RECIPE} --config.atack.steps=3": "did you mean 'attack'",
    f"train {RECIPE} --config.attack.steps=abc": "is not a whole number",
    f"train {RECIPE} --workdri x": "did you mean --workdir",
    f"train {RECIPE} --seed 1 --seed 2": "more than once",
    "evaluate": "name a network",
    "evaluate quickstart extra": "unexpected argument 'extra'",
    "evaluate quickstart --workdir x": "leave --workdir out",
    "evaluate quickstart --phase foo": "use pretrain or train",
    "evaluate quickstart --norm l7": "one of linf, l2, l1, l0",
    "evaluate quickstart --epsilon abc": "is not a number",
    "evaluate quickstart --epsilon 4": "write 4/255",
    "evaluate quickstart --n 0": "is not a number of images",
    "evaluate quickstart --batch 0": "must be at least 1",
    "evaluate quickstart --threat linf:4": "write 4/255",
    "evaluate quickstart --threat l2:1 --norm l2": "leave --norm and --epsilon out",
    "evaluate quickstart --ladder linf:0:1": "has 3 parts",
    "evaluate quickstart --radius_at 32": "must be an image size in pixels",
    "evaluate quickstart --image_size 0": "must be at least 1",
    "evaluate quickstart --tie 1": "has no effect without --against",
    "evaluate quickstart --certify 0.25 --norm linf": "leave --norm=linf out",
    "evaluate quickstart --corruptions fgo": "fog",
    "evaluate quickstart --frost x": "without --corruptions",
    "evaluate quickstart --image_size 8 --image_size 8": "repeats a size",
    "evaluate quickstart --version fast --attack apgd-ce": "leave --attack=apgd-ce out",
    "evaluate quickstart --finsh": "did you mean --finish",
    "evaluate quickstart --attack autoatack": "did you mean autoattack",
    "evaluate quickstart --attack pgd-0": "choose one of clean, fgsm, pgd-K",
    "evaluate quickstart --version quick": "choose one of standard, plus, rand, fast, custom",
    "evaluate --workdir a --function b.py:c": "--workdir and --function",
    "doctor a b": "unexpected argument 'b'",
    "doctor quickstart --n 3": "must be between 32 and 1000",
    "doctor quickstart --norm l3": "--norm=l3 is unknown; choose one of linf, l2, l1",
    f"doctor --config {RECIPE} --devices 0": "--devices=0 must be at least 1",
    f"doctor --config {RECIPE} --devices -1": "--devices=-1 must be at least 1",
    "estimate": "required: config",
    "why": "config",
    "why configs/quickstrat.py": "did you mean",
    "report": "PATH",
    "report quickstart --watch --out x.html": "leave out --out and --json",
    "report quickstart --watch --every 0": "--every=0.0 must be at least 1",
    "select runs/x --attack foo": "choose from",
    "select runs/x --attack autoattack --steps 3": "leave it out with --attack autoattack",
    "compare": "evaluations",
    "compare a b --threat l3:1": "the norm 'l3' is unknown; choose one of linf",
    "verify": "BUNDLE",
    "models --jsno": "did you mean --json",
    "import a": "out",
    "export a --layout module": "out",
    "export a.py:f --layout module --out x": "name a run or weights",
    "prepare cifar11": "one of imagenet",
    "new x": "name the images",
    "new x.py --data digits --epsilon 0": "must be above 0",
    "check configs/quickstrat.py": "did you mean",
    f"check {RECIPE} --devices 0": "must be at least 1",
    "figure a --knid x": "did you mean --kind",
    "figure a --threat linf": "has no radius; write linf:RADIUS",
}


class RefusalsTest(absltest.TestCase):
    def test_before_jax_is_imported(self):
        environment = os.environ | {"JAXROBUST_ALLOCATOR": "system"}  # else it starts again
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM],
            input=json.dumps([case.split() for case in CASES]),
            capture_output=True,
            text=True,
            check=True,
            cwd=paths.ROOT,
            env=environment,
        )
        answers = [json.loads(line) for line in done.stdout.splitlines()]
        self.assertLen(answers, len(CASES))
        for (case, words), (code, error, loaded) in zip(CASES.items(), answers, strict=True):
            with self.subTest(case):
                self.assertEqual(code, 2, error)
                self.assertIn(words, " ".join(error.split()))
                self.assertEmpty(loaded)

    def test_names_of_attacks_are_those_of_the_registry(self):
        self.assertCountEqual(stated.SEARCHES, registry.searching())
        self.assertSequenceEqual(stated.FIXED, [row.written for row in registry.fixed().values()])
        self.assertSequenceEqual(stated.VERSIONS, [*ensembles.VERSIONS, ensembles.CUSTOM])


if __name__ == "__main__":
    absltest.main()
