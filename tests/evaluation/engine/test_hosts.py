"""Several processes evaluate together: the verdicts of one, whoever dies, on any number of them."""

import json
import re
import sys
import time
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from jaxrobust.evaluation.bundles import claims
from jaxrobust.evaluation.engine.ledger import Ledger
from tests.support import evaluations, paths, result_lines
from tests.support.outcomes import ended
from tests.support.processes import start, wait

ROOT = paths.ROOT

CHILD = """
import os, signal, sys
from jaxrobust.runtime.processes.launch import join_hosts
if "JAX_NUM_PROCESSES" in os.environ:
    join_hosts()
import jax
import numpy as np
from jaxrobust.evaluation.engine.ledger import Ledger
from tests.support.ensemble import IMAGES, LABELS, NETS, QUICK, evaluate

out, path, dies = sys.argv[1], sys.argv[2] or None, int(sys.argv[3])
add, added = Ledger.add, []

def counted(*arguments):
    add(*arguments)
    added.append(arguments)
    if len(added) == dies and jax.process_index() == 0:
        os.kill(os.getpid(), signal.SIGKILL)

Ledger.add = counted
right = np.argmax(np.asarray(NETS["lin"](IMAGES)), axis=1) == LABELS
which = np.concatenate([np.flatnonzero(right), np.flatnonzero(~right)[:3]])
result = evaluate(
    NETS["lin"], IMAGES[which], LABELS[which], norm="linf", epsilon=8 / 255, batch_size=8,
    attacks=("apgd-ce", "apgd-t", "square"), ledger=path,
    overrides={"apgd-ce": {"steps": 2}, "apgd-t": {"steps": 4}, "square": {"steps": 20}},
)
np.savez(
    f"{out}-{jax.process_index()}.npz", added=len(added), devices=jax.local_device_count(),
    after=list(result.accuracy_after.values()),
    flags=sorted(result.flags.items()), reached=result.verdicts.reached,
    **{k: getattr(result, k) for k in ("clean", "robust", "fooled_by", "images_adv")},
)
"""


def verdicts(folder: Path) -> list[str]:
    """All verdicts of the ledgers there, but where their images are stored."""
    lines = [line for path in folder.glob("*.jsonl") for line in path.read_text().splitlines()]
    rows = [json.loads(line) for line in lines]
    return sorted(
        json.dumps({k: v for k, v in row.items() if k != "stored"}, sort_keys=True)
        for row in rows
        if "image" in row
    )


EDGES = """
import os, pathlib, sys
from jaxrobust.runtime.processes.launch import join_hosts
if several := "JAX_NUM_PROCESSES" in os.environ:
    join_hosts()
import jax
import numpy as np
from jax.sharding import PartitionSpec
from jaxrobust.runtime.devices import sharding
from tests.support.ensemble import IMAGES, evaluate

me, folder = jax.process_index(), pathlib.Path(sys.argv[1])
pixels = IMAGES.reshape(len(IMAGES), -1)
weights = np.random.default_rng(0).standard_normal((pixels.shape[1], 10)).astype(np.float32)
labels = np.argmax(pixels @ weights, axis=1)
net = lambda w, x: x.reshape(len(x), -1) @ w

def tell(name, n=3, split=PartitionSpec(), ledger=None, **given):
    w = jax.device_put(weights, jax.NamedSharding(sharding.make_mesh(), split))  # on all devices
    given = {"norm": "linf", "epsilon": 0.3 / 255, "batch_size": 4} | given
    given |= {"attacks": ["apgd-ce", "square"]}
    given |= {"overrides": {"apgd-ce": {"steps": 5}, "square": {"steps": 20}}}
    if ledger:
        given["ledger"] = folder / ledger / "ledger.jsonl"
    try:
        result = evaluate(jax.tree_util.Partial(net, w), IMAGES[:n], labels[:n], **given)
        passes = [(cost.forward, cost.backward) for cost in result.costs]
        print(name, *result.fooled_by, result.accuracy_after, result.flags, passes, flush=True)
    except ValueError as error:
        print(name, "refused:", error, flush=True)

tell("none", n=0)
tell("one", n=1)
tell("ledger", n=24, ledger="begun")
tell("search", n=9, search_fn=lambda x: 0.1 * x[:, :1, 0, 0] + net(weights, x))
tell("other", n=24, ledger="begun", seed=1)
if several:
    tell("spread", split=PartitionSpec("data"))
    tell("seeds", seed=me)
    tell("data", n=3 + me)
    tell("unshared", ledger=str(me))
    (folder / "AB"[me]).mkdir()
    for file in (folder / "begun").glob("*.jsonl"):
        rows = file.read_text().splitlines(keepends=True)
        (folder / "AB"[me] / file.name).write_text("".join(rows[: None if me else 3]))
    tell("differ", n=24, ledger="AB"[me])
tell("after", n=2)
"""


@pytest.mark.slow
class AutoAttackTest(absltest.TestCase):
    def alone(self, ledger):
        """The result of one process, this one, on its 8 devices."""
        words = ["child", str(self.folder / "one"), str(ledger / "ledger.jsonl"), "0"]
        with (
            mock.patch.object(sys, "argv", words),
            mock.patch.object(Ledger, "add", Ledger.add),
            jax.numpy_dtype_promotion("standard"),
        ):
            exec(CHILD, {})
        return dict(np.load(self.folder / "one-0.npz"))

    def evaluate(self, name, processes, devices, *, ledger, dies=0):
        """Starts and waits; exit codes, what was said, and the results of those that finished."""
        out = self.folder / name
        path = ledger / "ledger.jsonl" if ledger else ""
        command = ["-c", CHILD, str(out), str(path), str(dies)]
        begun = time.perf_counter()
        codes, said = wait(start(processes, devices, command))
        print(f"{name}: {time.perf_counter() - begun:.1f} s", file=sys.stderr)
        files = sorted(self.folder.glob(f"{name}-*.npz"))
        return codes, said, [dict(np.load(file)) for file in files]

    @pytest.mark.computes  # with the same optimizations as the other processes
    def test_any_number_of_processes_and_a_kill(self):
        self.folder = Path(self.create_tempdir())
        ledgers = [self.folder / name for name in ("one", "parts")]
        one = self.alone(ledgers[0])
        self.assertEqual(set(one["fooled_by"]), {"", "clean", "apgd-ce", "apgd-t"})
        codes, said, none = self.evaluate("killed", 2, 2, ledger=ledgers[1], dies=5)
        self.assertEmpty(none)
        self.assertEqual(codes, [-9, -6], said)
        self.assertIn("another task died", said[1])  # JAX ends it
        before = verdicts(ledgers[1])
        codes, said, three = self.evaluate("three", 3, 2, ledger=ledgers[1])
        self.assertEqual(codes, [0] * 3, said)

        for result in three:
            for key in ("clean", "robust", "fooled_by", "reached", "images_adv", "after", "flags"):
                np.testing.assert_array_equal(result[key], one[key], key)
        self.assertEqual([int(r["devices"]) for r in (one, *three)], [8, 2, 2, 2])
        shares = [int(result["added"]) for result in three]
        self.assertEqual(sum(shares) + len(before), one["added"])  # nothing twice
        self.assertLessEqual(max(shares) - min(shares), 3)  # one for each attack
        self.assertEqual(verdicts(ledgers[1]), verdicts(ledgers[0]))

    def test_few_images_and_mistakes(self):
        """Fewer images than processes; what one of them refuses, all refuse, and continue."""
        folder, alone = Path(self.create_tempdir()), Path(self.create_tempdir())
        hosts = start(2, 2, ["-c", EDGES, str(folder)])
        (one,) = start(1, 4, ["-c", EDGES, str(alone)])
        expected = dict(line.split(" ", 1) for line in one.communicate()[0].splitlines())
        told = []
        for host in hosts:
            printed, said = host.communicate(timeout=200)
            self.assertEqual(host.returncode, 0, said)
            told.append(dict(line.split(" ", 1) for line in printed.splitlines()))
        for name in ("none", "one", "ledger", "search", "after"):
            self.assertEqual([t[name] for t in told], [expected[name]] * 2, name)
        self.assertIn("apgd-ce", expected["ledger"])
        for name, message in (
            ("other", "begun/ledger.* belongs to another evaluation: seed is 0 there, 1 here"),
            ("spread", r"an array \(3072, 10\) of logits_fn is spread over several .*device_put"),
            (
                "seeds",
                "process . evaluates something different than process .: seed is . there, . here",
            ),
            (
                "data",
                "evaluates something different .*images is .* Give all processes the same command",
            ),
            ("unshared", "process 0 cannot see .*/0/ledger.process-1.jsonl.* all hosts share"),
            ("differ", r"processes see different verdicts \(.*\) in .*/[AB]/.* all hosts share"),
        ):
            for t in told:
                self.assertRegex(t[name], f"^refused: .*{message}")


RANDOM = """
import jax
import numpy as np
from jaxrobust import data

train = data.load("digits", split="train")
x = train.images.reshape(len(train.images), -1)
w = np.linalg.solve(x.T @ x + np.eye(64), x.T @ np.eye(10)[train.labels]).astype("f")

def logits_fn(x, keys):
    noise = jax.vmap(lambda key: jax.random.normal(key, (10,)))(keys)
    return x.reshape(len(x), -1) @ w + 0.2 * noise
"""

SEVERAL = {
    "threats": ["--threat=linf:0.01", "--threat=l2:0.05"],
    "ladder": ["--ladder=linf:0.005:0.015:3"],
}
SAME = ("evaluation", "clean", "robust", "accuracy_after", "flags", "attacks")


def _same(records, number, key):
    """A value of a record; a search in bfloat16 (AMX) may leave other images unconfirmed."""
    value = records[number][key]
    if key != "flags":
        return value
    return {name: said for name, said in value.items() if not name.startswith("unconfirmed")}


class CommandTest(parameterized.TestCase):
    def begun(self, *flags) -> tuple[Path, list[str]]:
        """A folder with a run, and the command that evaluates it."""
        folder = Path(self.create_tempdir())
        evaluations.trained(folder / "run")
        return folder, ["-m", "jaxrobust.evaluate", f"--workdir={folder / 'run'}", *flags]

    def check_same(self, folder, one, other):
        """The second folder's records are those of the first."""
        whole, parts = (
            {r["evaluation"]: r for r in result_lines.read(folder / name)} for name in (one, other)
        )
        for number, record in whole.items():
            for key in SAME:
                self.assertEqual(_same(parts, number, key), _same(whole, number, key), key)
            self.assertBetween(record["robust"], 0.01, 0.99)  # else nothing is compared
        return list(whole.values())

    @parameterized.parameters("apgd-ce", "pgd-2")
    @pytest.mark.slow
    @pytest.mark.computes  # with the same optimizations as the hosts
    def test_two_hosts_write_the_record_of_one(self, attack):
        folder, command = self.begun("--epsilon=0.01")
        n = {"apgd-ce": 12, "pgd-2": 80}[attack]
        command += [f"--attack={attack}", f"--n={n}", f"--out={folder / 'hosts'}", "--multihost"]
        given = {"workdir": str(folder / "run"), "epsilon": "0.01", "attack": attack, "n": n}
        given["out"] = str(folder / "one")
        if attack == "apgd-ce":
            command.append(f"--bundle={folder / 'hosts-bundle'}")
            given["bundle"] = str(folder / "one-bundle")
        pod = start(2, 1, command)
        ended(evaluations.call(**given))
        answers = [host.communicate(timeout=200) for host in pod]
        self.assertEqual([host.returncode for host in pod], [0, 0], answers)
        said = [re.sub(r"\[Gloo\].*\n", "", printed) for printed, _ in answers]
        self.assertIn("record ", said[0])
        self.assertEqual((said[1], answers[1][1]), ("", ""))  # the first one speaks for all
        self.assertLen(self.check_same(folder, "one", "hosts"), 1)
        if attack == "apgd-ce":
            bundles = [claims.read(folder / f"{name}-bundle") for name in ("one", "hosts")]
            self.assertEqual(*(bundle.rows for bundle in bundles))

    @pytest.mark.slow
    def test_two_hosts_judge_a_randomised_network_as_one(self):
        """Draws belong to the image: by the majority, and by one draw next to it."""
        folder = Path(self.create_tempdir())
        (folder / "nets.py").write_text(RANDOM)
        command = ["-m", "jaxrobust.evaluate", f"--function={folder / 'nets.py'}:logits_fn"]
        command += ["--dataset=digits", "--n=21", "--version=rand", "--draws=5", "--steps=2"]
        command += ["--attack=apgd-ce", "--threat=linf:0.02", "--threat=l2:0.1"]
        alone = start(1, 2, [*command, f"--out={folder / 'one'}"])
        pod = start(2, 1, [*command, f"--out={folder / 'hosts'}", "--multihost"])
        codes, said = wait(alone)
        self.assertEqual(codes, [0], said)
        codes, said = wait(pod)
        self.assertEqual(codes, [0, 0], said)
        found = self.check_same(folder, "one", "hosts")
        self.assertLen(found, 3)
        hosts = {r["evaluation"]: r for r in result_lines.read(folder / "hosts")}
        for record in found:
            self.assertEqual(hosts[record["evaluation"]]["draws"], record["draws"])
            self.assertIsNotNone(record["draws"]["one_draw"])

    @parameterized.parameters(*SEVERAL)
    @pytest.mark.matrix
    def test_three_hosts_one_of_which_is_killed_and_two_that_go_on(self, name):
        """Several threats, and several radii: each has a ledger, and all have the same records."""
        folder, command = self.begun("--attack=apgd-ce,apgd-t", "--n=40", "--steps=6")
        command += SEVERAL[name]
        self.assertEqual(wait(start(1, 2, [*command, f"--out={folder / 'one'}"]))[0], [0])
        (folder / "hosts").mkdir()
        command += [f"--out={folder / 'hosts'}", "--multihost"]
        pod = start(3, 1, command)
        end = time.monotonic() + 120
        while len(list((folder / "hosts").glob("ledger-*.process-2.jsonl"))) < 2:  # half-way
            self.assertLess(time.monotonic(), end)
            time.sleep(0.01)
        pod[2].kill()
        codes, said = wait(pod)
        self.assertEqual(codes[2], -9)
        self.assertNotIn(0, codes, said)
        self.assertEmpty(result_lines.read(folder / "hosts")[1:])
        codes, said = wait(start(2, 1, command))
        self.assertEqual(codes, [0, 0], said)
        found = self.check_same(folder, "one", "hosts")
        self.assertLen(found, 3)
