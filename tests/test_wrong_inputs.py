"""What people type wrongly: a sentence or two with the remedy, exit code 2, nothing written."""

import re
from pathlib import Path

import pytest
from absl.testing import parameterized

from jaxrobust.__main__ import COMMANDS
from tests.support.commands import foreign_flags, run_command

TRAIN = "train --config quickstart --workdir runs/new"
AGAIN = "train --config quickstart"
EVALUATE = "evaluate --workdir runs/quickstart"
OWN = "evaluate --model convnext_n --dataset digits"
FUNCTION = "evaluate --dataset digits --epsilon 0.1 --function"
NETS = """
import jax.numpy as jnp
import numpy as np
def make(**given): pass
def raises(*images, **given):
    return 1 / 0
def images(images):
    return images
def to_numpy(images):
    return jnp.asarray(np.asarray(images).reshape(len(images), -1)[:, :10])
def one(image):
    return image.reshape(-1)[:10] if image.ndim == 3 else 1 / 0
def to_labels(outputs, targets):
    return outputs - targets[:, None]
NET = 3
"""
# What is typed -> what is said.
WRONG = {
    # The command line.
    "evalute": "did you mean evaluate",
    "train": "name one config",
    f"{TRAIN} extra": "name one config",
    "train quikstart": "did you mean quickstart",
    f"train quickstart {TRAIN.removeprefix('train ')}": "--config is given more than once",
    f"{TRAIN} --workdri=x": "--workdri is not a flag",
    f"{TRAIN} --workdir=b": "--workdir is given more than once",
    "train --config quikstart": "did you mean quickstart",
    "train --config nowhere/own.py": "no such file",
    "train --config open.py": "'(' was never closed",
    "train --config empty.py": "defines no get_config()",
    "train --config raises.py": "line 2: ZeroDivisionError",
    f"{TRAIN} --profile=soon": "START:STEPS",
    f"{TRAIN} --process_id=3 --num_processes=2": "process",
    # Keys and values of a config.
    f"{TRAIN} --config.train.epocs=3": "did you mean 'epochs'",
    f"{TRAIN} --config.train.epochs=many": "--config.train.epochs=many is not a whole number",
    f"{TRAIN} --config.train.lr=None": "train.lr=None: only keys of text can be unset",
    f"{TRAIN} --config.train.lr=fast": "--config.train.lr=fast is not a number",
    f"{TRAIN} --config.train.epochs=0 --config.pretrain.epochs=0": "nothing to train",
    f"{TRAIN} --config.train.lr=-1": "lr",
    f"{TRAIN} --config.train.objective=robust": "objective",
    f"{TRAIN} --config.train.batch_size=0": "batch_size",
    f"{TRAIN} --config.train.l1=-1e-5": "train.l1=-1e-05 must be at least 0",
    f"{TRAIN} --config.train.batch_size=5000": "batch_size",
    f"{TRAIN} --config.seed=-1": "seed=-1 must be from 0",
    f"{TRAIN} --config.attack.epsilon=4": "4/255",
    f"{TRAIN} --config.attack.epsilon=-0.1": "epsilon",
    f"{TRAIN} --config.attack.norm=linfinity": "linf",
    f"{TRAIN} --config.attack.steps=0": "steps",
    f"{TRAIN} --config.attack.name=apdg": "apgd",
    f"{TRAIN} --config.attack.loss=cee": "did you mean ce? one of ce, dlr, cw, cw-floor, ce-cw",
    f"{TRAIN} --config.attack.loss=nets.py": "a function of yours, such as nets.py:margin",
    f"{TRAIN} --config.attack.loss=none.py:margin": "attack.loss=none.py:margin: cannot read none",
    f"{TRAIN} --config.attack.loss=nets.py:imges": "no 'imges'; did you mean images? it has make",
    f"{TRAIN} --config.attack.loss=nets.py:NET": "NET is not a function, but of type int",
    f"{TRAIN} --config.attack.loss=nets.py:to_labels": "returns float32[4, 10] for 4 images",
    f"{TRAIN} --config.evaluation.weights=best": "'ema'",
    f"{TRAIN} --config.checkpoint.keep_every_epochs=-1": "keep_every_epochs=-1 must be at least 0",
    f"{TRAIN} --config.checkpoint.keep_every_epochs=x": "keep_every_epochs=x is not a whole number",
    f"{TRAIN} --config.mesh.fsdp=3": "fsdp",
    # The network.
    f"{TRAIN} --config.model.name=convnext_tinny": "convnext_t",
    f"{TRAIN} --config.model.dtype=bf16": "bfloat16",
    f"{TRAIN} --config.model.num_classes=5": "num_classes",
    f"{TRAIN} --config.model.in_channels=3": "model.in_channels=1",
    f"{TRAIN} --config.model.options.drop_pth=0.1": "drop_path",
    f"{TRAIN} --config.init.weights=none.pt": "no such file",
    f"{TRAIN} --config.init.weights=page.pt": "page.pt",
    f"{TRAIN} --config.init.stem=new": "fresh",
    # Functions of the user's.
    f"{TRAIN} --config.model.name=nets.py": "name a function of the file too: nets.py:make",
    f"{TRAIN} --config.model.name=none.py:make": "cannot read none.py",
    f"{TRAIN} --config.model.name=nowhere.nets:make": "there is no module nowhere",
    f"{TRAIN} --config.model.name=nets.py:mke": "no 'mke'; did you mean make? it has make, ",
    f"{TRAIN} --config.model.name=nets.py:make": "returns nothing; return a flax.nnx.Module",
    f"{TRAIN} --config.model.name=nets.py:raises": "nets.py, line 6: ZeroDivisionError",
    f"{FUNCTION}=none.py:logits": "cannot read none.py",
    f"{FUNCTION}=open.py:logits": "open.py, line 1: SyntaxError",
    f"{FUNCTION}=nets.py:images": "logits",
    f"{FUNCTION}=nets.py:raises": "line 6: ZeroDivisionError",
    f"{FUNCTION}=nets.py:to_numpy": "write it with jax.numpy",
    f"{FUNCTION}=nets.py:one": "jax.vmap",
    f"{FUNCTION}=nets.py:images --weights w.pt": "--weights has no effect on a --function",
    "evaluate --function nets.py:images": "dataset",
    # Data.
    f"{TRAIN} --config.data.name=npz:none.npz": "none.npz",
    f"{TRAIN} --config.data.name=npz:w.pt": "w.pt",
    f"{TRAIN} --config.data.name=hf:../nowhere": "there is no directory ../nowhere",
    "prepare": "needs a data set; write one of imagenet, cifar10, cifar100, generated",
    "prepare cifar11": "no data set 'cifar11'",
    "prepare cifar10 --from none.tar.gz --out new": "none.tar.gz",
    "prepare cifar10 --from page.pt --out new": "page.pt",
    "prepare cifar10 --from truncated.tar.gz --out new": "truncated.tar.gz",
    "prepare cifar10 --out gs://bucket": "gcloud storage cp",
    "prepare imagenet nowhere --out new": "nowhere",
    f"{TRAIN} --config.data.name=cifar11": "cifar11",
    f"{TRAIN} --config.data.name=cifar10": "cifar10",
    f"{TRAIN} --config.data.name=folder:nowhere": "nowhere",
    f"{TRAIN} --config.data.train_split=training": "training",
    f"{TRAIN} --config.data.augmentation=heavvy": "heavy",
    f"{TRAIN} --config.data.preprocessing=Crop": "Crop",
    f"{TRAIN} --config.data.workers=-1": "workers",
    f"{TRAIN} --config.data.extra=npz:none.npz": "none.npz",
    f"{TRAIN} --config.data.extra=fake:8x8x1:7 --config.data.extra_split=train": "has 7 classes",
    f"{TRAIN} --config.data.extra=fake:8x8x3 --config.data.extra_split=train": "has 3 channels",
    f"{TRAIN} --config.data.extra_share=1.5": "data.extra_share=1.5 must be between 0 and 1",
    f"{TRAIN} --config.data.extra=fake:8x8x1:11 --config.data.extra_split=train": "has 11 classes",
    f"{TRAIN} --config.train.objective=trades": "set attack.start='random', 'gauss'",
    f"{TRAIN} --config.attack.start=gauss": "APGD starts at 'image' or 'random'",
    f"{TRAIN} --config.train.clip_norm=0": "train.clip_norm=0.0 must be above 0",
    f"{TRAIN} --config.evaluation.attack=pgd": "one of 'apgd-ce', fgsm, pgd-K",
    "prepare pseudo-labelled page.pt": "page.pt",
    f"{TRAIN} --config.data.views=7": "data.views=7 does not divide",
    # Optimisers, learning rates, a radius that grows.
    f"{TRAIN} --config.train.optimizer=adam": "train.optimizer='adam'; one of 'adamw', 'sgd'",
    f"{TRAIN} --config.train.schedule=cosin": "one of 'chord-cosine', 'cosine'",
    f"{TRAIN} --config.train.schedule=step": "such as (0.5, 0.75)",
    f"{TRAIN} --config.attack.warmup_epochs=99": "attack.warmup_epochs=99 must be at least 0",
    f"{TRAIN} --config.init.normalize=mine": "init.normalize='mine'; one of keep",
    f"{TRAIN} --config.model.options.stem_kernels=(7,)": "stem_kernels=(7,) must be odd",
    # Where a run goes.
    f"{AGAIN} --workdir=s3://bucket/run": "gs://BUCKET/FOLDER",
    f"{AGAIN} --workdir=empty.py": "empty.py",
    f"{AGAIN} --config.attack.epsilon=0.2": "attack.epsilon",
    # Evaluation.
    "evaluate": "name a network, as the first word: a run, imported weights, an id such as",
    "evaluate nets.py": "is Python code, not weights; name a function in it, such as nets.py:log",
    "evaluate nowhere.nets:logits --dataset digits": "there is no module nowhere",
    "evaluate runs/quickstrat": "did you mean runs/quickstart",
    "select runs/quickstrat": "did you mean runs/quickstart",
    "report runs/quickstrat": "did you mean runs/quickstart",
    "train emtpy.py": "no such file; did you mean empty.py?",
    "train runs/quickstart": "runs/quickstart is a folder; name a config, such as birds.py",
    "evaluate runs/quickstart --weights w.pt": "runs/quickstart and --weights=w.pt both name the",
    f"{EVALUATE} --model convnext_n": "give --workdir RUN, or --model NAME",
    "evaluate --workdir runs/nothing": "runs/nothing",
    f"{EVALUATE} --phase=clean": "phase",
    f"{EVALUATE} --epsilon=a": "4/255",
    f"{EVALUATE} --epsilon=8": "8",
    f"{EVALUATE} --norm=l3": "linf",
    f"{EVALUATE} --attack=pgd": "pgd-K",
    f"{EVALUATE} --attack=autoatack": "autoattack",
    f"{EVALUATE} --version=quick": "standard",
    f"{EVALUATE} --version=custom": "apgd-ce,apgd-t",
    f"{EVALUATE} --attack=apgd-ce,cw": "apgd-ce",
    f"{EVALUATE} --steps=3": "name an attack",
    f"{EVALUATE} --attack=pgd-3 --targets=3": "leave it out",
    f"{EVALUATE} --relative-step=0": "relative_step",
    f"{EVALUATE} --threat=linf": "linf:RADIUS",
    f"{EVALUATE} --threat=linf:4": "4/255",
    f"{EVALUATE} --threat=l1:4/255": "Linf",
    f"{EVALUATE} --threat=l2:1 --norm=l2": "--threat",
    f"{EVALUATE} --union-only": "--threat",
    f"{EVALUATE} --image-size=8 --image-size=8": "twice",
    f"{EVALUATE} --ladder=linf:0:0.1": "NORM:LOW:HIGH:RADII",
    f"{EVALUATE} --ladder=linf:0.1:0:3": "descends",
    f"{EVALUATE} --corruptions=fgo": "did you mean fog",
    f"{EVALUATE} --corruptions=fog-6": "there is no severity '6' of fog",
    f"{EVALUATE} --corruptions=fog": "images of 32 and of 224 pixels in colour",
    f"{EVALUATE} --frost=nowhere": "without --corruptions",
    "evaluate --function nets.py:images --dataset cifar10-c:nowhere --corruptions fog": "no folder",
    f"{EVALUATE} --ladder=linf:0:0.1:3 --epsilon=0.1": "--ladder",
    f"{EVALUATE} --worst-case --threat=l1:8/255": "Linf",
    f"{EVALUATE} --worst-case --norm=l1": "--threat",
    f"{EVALUATE} --worst-case --attack=pgd-20": "--attack",
    f"{EVALUATE} --worst-case --l1-rule=art": "--l1_rule",
    f"{EVALUATE} --attack=pgd-3 --l1-rule=dense": "sparse, art",
    f"{EVALUATE} --attack=pgd-3 --l1-rule=art": "of l1",
    f"{EVALUATE} --replay=nowhere": "nowhere",
    f"{EVALUATE} --replay=nowhere --noreplay": "--noreplay",
    f"{EVALUATE} --n=-1": "n",
    f"{EVALUATE} --batch=0": "batch",
    f"{EVALUATE} --split=validation": "validation",
    f"{EVALUATE} --search-dtype=float8": "bfloat16",
    f"{EVALUATE} --attack=clean --bundle=new": "--attack=clean does not keep",
    f"{EVALUATE} --threat=linf:0.1 --threat=l2:1 --bundle=new": "one threat at one image size",
    f"{EVALUATE} --attack=apgd-ce --bundle=runs/quickstart": "is not a bundle; name a new folder",
    f"{OWN} --weights none.pt": "no such file",
    f"{OWN} --weights page.pt": "page.pt",
    f"{OWN} --weights w.pt --options 3": "is not a dict",
    "evaluate --model convnext_n --weights none.pt": "dataset",
    "evaluate --model convnext --weights none.pt --dataset digits": "convnext",
    # Conversion, and the table.
    "import none.pt --model convnext_n --out new": "no such file",
    "import page.pt --model convnext_n --out new": "page.pt",
    "import none.pt --model convnext --out new": "convnext",
    "import none.pt --out new": "no such file",
    "import convnext_t --out new": "an architecture",
    "import Salman2020Do_R19 --out new": "Salman2020Do_R18",
    "import hf://timm --out new": "hf://ORG/REPO",
    "evaluate --weights convnext_tinny.fb_in1k --dataset digits": "convnext_tiny.fb_in1k",
    "export --weights none.pt --layout hub --out new": "no such file",
    "export --workdir runs/quickstart --layout timm --license mit --out new": "--layout hub",
    "export --workdir runs/quickstart --layout module --confirm 8 --out new": "--record",
    "export --workdir runs/nothing --layout module --out new": "runs/nothing",
    "export --workdir runs/quickstart --layout tensorflow --out new": "timm",
    "export --workdir runs/quickstart --layout jaxrobust --selected --out new": "choose first",
    "export --workdir runs/quickstart --layout jaxrobust --record page.pt --out new": "page.pt",
    "models convnext_tinny": "convnext_t",
}
FILES = {
    "open.py": "x = (",
    "empty.py": "x = 3",
    "raises.py": "def get_config():\n  return 1 / 0",
    "nets.py": NETS,
    "truncated.tar.gz": "\x1f\x8b\x08",
    "page.pt": "<!DOCTYPE html><html><body>Sign in</body></html>",
    "w.pt": "",
}


@pytest.mark.slow
class WrongInputTest(parameterized.TestCase):
    def test_is_answered(self):
        folder = Path(self.create_tempdir())
        for name, text in FILES.items():
            (folder / name).write_text(text)
        short = ["--config.pretrain.epochs=0", "--config.train.epochs=1"]
        short += ["--config.train.warmup_epochs=0"]
        done = run_command([*AGAIN.split(), *short, "--config.test.steps=1"], folder)
        self.assertEqual(done.code, 0, done.error)
        helps = {name: run_command([name, "--help-all"], folder).out for name in COMMANDS}
        for typed, said in WRONG.items():
            with self.subTest(typed):
                before = written(folder)
                code, out, error = run_command(typed.split(), folder)
                self.assertEqual(code, 2, out + error)
                self.assertIn(said, error)
                help_text = helps.get(typed.partition(" ")[0], "")
                self.assertEmpty(foreign_flags(typed, error, help_text), error)
                # What differs from a run that is there is a list, a key on a line; and so are
                # several mistakes of a config.
                # What took longer than a second has its line, which ends in dots, before it.
                # A network of one's own may have batch norms: it says that it gets one device.
                error = re.sub(r"\A([^\n]+ \.\.\.\n|one CPU device [^\n]+\n)*", "", error)
                self.assertRegex(error, r"\Ajaxrobust: [^\n]+\n((  \S+:|- ) ?[^\n]+\n)*\Z")
                self.assertLessEqual(len(re.findall(r"[.;] [A-Z]", error)), 1, error)
                self.assertEqual(written(folder), before)


def written(folder: Path) -> dict[str, tuple[int, int]]:
    """What lies in a folder, and when and how long each file became."""
    locks = {*folder.rglob("lock"), *folder.rglob("*.lock")}  # which stay, empty
    files = [path for path in folder.rglob("*") if path.is_file() and path not in locks]
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in files}
