"""What people type wrongly, and runs that are damaged: a sentence with the remedy, exit code 2."""

import re
import shutil
from pathlib import Path

import pytest
from absl.testing import parameterized

from tests.support.commands import run_command
from tests.support.runs import quiet_run, tiny

NETS = """
import jax.numpy as jnp
import numpy as np
def raises(images):
    return 1 / 0
def images(images):
    return images
def three(images):
    return images.reshape(len(images), -1)[:, :3]
def to_numpy(images):
    return jnp.asarray(np.asarray(images).reshape(len(images), -1)[:, :10])
def ten(images):
    return images.reshape(len(images), -1)[:, :10]
"""
OWN = "--model convnext_n --dataset digits --weights"
# What is typed behind `doctor` -> what is said.
WRONG = {
    "": "name a run, weights, a function or a config",
    "--json": "name a run, weights, a function or a config",
    "run other": "unexpected argument 'other'",
    "run --workdir=run": "run and --workdir=run both name the network; leave one out",
    "run --nn=5": "--nn is not a flag",
    "run --n=5": "--n=5 must be between 32 and 1000",
    "run --n=many": "--n",
    "run --norm=l3": "--norm=l3 is unknown; choose one of linf, l2, l1",
    "run --epsilon=a": "--epsilon=a is not a number; write one, or a fraction such as 4/255",
    "run --epsilon=8": "write 8/255",
    "run --epsilon=-0.1": "is not a valid radius",
    "run --norm=l1 --epsilon=0.1": "use norm linf, or an l1 radius",
    "run --norm=l2 --epsilon=99": "contains all",
    "run --phase=clean": "--phase=clean is unknown; choose one of pretrain, train",
    "run --split=validation": "validation",
    "run --preprocessing=Crop": "Crop",
    "run --dataset=cifar11": "cifar11",
    "run --dataset=folder:nowhere": "nowhere",
    "run --model=convnext_n": "give --workdir RUN, or --model NAME",
    "run --options={}": "use --model instead",
    "nowhere": "nowhere",
    "empty": "empty",
    "--workdir=nowhere": "is not a run",
    "--workdir=empty": "config.json is missing",
    "damaged": "config.json is damaged",
    "unfinished": "has no best checkpoint",
    f"{OWN} none.pt": "no such file",
    f"{OWN} page.pt": "page.pt",
    "--model convnext --weights none.pt --dataset digits": "convnext",
    "--dataset digits": "give --workdir RUN, or --model NAME",
    "nets.py:ten": "needs --dataset NAME",
    "nets.py:tem --dataset digits": "has no 'tem'; did you mean ten? it has raises, images",
    "nets.py:raises --dataset digits": "nets.py, line 5: ZeroDivisionError",
    "nets.py:images --dataset digits": "logits",
    "nets.py:three --dataset digits": "return one logit per class",
    "nets.py:to_numpy --dataset digits": "write it with jax.numpy",
    "nets.py:ten --dataset digits --weights=w.pt": "and --weights=w.pt both name the network",
    "--config quikstart": "did you mean quickstart",
    "--config nowhere/own.py": "no such file",
    "--config quickstart --config.train.epocs=3": "did you mean 'epochs'",
    "--config quickstart --devices=0": "--devices=0 must be at least 1",
    "--config quickstart --config.model.name=nets.py:made": "has no 'made'",
    "--config quickstart --config.pretrain.epochs=0 --config.train.epochs=0": "nothing to train",
}


# What was printed before stays: a config's findings, and how many they are.
BEFORE = (
    r"\A([^\n]+ devices?\n((green|yellow|red|skipped| ) .+\n)*"
    r"(\d+ checks: .+\n+)?)?\Z"
)


@pytest.mark.slow
class WrongInputTest(parameterized.TestCase):
    def test_is_answered(self):
        folder = Path(self.create_tempdir())
        config = tiny()
        quiet_run(config, folder / "run")
        (folder / "empty").mkdir()
        (folder / "nets.py").write_text(NETS)
        (folder / "page.pt").write_text("<!DOCTYPE html><html><body>Sign in</body></html>")
        for name in ("damaged", "unfinished"):
            (folder / name).mkdir()
            for file in ("config.json", "metrics.jsonl"):
                shutil.copy(folder / "run" / file, folder / name / file)
        (folder / "damaged" / "config.json").write_text("{")
        for typed, said in WRONG.items():
            with self.subTest(typed):
                code, out, error = run_command(["doctor", *typed.split()], folder)
                self.assertEqual(code, 2, error)
                self.assertRegex(out, BEFORE)
                self.assertIn(said, error)
                # What took longer than a second has its line, which ends in dots, before it.
                error = re.sub(r"\A([^\n]+ \.\.\.\n)*", "", error)
                self.assertRegex(error, r"\Ajaxrobust: [^\n]+\n\Z")
                self.assertLessEqual(len(re.findall(r"[.;] [A-Z]", error)), 1, error)
