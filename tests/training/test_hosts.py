"""Several processes train as one does, stop together, and continue as others."""

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from absl.testing import absltest

from jaxrobust.data.sources import registry
from jaxrobust.data.stream import plan
from jaxrobust.runtime.files import jsonl
from tests.support import result_lines
from tests.support.processes import start, wait, written
from tools import bench_resume


def pod(
    processes: int,
    devices: int,
    command: list[str],
    cache: Path | None = None,
    x64: bool = False,
) -> list[subprocess.Popen]:
    """Hosts that join each other; on loopback."""
    variables = {} if cache is None else {"JAX_COMPILATION_CACHE_DIR": str(cache)}
    variables |= {"JAX_ENABLE_X64": "1"} if x64 else {}
    return start(processes, devices, [*command, "--multihost"], **variables)


def split(folder: Path, **changes) -> list[str]:
    """Write the command of a short run whose arrays, small as they are, lie on two devices."""
    command = written(folder, train__epochs=2, mesh__fsdp=2, test__steps=1, **changes)
    path = folder / "config.py"
    imported = "from jaxrobust.runtime.devices import sharding\n"
    path.write_text(f"{imported}sharding.SMALL = 64  # else nothing is split\n{path.read_text()}")
    return command


def losses(workdir: Path) -> list[float]:
    """Of every step, in order."""
    rows = [row for row in jsonl.read(workdir / "metrics.jsonl") if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1)), rows
    return [row["loss"] for row in rows]


def signalled(hosts, line: str, number: int, which: int) -> tuple[list[int], list[str], float]:
    """Exit codes, words and seconds until all have ended, after a signal to one at a line."""
    said = ""
    for text in hosts[0].stderr:
        said += text
        if text.startswith(line):
            break
    begun = time.perf_counter()
    hosts[which].send_signal(number)
    codes, rest = wait(hosts)
    return codes, [said + rest[0], *rest[1:]], time.perf_counter() - begun


@pytest.mark.slow
class TrainingTest(absltest.TestCase):
    def test_four_stop_two_go_on_and_end_as_two(self):
        """Bit for bit, with parameters over two devices of each of two groups."""
        folder = Path(self.create_tempdir())
        command = split(folder)

        cache = folder / "cache"
        codes, said = wait(pod(2, 2, [*command, f"--workdir={folder / 'two'}"], cache))
        self.assertEqual(codes, [0, 0], said)
        # What XLA reads back from disk has lost the order of its collectives (compilation.py).
        self.assertEmpty(list(cache.glob("*")))

        hosts = pod(4, 1, [*command, f"--workdir={folder / 'four'}"])
        codes, said, seconds = signalled(hosts, "train 2/8", signal.SIGTERM, 2)
        self.assertEqual(codes, [75] * 4, said)
        print(f"{seconds:.1f} s from SIGTERM to the last exit", file=sys.stderr)
        steps = [re.findall(r"jaxrobust: stopped after step (\d+) of 8, saved", s) for s in said]
        self.assertLen({step for (step,) in steps}, 1)
        (saved,) = (folder / "four" / "train" / "latest").iterdir()
        self.assertEqual(saved.name, steps[0][0])
        codes, said = wait(pod(2, 2, [*command, f"--workdir={folder / 'four'}"]))
        self.assertEqual(codes, [0, 0], said)
        self.assertIn(f"train: step {saved.name} of 8", said[0])
        bench_resume.same(
            *(bench_resume.outcome(folder / name, phases=("train",)) for name in ("two", "four")),
            "a run of four hosts, then two",
        )

        codes, said = wait(start(1, 4, [*command, f"--workdir={folder / 'one'}"]))
        self.assertEqual(codes, [0], said)
        # Sums among the devices of a process come in another order.
        np.testing.assert_allclose(losses(folder / "one"), losses(folder / "two"), rtol=1e-6)
        self.assertGreater(np.ptp(losses(folder / "one")), 0.01)  # it does train

        # Other shares of the batch round otherwise: after eight updates losses differ by 2e-5 in
        # float32 and by 6e-10 in float64, on a CPU with AVX2.
        folder /= "float64"
        folder.mkdir()
        command = split(folder, model__dtype="float64")
        for name, processes in (("two", 2), ("eight", 4)):
            hosts = pod(processes, 2, [*command, f"--workdir={folder / name}"], x64=True)
            codes, said = wait(hosts)
            self.assertEqual(codes, [0] * processes, said)
        np.testing.assert_allclose(losses(folder / "eight"), losses(folder / "two"), rtol=1e-8)


@pytest.mark.slow
class DataTest(absltest.TestCase):
    def test_hosts_of_other_data_are_refused(self):
        """What trained to the end in silence, or died in Gloo's stack trace."""
        folder = Path(self.create_tempdir())
        digits = registry.open_source("digits", "train[:260]")
        for process, count in enumerate((256, 260)):
            for index in range(count):
                path = folder / str(process) / "all" / f"class{index % 10}" / f"{index}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(digits[index].image)
        changes = {f"data__{key}_split": "all" for key in ("train", "selection", "test")}
        changes |= {"data__name": "folder:data", "data__augmentation": "basic"}
        command = written(folder, model__in_channels=3, **changes)
        own = (
            "import os\n\nos.chdir(os.path.join(os.path.dirname(__file__), os.environ[PROCESS]))\n"
        )
        path = folder / "config.py"
        path.write_text(own.replace("PROCESS", "'JAX_PROCESS_ID'") + path.read_text())
        command += [f"--workdir={folder / 'run'}"]
        for process in (0, 1):
            (folder / str(process) / "data").symlink_to(folder / str(process))
        codes, said = wait(pod(2, 1, command))
        self.assertEqual(codes, [2, 2], said)
        words = "data.train_split.records is {} there, {} here; .*Give every host the same data set"
        self.assertRegex(said[0], words.format(260, 256))
        self.assertRegex(said[1], words.format(256, 260))

        (folder / "1" / "data").unlink()
        codes, said = wait(pod(2, 1, command))
        self.assertEqual(codes, [2, 2], said)
        for words in said:
            self.assertRegex(words, "jaxrobust: .*the directory data does not exist")
        self.assertFalse((folder / "run").exists())


# Steps 6 to 8 update nothing, one more than may be; host 1 is asked to stop after so many steps.
TROUBLE = """
import os, signal, sys
from pathlib import Path
from jaxrobust.runtime.processes.launch import join_hosts
join_hosts()
import jax
from jaxrobust.training.run import run, splits, stopping
from tests.support.runs import one_phase, poisoned

real, left = splits.device_batch, [int(sys.argv[2])]

def device_batch(mesh, batch):
    left[0] -= 1
    if left[0] == 0 and jax.process_index() == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    return real(mesh, batch)

splits.device_batch = device_batch
config = one_phase(trouble__skips=2, trouble__rollbacks=1, test__steps=1)
with poisoned([5, 6, 7]), jax.numpy_dtype_promotion("standard"):
    try:
        run.run(config, Path(sys.argv[1]))
    except stopping.Preempted as error:
        print(error, file=sys.stderr)
        sys.exit(75)
"""


@pytest.mark.slow
class TroubleTest(absltest.TestCase):
    def test_hosts_stop_in_trouble_and_go_back_together(self):
        folder = Path(self.create_tempdir())
        codes, said = wait(start(2, 1, ["-c", TROUBLE, str(folder / "whole"), "-1"]))
        self.assertEqual(codes, [0, 0], said)
        codes, said = wait(start(2, 1, ["-c", TROUBLE, str(folder / "stopped"), "7"]))
        self.assertEqual(codes, [75, 75], said)
        for text in said:
            self.assertRegex(text, r"stopped after step 7 of 12, saved .*the last 2 steps had")
        self.assertLen(list((folder / "stopped" / "train" / "stopped").iterdir()), 1)
        codes, said = wait(start(2, 1, ["-c", TROUBLE, str(folder / "stopped"), "-1"]))
        self.assertEqual(codes, [0, 0], said)
        self.assertRegex(
            said[0], "train: step 7 of 12(.*\n)*.*Returning to step 4(.*\n)*train: step 4"
        )
        bench_resume.same(
            *(bench_resume.outcome(folder / k, phases=("train",)) for k in ("whole", "stopped")),
            "a run that was stopped in trouble",
        )


@pytest.mark.matrix
class KillsTest(absltest.TestCase):
    """One host dies with -9 while both write a checkpoint; as a scheduler does, the other after."""

    def test_during_a_save(self):
        folder = Path(self.create_tempdir())
        changes = {"train__epochs": 3, "checkpoint__every_epochs": 1, "test__steps": 1}
        command = written(folder, **changes)
        codes, said = wait(pod(2, 1, [*command, f"--workdir={folder / 'peace'}"]))
        self.assertEqual(codes, [0, 0], said)
        expected = bench_resume.outcome(folder / "peace", phases=("train",))
        for dies in (0, 1):
            workdir = folder / f"killed-{dies}"
            hosts = pod(2, 1, [*command, f"--workdir={workdir}"])
            self.assertFalse(bench_resume.meets_saves(hosts[0], workdir, 2))
            hosts[dies].kill()
            time.sleep(0.1)
            hosts[1 - dies].terminate()
            time.sleep(0.4)
            hosts[1 - dies].kill()
            codes, said = wait(hosts)
            self.assertEqual(codes[dies], -signal.SIGKILL, said)
            whole = bench_resume.whole(workdir)["train"]
            self.assertIn(whole, (4, 8))
            codes, said = wait(pod(2, 1, [*command, f"--workdir={workdir}"]))
            self.assertEqual(codes, [0, 0], said)
            self.assertIn(f"train: step {whole} of 12", said[0])
            found = bench_resume.outcome(workdir, phases=("train",))
            bench_resume.same(expected, found, f"a run whose host {dies} died")


@pytest.mark.slow
class DamagedDataTest(absltest.TestCase):
    def test_one_host_names_it_all_save_and_stop(self):
        folder = Path(self.create_tempdir())
        digits = registry.open_source("digits", "train[:64]")
        for index in range(64):
            path = folder / "data" / "all" / f"class{index % 10}" / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(digits[index].image)
        name = f"folder:{folder / 'data'}"
        source = registry.open_source(name, "all")
        # Of the third step's 16, the first of host 0, which is the coordinator.
        path = Path(source.describe(plan._permutation((1, 0), 0, 64)[2 * 16]))
        whole = path.read_bytes()
        changes = {f"data__{key}_split": "all" for key in ("train", "selection", "test")}
        changes |= {"data__name": name, "data__strict": True, "data__augmentation": "basic"}
        changes |= {"train__batch_size": 16, "train__epochs": 1, "train__warmup_epochs": 0}
        command = [*written(folder, model__in_channels=3, test__steps=1, **changes)]
        command += [f"--workdir={folder / 'run'}"]

        path.write_bytes(b"")
        begun = time.perf_counter()
        codes, said = wait(pod(2, 1, command))
        print(f"{time.perf_counter() - begun:.1f} s until both have ended", file=sys.stderr)
        self.assertEqual(codes, [2, 3], said)
        stopped = r"stopped after step 2 of 4, saved in .*; run the same command to continue"
        self.assertRegex(
            said[0], f"{path} is damaged: .*; the other hosts stop too. Repair .*: {stopped}"
        )
        self.assertRegex(
            said[1], rf"another host cannot read its data \(see its message\); {stopped}"
        )
        self.assertNotIn("Traceback", "".join(said))

        path.write_bytes(whole)
        codes, said = wait(start(1, 2, command))
        self.assertEqual(codes, [0], said)
        self.assertIn("train: step 2 of 4", said[0])
        self.assertLen(losses(folder / "run"), 4)
        self.assertLen(result_lines.read(folder / "run"), 1)
