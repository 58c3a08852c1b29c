"""What people type wrongly, over all commands: a sentence or two with the remedy, nothing written.

What is said names what was typed, and at a terminal of 80 columns no line is wider but for a word
that is.
"""

import contextlib
import re
import shlex
from pathlib import Path

import pytest
from absl.testing import parameterized

from jaxrobust.__main__ import COMMANDS
from jaxrobust.commands import compare, select, verify
from jaxrobust.commands.results import runs
from jaxrobust.papers.commands import figure
from jaxrobust.runtime.text import terminal
from tests.support import command_calls
from tests.support.commands import foreign_flags, run_command

AGAIN = "train --config quickstart"
TRAIN = f"{AGAIN} --workdir runs/new"
EVALUATE = "evaluate --workdir runs/quickstart"
OWN = "evaluate --model convnext_n --dataset digits"
MODEL = f"{OWN} --weights w.pt"
FUNCTION = "evaluate --dataset digits --epsilon 0.1 --function"
DOCTOR = "doctor runs/quickstart"
ESTIMATE = "estimate quickstart --on cpu"
IMPORT = "import w.pt --out new --model"
EXPORT = "export --workdir runs/quickstart --out new --layout"

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
# What is typed | what is said; without |, its last word or value.
MISTAKES = f"""
evalute | did you mean evaluate
train | name one config
{TRAIN} extra | name one config
train quikstart | did you mean quickstart
train quickstart {TRAIN.removeprefix("train ")} | quickstart and --config both name the config
{TRAIN} --workdri=x | --workdri is not a flag
{TRAIN} --workdir=b | --workdir is given more than once
train --config quikstart | did you mean quickstart
train --config nowhere/own.py | no such file
train --config open.py | '(' was never closed
train --config empty.py | defines no get_config()
train --config raises.py | line 2: ZeroDivisionError
{TRAIN} --profile=soon | START:STEPS
{TRAIN} --process_id=3 --num_processes=2 | process
{TRAIN} --config.train.epocs=3 | did you mean 'epochs'
{TRAIN} --config.train.epochs=many | --config.train.epochs=many is not a whole number
{TRAIN} --config.train.lr=None | train.lr=None: only text keys can be unset
{TRAIN} --config.train.lr=fast | --config.train.lr=fast is not a number
{TRAIN} --config.train.epochs=0 --config.pretrain.epochs=0 | nothing to train
{TRAIN} --config.train.lr=-1 | lr
{TRAIN} --config.train.objective=robust | objective
{TRAIN} --config.train.batch_size=0 | batch_size
{TRAIN} --config.train.l1=-1e-5 | train.l1=-1e-05 must be at least 0
{TRAIN} --config.train.batch_size=5000 | batch_size
{TRAIN} --config.seed=-1 | seed=-1 must be from 0
{TRAIN} --config.attack.epsilon=4 | 4/255
{TRAIN} --config.attack.epsilon=-0.1 | epsilon
{TRAIN} --config.attack.norm=linfinity | linf
{TRAIN} --config.attack.steps=0 | steps
{TRAIN} --config.attack.name=apdg | apgd
{TRAIN} --config.attack.loss=cee | did you mean ce? choose one of ce, dlr, cw, cw-floor, ce-cw
{TRAIN} --config.attack.loss=nets.py | your own function, such as nets.py:margin
{TRAIN} --config.attack.loss=none.py:margin | attack.loss=none.py:margin: cannot read none
{TRAIN} --config.attack.loss=nets.py:imges | no 'imges'; did you mean images? it has make
{TRAIN} --config.attack.loss=nets.py:NET | NET is not a function, but of type int
{TRAIN} --config.attack.loss=nets.py:to_labels | returns float32[4, 10] for 4 images
{TRAIN} --config.evaluation.weights=best | 'ema'
{TRAIN} --config.checkpoint.keep_every_epochs=-1 | keep_every_epochs=-1 must be at least 0
{TRAIN} --config.checkpoint.keep_every_epochs=x | keep_every_epochs=x is not a whole number
{TRAIN} --config.mesh.fsdp=3 | fsdp
{TRAIN} --config.model.name=convnext_tinny | convnext_t
{TRAIN} --config.model.dtype=bf16 | bfloat16
{TRAIN} --config.model.num_classes=5 | num_classes
{TRAIN} --config.model.in_channels=3 | model.in_channels=1
{TRAIN} --config.model.options.drop_pth=0.1 | drop_path
{TRAIN} --config.init.weights=none.pt | no such file
{TRAIN} --config.init.weights=page.pt | page.pt
{TRAIN} --config.init.stem=new | fresh
{TRAIN} --config.model.name=nets.py | name a function in the file too: nets.py:make
{TRAIN} --config.model.name=none.py:make | cannot read none.py
{TRAIN} --config.model.name=nowhere.nets:make | the module nowhere is neither installed nor
{TRAIN} --config.model.name=nets.py:mke | no 'mke'; did you mean make? it has make, 
{TRAIN} --config.model.name=nets.py:make | returns nothing; return a flax.nnx.Module
{TRAIN} --config.model.name=nets.py:raises | nets.py, line 6: ZeroDivisionError
{FUNCTION}=none.py:logits | cannot read none.py
{FUNCTION}=open.py:logits | open.py, line 1: SyntaxError
{FUNCTION}=nets.py:images | logits
{FUNCTION}=nets.py:raises | line 6: ZeroDivisionError
{FUNCTION}=nets.py:to_numpy | write it with jax.numpy
{FUNCTION}=nets.py:one | jax.vmap
{FUNCTION}=nets.py:images --weights w.pt | --weights has no effect with --function
evaluate --function nets.py:images | dataset
{TRAIN} --config.data.name=npz:none.npz | none.npz
{TRAIN} --config.data.name=npz:w.pt | w.pt
{TRAIN} --config.data.name=hf:../nowhere | there is no directory ../nowhere
prepare | needs a data set; choose one of imagenet, cifar10, cifar100, generated
prepare cifar11 | does not support 'cifar11'
prepare cifar10 --from none.tar.gz --out new | none.tar.gz
prepare cifar10 --from page.pt --out new | page.pt
prepare cifar10 --from truncated.tar.gz --out new | truncated.tar.gz
prepare cifar10 --out gs://bucket | gcloud storage cp
prepare imagenet nowhere --out new | nowhere
{TRAIN} --config.data.name=cifar11 | cifar11
{TRAIN} --config.data.name=cifar10 | cifar10
{TRAIN} --config.data.name=folder:nowhere | nowhere
{TRAIN} --config.data.train_split=training | training
{TRAIN} --config.data.augmentation=heavvy | heavy
{TRAIN} --config.data.preprocessing=Crop | Crop
{TRAIN} --config.data.workers=-1 | workers
{TRAIN} --config.data.extra=npz:none.npz | none.npz
{TRAIN} --config.data.extra=fake:8x8x1:7 --config.data.extra_split=train | has 7 classes
{TRAIN} --config.data.extra=fake:8x8x3 --config.data.extra_split=train | has 3 channels
{TRAIN} --config.data.extra_share=1.5 | data.extra_share=1.5 must be between 0 and 1
{TRAIN} --config.data.extra=fake:8x8x1:11 --config.data.extra_split=train | has 11 classes
{TRAIN} --config.train.objective=trades | set attack.start='random', 'gauss'
{TRAIN} --config.attack.start=gauss | APGD starts at 'image' or 'random'
{TRAIN} --config.train.clip_norm=0 | train.clip_norm=0.0 must be above 0
{TRAIN} --config.evaluation.attack=pgd | one of 'apgd-ce', fgsm, pgd-K
prepare pseudo-labelled page.pt | page.pt
{TRAIN} --config.data.views=7 | data.views=7 does not divide
{TRAIN} --config.train.optimizer=adam | train.optimizer='adam' must be one of 'adamw', 'sgd'
{TRAIN} --config.train.schedule=cosin | one of 'chord-cosine', 'cosine'
{TRAIN} --config.train.schedule=step | such as (0.5, 0.75)
{TRAIN} --config.attack.warmup_epochs=99 | attack.warmup_epochs=99 must be at least 0
{TRAIN} --config.init.normalize=mine | init.normalize='mine'; use one of keep
{TRAIN} --config.model.options.stem_kernels=(7,) | stem_kernels=(7,) must be odd
{AGAIN} --workdir=s3://bucket/run | gs://BUCKET/FOLDER
{AGAIN} --workdir=empty.py | empty.py
{AGAIN} --config.attack.epsilon=0.2 | attack.epsilon
evaluate | name a network as the first argument: a run, imported weights, an id such as
evaluate nets.py | is Python code, not weights; name a function in it, such as nets.py:log
evaluate nowhere.nets:logits --dataset digits | the module nowhere is neither installed nor
evaluate runs/quickstrat | did you mean runs/quickstart
select runs/quickstrat | did you mean runs/quickstart
report runs/quickstrat | did you mean runs/quickstart
train emtpy.py | no such file; did you mean empty.py?
train runs/quickstart | runs/quickstart is a folder; name a config such as birds.py
evaluate runs/quickstart --weights w.pt | runs/quickstart and --weights=w.pt both name the
{EVALUATE} --model convnext_n | give --workdir RUN, or --model NAME
evaluate --workdir runs/nothing | runs/nothing
{EVALUATE} --phase=clean | phase
{EVALUATE} --epsilon=a | 4/255
{EVALUATE} --epsilon=8 | 8
{EVALUATE} --norm=l3 | linf
{EVALUATE} --attack=pgd | pgd-K
{EVALUATE} --attack=autoatack | autoattack
{EVALUATE} --version=quick | standard
{EVALUATE} --version=custom | apgd-ce,apgd-t
{EVALUATE} --attack=apgd-ce,cw | apgd-ce
{EVALUATE} --steps=3 | name one of its attacks
{EVALUATE} --attack=pgd-3 --targets=3 | leave it out
{EVALUATE} --relative-step=0 | relative_step
{EVALUATE} --threat=linf | linf:RADIUS
{EVALUATE} --threat=linf:4 | 4/255
{EVALUATE} --threat=l1:4/255 | use norm linf
{EVALUATE} --threat=l2:1 --norm=l2 | --threat
{EVALUATE} --union-only | --threat
{EVALUATE} --image-size=8 --image-size=8 | --image_size=8, 8 repeats a size; give each once
{EVALUATE} --ladder=linf:0:0.1 | NORM:LOW:HIGH:RADII
{EVALUATE} --ladder=linf:0.1:0:3 | must start at the smallest radius
{EVALUATE} --corruptions=fgo | did you mean fog
{EVALUATE} --corruptions=fog-6 | fog has no severity '6'
{EVALUATE} --corruptions=fog | color images of 32 or 224 px
{EVALUATE} --frost=nowhere | without --corruptions
evaluate --function nets.py:images --dataset cifar10-c:nowhere --corruptions fog | no folder
{EVALUATE} --ladder=linf:0:0.1:3 --epsilon=0.1 | --ladder
{EVALUATE} --worst-case --threat=l1:8/255 | use norm linf
{EVALUATE} --worst-case --norm=l1 | --threat
{EVALUATE} --worst-case --attack=pgd-20 | --attack
{EVALUATE} --worst-case --l1-rule=art | --l1_rule
{EVALUATE} --attack=pgd-3 --l1-rule=dense | sparse, art
{EVALUATE} --attack=pgd-3 --l1-rule=art | is for l1, not linf; leave it out
{EVALUATE} --replay=nowhere | nowhere
{EVALUATE} --replay=nowhere --noreplay | --noreplay
{EVALUATE} --n=-1 | n
{EVALUATE} --batch=0 | batch
{EVALUATE} --split=validation | validation
{EVALUATE} --search-dtype=float8 | bfloat16
{EVALUATE} --attack=clean --bundle=new | --attack=clean does not store
{EVALUATE} --threat=linf:0.1 --threat=l2:1 --bundle=new | supports one threat and image size
{EVALUATE} --attack=apgd-ce --bundle=runs/quickstart | is not a bundle; name a new folder
{OWN} --weights none.pt | no such file
{OWN} --weights page.pt | page.pt
{OWN} --weights w.pt --options 3 | is not a dict
evaluate --model convnext_n --weights none.pt | dataset
evaluate --model convnext --weights none.pt --dataset digits | convnext
import none.pt --model convnext_n --out new | no such file
import page.pt --model convnext_n --out new | page.pt
import none.pt --model convnext --out new | convnext
import none.pt --out new | no such file
import convnext_t --out new | an architecture
import Salman2020Do_R19 --out new | Salman2020Do_R18
import hf://timm --out new | hf://ORG/REPO
evaluate --weights convnext_tinny.fb_in1k --dataset digits | convnext_tiny.fb_in1k
export --weights none.pt --layout hub --out new | no such file
export --workdir runs/quickstart --layout timm --license mit --out new | --layout hub
export --workdir runs/quickstart --layout module --confirm 8 --out new | --record
export --workdir runs/nothing --layout module --out new | runs/nothing
export --workdir runs/quickstart --layout tensorflow --out new | timm
export --workdir runs/quickstart --layout jaxrobust --selected --out new | no weights are sel
export --workdir runs/quickstart --layout jaxrobust --record page.pt --out new | page.pt
models convnext_tinny | convnext_t
--workdir run | --workdir
train --config | config
train quickstart new | new
train --config quickstart:fast | colon
{TRAIN} --num_processes=two
{TRAIN} --config.tran.epochs=3 | tran
{TRAIN} --config.train.epochs=-1
{TRAIN} --config.train.warmup_epochs=99
{TRAIN} --config.train.ema_decay=2
{TRAIN} --config.train.weight_decay=-1
{TRAIN} --config.label_smoothing=2
{TRAIN} --config.attack.norm=l0 --config.attack.epsilon=4 | l0
{TRAIN} --config.attack.epsilon=eight
{TRAIN} --config.attack.epsilon=8/0
{TRAIN} --config.attack.step_size=-1
{TRAIN} --config.model.name=xyzzy
{TRAIN} --config.model.image_size=100000
{TRAIN} --config.model.options.drop_path=2
{TRAIN} --config.data.train_split=train[:0]
{TRAIN} --config.evaluation.metric=top5
{TRAIN} --config.log.to=tensorbord
{TRAIN} --config.log.every_steps=0
{TRAIN} --config.init.weights=run:quikstart | quikstart
{TRAIN} --then=autoatack
{TRAIN} --then=autoattack:linf | linf
{TRAIN} --then=autoattack:l1:8/255 | 8/255
{TRAIN} --then=export:torch | torch
{TRAIN} --then=export:hub,select | select
{TRAIN} --config.test.steps=0
train --config quickstart --workdir gs://bucket/run | gs://bucket/run
evaluate --workdir empty
{EVALUATE} --attack=pgd-0
{EVALUATE} --attack=apgd-ce,apgd-ce
{EVALUATE} --epsilon=-1
{EVALUATE} --epsilon=nan
{EVALUATE} --norm=l1 --epsilon=8/255 | l1
{EVALUATE} --norm=l2 --epsilon=500
{EVALUATE} --version=plus --attack=pgd-3
{EVALUATE} --rule=median
{EVALUATE} --version=rand --draws=0
{EVALUATE} --attack=apgd-ce --steps=0
{EVALUATE} --attack=pgd-3 --restarts=2
{EVALUATE} --attack=pgd-3 --step=-1
{EVALUATE} --attack=pgd-3 --start=zero
{EVALUATE} --threat=l7:1
{EVALUATE} --threat=linf:0.1 --threat=linf:0.1
{EVALUATE} --ladder=linf:0:0.1:1
{EVALUATE} --ladder=l9:0:0.1:3
{EVALUATE} --n=some
{EVALUATE} --seed=-1
{EVALUATE} --image_size=0
{EVALUATE} --image_size=100000
{EVALUATE} --dataset=digitz
{EVALUATE} --out=page.pt/x
{EVALUATE} --preprocessing=Res9
{EVALUATE} --options={{}} | --options
{EVALUATE} --selected
{MODEL} --num_classes=ten
evaluate --dataset digits --function nets.py:missing | missing
evaluate --dataset digits --torch none.py:build
doctor | name a run
doctor nowhere
doctor runs/quickstart more
{DOCTOR} --n=0
{DOCTOR} --n=5000
{DOCTOR} --norm=l3
{DOCTOR} --epsilon=8
{DOCTOR} --epsilon=x
{DOCTOR} --sede=3 | --sede
{DOCTOR} --workdir=run
{DOCTOR} --phase=finetune
{DOCTOR} --dataset=digitz
{DOCTOR} --image_size=100000
doctor --config quikstart
doctor --config quickstart --devices=0
doctor --config quickstart --config.attack.norm=l3
estimate | --on
estimate quikstart --on cpu | quikstart
estimate quickstart --on=v9:8x8
estimate quickstart --on=v5e:3x
{ESTIMATE} --price=cheap
{ESTIMATE} --batch=0
{ESTIMATE} --batch=x
{ESTIMATE} --robust=2
{ESTIMATE} --images=-1
{ESTIMATE} --fsdp=-1
{ESTIMATE} --prise=3 | --prise
{ESTIMATE} --config.train.epocs=3 | epocs
report | PATH
report nowhere
report empty
report runs/quickstart --port=x
report runs/quickstart --port=99999999 --watch | 99999999
report runs/quickstart --every=0 --watch | --every=0
report runs/quickstart --wacth | --wacth
models xyzzy
models --jsn | --jsn
scaling many
scaling 5e9 --block=big
scaling -5
{IMPORT} convnext_n | w.pt
import page.pt --model convnext_n --out new --sha256 x | page.pt
import page.pt --model convnext_n --out new --seed x
import page.pt --model convnext_n --out new --optoins 3 | --optoins
export | --layout
{EXPORT} jaxrobust --phase finetune
{EXPORT} jaxrobust --laoyut timm | --laoyut
prepare pseudo-labelled none.pickle
certificate | --weights
certificate --model xyzzy | --weights
""".strip().splitlines()

# The same of the tools next to the package.
OF_TOOLS = """
compare run | two
compare nowhere run | nowhere
compare page.pt run | page.pt
compare run run --threat=l3:1
compare run run --threat=linf
compare run run --tehat=linf | --tehat
compare page.pt against
compare run against run against run | 2 times
figure run --kind=attacks --out=f.jpg | f.jpg
figure nowhere run --kind=compare --out=f.pdf | nowhere
figure run --kind=radius --out=f.svg | run
figure page.pt --kind=attacks --out=f.png | page.pt
figure run --kind=pie --out=f.pdf | pie
figure run | run
runs nowhere
runs empty
runs page.pt
select | RUN
select nowhere
select run --n=0
select run --n=few
select run --steps=0
select run --steps=x
select run --batch=0
select run --attack=square
select run --phase=finetune | is not a run
select run --wieghts=ema | --wieghts
select run --n=8 | run
verify nowhere | --weights
verify run --batch=x
verify run --wieghts=w | --wieghts
""".strip().splitlines()
TOOLS = {"compare": compare.main, "select": select.main, "verify": verify.main}
TOOLS |= {"figure": figure.main, "runs": runs.main}

FILES = {
    "open.py": "x = (",
    "empty.py": "x = 3",
    "raises.py": "def get_config():\n  return 1 / 0",
    "nets.py": NETS,
    "truncated.tar.gz": "\x1f\x8b\x08",
    "page.pt": "<!DOCTYPE html><html><body>Sign in</body></html>",
    "w.pt": "",
    "empty/note.txt": "nothing",
}


class MistakesTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.folder = Path(self.create_tempdir())
        for name, text in FILES.items():
            (self.folder / name).parent.mkdir(exist_ok=True)
            (self.folder / name).write_text(text)

    def answers(self, line: str, code: int, error: str, help_text: str) -> None:
        """Look at what a command has said of a line of the table."""
        self.assertEmpty(foreign_flags(line, error, help_text), error)
        typed, _, said = (part.strip() for part in line.partition("|"))
        self.assertEqual(code, 2, error)
        self.assertIn(said or shlex.split(typed)[-1].rpartition("=")[2], " ".join(error.split()))
        self.assertLessEqual(len(error.splitlines()), 14, error)
        shown = terminal.fitted(error, 80).splitlines()
        wide = [one for one in shown if len(one) > 80 and max(map(len, one.split())) < 78]
        self.assertEmpty(wide)
        # What differs from a run that is there is a list, a key on a line; and so are several
        # mistakes of a config. What took longer than a second has its line, which ends in dots,
        # before it, and one a minute. A network of one's own may have batch norms: it says that it
        # gets one device.
        waits = r"[^\n]+( \.\.\.| so far)\n|using one CPU device [^\n]+\n"
        error = re.sub(rf"\A({waits})*", "", error)
        self.assertRegex(error, r"\Ajaxrobust: [^\n]+\n((  \S+:|- ) ?[^\n]+\n)*\Z")
        self.assertLessEqual(len(re.findall(r"[.;] [A-Z]", error)), 1, error)

    @pytest.mark.slow  # minutes: each is a process, and those of a run open its data
    def test_each_is_answered(self):
        short = ["--config.pretrain.epochs=0", "--config.train.epochs=1"]
        short += ["--config.train.warmup_epochs=0", "--config.test.steps=1"]
        done = run_command([*AGAIN.split(), *short], self.folder)
        self.assertEqual(done.code, 0, done.error)
        helps = {name: run_command([name, "--help-all"], self.folder).out for name in COMMANDS}
        before = written(self.folder)
        for line in MISTAKES:
            with self.subTest(line):
                words = shlex.split(line.partition("|")[0])
                code, _, error = run_command(words, self.folder)
                self.answers(line, code, error, helps.get(words[0], ""))
                self.assertEqual(written(self.folder), before)

    def test_tools(self):
        (self.folder / "run").mkdir()
        self.enter_context(contextlib.chdir(self.folder))
        for line in OF_TOOLS:
            tool, *words = shlex.split(line.partition("|")[0])
            help_text = command_calls.ended(lambda: TOOLS[tool](["--help-all"])).out  # noqa: B023
            ended = command_calls.ended(lambda: TOOLS[tool](words))  # noqa: B023
            with self.subTest(line):
                self.answers(line, ended.code, ended.error, help_text)


def written(folder: Path) -> dict[str, tuple[int, int]]:
    """What lies in a folder, and when and how long each file became."""
    locks = {*folder.rglob("lock"), *folder.rglob("*.lock")}  # which stay, empty
    files = [path for path in folder.rglob("*") if path.is_file() and path not in locks]
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in files}
