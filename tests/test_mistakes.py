"""What people type wrongly, over all commands: a sentence with the remedy, and no traceback.

Each is typed at a terminal of 80 columns. What is said names what was typed, and no line is wider
but for a word that is. Those whose remedy is looked at stand in test_wrong_inputs.py.
"""

import contextlib
import io
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
from tests.support import runs as training
from tests.support.commands import foreign_flags, run_command

TRAIN = "train --config quickstart --workdir new"
EVALUATE = "evaluate --workdir run"
MODEL = "evaluate --model convnext_n --weights w.pt --dataset digits"
DOCTOR = "doctor run"
ESTIMATE = "estimate quickstart --on cpu"
IMPORT = "import w.pt --out new --model"
EXPORT = "export --workdir run --out new --layout"

# What is typed -> what of it is said again, after |; without |, its last word or value.
MISTAKES = f"""
trian --config quickstart | trian
--workdir run | --workdir
train --config | config
train quickstrat
train quickstart new | new
train --config nowhere.py
train --config broken.py
train --config other.py
train --config quickstart:fast | colon
train --confg quickstart | --confg
{TRAIN} more
{TRAIN} --wrokdir=x | --wrokdir
{TRAIN} --workdir=other | --workdir
{TRAIN} --profile=-1:5
{TRAIN} --num_processes=two
{TRAIN} --config.tran.epochs=3 | tran
{TRAIN} --config.sead=3 | sead
{TRAIN} --config.train.epochs=-1
{TRAIN} --config.train.epochs=1.5
{TRAIN} --config.train.lr=nan
{TRAIN} --config.train.warmup_epochs=99
{TRAIN} --config.train.batch_size=-8
{TRAIN} --config.train.ema_decay=2
{TRAIN} --config.train.weight_decay=-1
{TRAIN} --config.label_smoothing=2
{TRAIN} --config.attack.norm=l3
{TRAIN} --config.attack.norm=l0 --config.attack.epsilon=4 | l0
{TRAIN} --config.attack.norm=infinity
{TRAIN} --config.attack.epsilon=eight
{TRAIN} --config.attack.epsilon=8/0
{TRAIN} --config.attack.steps=-3
{TRAIN} --config.attack.loss=entropy | loss
{TRAIN} --config.attack.step_size=-1
{TRAIN} --config.model.name=xyzzy
{TRAIN} --config.model.num_classes=1
{TRAIN} --config.model.image_size=100000
{TRAIN} --config.model.options.drop_path=2
{TRAIN} --config.data.name=digitz
{TRAIN} --config.data.train_split=train[:0]
{TRAIN} --config.data.test_split=tets
{TRAIN} --config.evaluation.metric=top5
{TRAIN} --config.log.to=tensorbord
{TRAIN} --config.log.every_steps=0
{TRAIN} --config.mesh.fsdp=-3
{TRAIN} --config.init.weights=run:quikstart | quikstart
{TRAIN} --then=autoatack
{TRAIN} --then=autoattack:linf | linf
{TRAIN} --then=autoattack:l1:8/255 | 8/255
{TRAIN} --then=export:torch | torch
{TRAIN} --then=export:hub,select | select
{TRAIN} --config.test.steps=0
train --config quickstart --workdir gs://bucket/run | gs://bucket/run
train --config quickstart --workdir page.pt
{EVALUATE} more
{EVALUATE} --atack=clean | --atack
{EVALUATE} --workdir=other | --workdir
evaluate --workdir empty
{EVALUATE} --phase=finetune
{EVALUATE} --attack=pgd-0
{EVALUATE} --attack=apgd-ce,square,fba-t
{EVALUATE} --attack=apgd-ce,apgd-ce
{EVALUATE} --attack=clean --norm=l3
{EVALUATE} --norm=linfinity
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
{EVALUATE} --ladder=Linf:0.1:0:3
{EVALUATE} --ladder=linf:0:0.1:1
{EVALUATE} --ladder=l9:0:0.1:3
{EVALUATE} --n=0
{EVALUATE} --n=some
{EVALUATE} --batch=x
{EVALUATE} --seed=-1
{EVALUATE} --image_size=0
{EVALUATE} --image_size=100000
{EVALUATE} --dataset=digitz
{EVALUATE} --out=page.pt/x
{EVALUATE} --bundle=run
{EVALUATE} --preprocessing=Res9
{EVALUATE} --options={{}} | --options
{EVALUATE} --weights=w.pt | --weights
{EVALUATE} --selected
evaluate --model convnext --weights w.pt --dataset digits | convnext
evaluate --weights Salman2020Do_R19 --dataset digits | Salman2020Do_R19
{MODEL} --weights=w.pt | --weights
{MODEL} --options=3
{MODEL} --num_classes=ten
evaluate --function nets.py:logits | --dataset
evaluate --dataset digits --function none.py:logits
evaluate --dataset digits --function nets.py:missing | missing
evaluate --dataset digits --torch none.py:build
evaluate --dataset digits --function nets.py:logits | nets.py:logits
doctor | name a run
doctor nowhere
doctor run more
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
report run --port=x
report run --port=99999999 --watch | 99999999
report run --every=0 --watch | --every=0
report run --wacth | --wacth
models xyzzy
models --jsn | --jsn
scaling many
scaling 5e9 --block=big
scaling -5
import w.pt | --out
{IMPORT} convnext
{IMPORT} convnext_n | w.pt
import page.pt --model convnext_n --out new --sha256 x | page.pt
import page.pt --model convnext_n --out new --seed x
import page.pt --model convnext_n --out new --optoins 3 | --optoins
export | --layout
{EXPORT} tensorflow
{EXPORT} timm --license mit | --license
{EXPORT} module --confirm 8 | --confirm
{EXPORT} jaxrobust --phase finetune
{EXPORT} jaxrobust --record page.pt
{EXPORT} jaxrobust --selected
{EXPORT} jaxrobust --laoyut timm | --laoyut
prepare cifar11 --out new | cifar11
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
select run --phase=finetune | no run is there
select run --wieghts=ema | --wieghts
select run --n=8 | run
verify nowhere | --weights
verify run --batch=x
verify run --wieghts=w | --wieghts
""".strip().splitlines()
TOOLS = {"compare": compare.main, "select": select.main, "verify": verify.main}
TOOLS |= {"figure": figure.main, "runs": runs.main}

FILES = {
    "broken.py": "x = (",
    "other.py": "x = 3",
    "nets.py": "def logits(images):\n    return images",
    "page.pt": "<!DOCTYPE html><html><body>Sign in</body></html>",
    "w.pt": "",
    "empty/note.txt": "nothing",
}


def written(folder: Path) -> Path:
    """Write the files into a folder, as a user has them."""
    for name, text in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return folder


class MistakesTest(parameterized.TestCase):
    def answers(self, line: str, code: int, error: str, help_text: str) -> None:
        """Look at what a command has said of a line of the table."""
        self.assertEmpty(foreign_flags(line, error, help_text), error)
        typed, _, said = (part.strip() for part in line.partition("|"))
        lines = error.splitlines()
        self.assertIn(code, (2, 3), error)
        self.assertNotIn("Traceback", error)
        self.assertIn(said or shlex.split(typed)[-1].rpartition("=")[2], " ".join(error.split()))
        self.assertLessEqual(len(lines), 14, error)
        shown = terminal.fitted(error, 80).splitlines()
        wide = [one for one in shown if len(one) > 80 and max(map(len, one.split())) < 78]
        self.assertEmpty(wide)
        self.assertEqual(error.count("jaxrobust:"), 1, error)

    @pytest.mark.slow  # minutes: each is a process, and those of a run open its data
    def test_each_is_answered(self):
        folder = written(Path(self.create_tempdir()))
        training.quiet_run(training.tiny(train__epochs=0), folder / "run")
        self.assertGreaterEqual(len(MISTAKES), 100)
        helps = {name: run_command([name, "--help-all"], folder).out for name in COMMANDS}
        for line in MISTAKES:
            with self.subTest(line):
                words = shlex.split(line.partition("|")[0])
                code, _, error = run_command(words, folder)
                self.answers(line, code, error, helps.get(words[0], ""))

    def test_tools(self):
        folder = written(Path(self.create_tempdir()))
        (folder / "run").mkdir()
        self.enter_context(contextlib.chdir(folder))
        for line in OF_TOOLS:
            tool, *words = shlex.split(line.partition("|")[0])
            help_text = command_calls.ended(lambda: TOOLS[tool](["--help-all"])).out  # noqa: B023
            said, code = io.StringIO(), 0
            with self.subTest(line), contextlib.redirect_stderr(said):
                try:
                    TOOLS[tool](words)
                except SystemExit as ended:
                    code = ended.code
                self.answers(line, code, said.getvalue(), help_text)
