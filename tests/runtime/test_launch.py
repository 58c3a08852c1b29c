"""Hosts that find each other or say why not, and the scripts that start them."""

import contextlib
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from absl.testing import absltest, parameterized

from jaxrobust.runtime import launch
from tests.support import paths

ROOT = paths.ROOT
SCRIPTS = ROOT / "tools" / "launch"


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def free_job() -> str:
    """The number of a Slurm job from which JAX takes a port, above 61440, that is free."""
    for job in range(os.getpid(), os.getpid() + 4096):
        with socket.socket() as tried, contextlib.suppress(OSError):
            tried.bind(("localhost", 61440 + job % 4096))
            return str(job)
    raise AssertionError("no port is free")


def environment(**more: str) -> dict[str, str]:
    """This one's, as on a host with one CPU device that is told of no cluster."""
    others = ("JAX_COORDINATOR", "JAX_NUM_P", "JAX_PROCESS", "SLURM_", "XLA_FLAGS")
    plain = {k: v for k, v in os.environ.items() if not k.startswith(others)}
    return plain | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)} | more


class MistakesTest(parameterized.TestCase):
    @parameterized.parameters(
        ({"coordinator": "10.0.0.1"}, r"--coordinator_address 10.0.0.1 is not host:port; write "),
        ({"coordinator": "host:"}, "is not host:port"),
        ({"coordinator": ":8476"}, "is not host:port"),
        ({"coordinator": "host:port"}, "is not host:port"),
        ({"coordinator": "host:70000"}, "is not host:port"),
        ({"processes": 0}, "--num_processes 0 must be at least 1"),
        (
            {"processes": 4, "process": 4},
            "--process_id 4 is not one of 4 processes; they count from 0 to 3",
        ),
        ({"process": -1}, "--process_id -1 is not one of N processes; they count from 0"),
        ({"timeout_s": 0.0}, "--coordinator_timeout 0 must be seconds, such as 600"),
        ({"timeout_s": float("nan")}, "--coordinator_timeout nan must be seconds"),
        ({"timeout_s": float("inf")}, "--coordinator_timeout inf must be seconds"),
    )
    def test_is_one_sentence(self, given, message):
        with (
            absltest.mock.patch.dict(os.environ, environment(), clear=True),
            self.assertRaisesRegex(ValueError, message),
        ):
            launch.join_hosts(**given)

    @parameterized.parameters(
        ({"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES=two is not an integer"),
        ({"JAX_PROCESS_ID": "0.5"}, "JAX_PROCESS_ID=0.5 is not an integer"),
        (
            {"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"},
            "--process_id 2 is not one of 2 processes",
        ),
        ({"JAX_COORDINATOR_ADDRESS": "host"}, "--coordinator_address host is not host:port"),
    )
    def test_the_environment_as_well(self, variables, message):
        with (
            absltest.mock.patch.dict(os.environ, environment(**variables), clear=True),
            self.assertRaisesRegex(ValueError, message),
        ):
            launch.join_hosts()


@pytest.mark.slow
class MainTest(parameterized.TestCase):
    """`python -m jaxrobust.main` on its own where others were to come."""

    def fails(self, *flags: str, **variables: str) -> str:
        """What it says while it exits with 2."""
        process = subprocess.run(
            [sys.executable, "-m", "jaxrobust.main", "--config=configs/quickstart.py", *flags],
            cwd=ROOT,
            env=environment(**variables),
            capture_output=True,
            text=True,
            timeout=100,
        )
        self.assertEqual(process.returncode, 2, process.stderr)
        said = [line for line in process.stderr.splitlines() if line.startswith("jaxrobust: ")]
        self.assertLen(said, 1, process.stderr)
        self.assertNotIn("Traceback", process.stderr)
        self.assertNotIn("stack trace", process.stderr)
        return said[0]

    def test_nobody_at_the_coordinator(self):
        address = f"127.0.0.1:{free_port()}"
        began = time.perf_counter()
        said = self.fails(
            f"--coordinator_address={address}",
            *("--num_processes=2", "--process_id=1", "--coordinator_timeout=3"),
        )
        self.assertLess(time.perf_counter() - began, 40)
        self.assertIn(f"nobody answers at --coordinator_address {address} within 3 s", said)
        self.assertIn("start the same command on every host", said)

    def test_nobody_comes_to_the_coordinator(self):
        said = self.fails(
            "--coordinator_timeout=3",
            JAX_COORDINATOR_ADDRESS=f"127.0.0.1:{free_port()}",
            JAX_NUM_PROCESSES="2",
            JAX_PROCESS_ID="0",
        )
        self.assertIn("of 2 processes, some were not there within 3 s; start the same", said)

    def test_a_port_that_is_taken(self):
        with socket.create_server(("", 0)) as taken:
            address = f"127.0.0.1:{taken.getsockname()[1]}"
            said = self.fails(
                f"--coordinator_address={address}", "--num_processes=2", "--process_id=0"
            )
        self.assertRegex(
            said,
            rf"--coordinator_address {address}: process 0 cannot listen at its port \(.*in use\); "
            "choose another one",
        )

    def test_no_cluster(self):
        said = self.fails("--multihost")
        self.assertIn("no cluster was found (Cloud TPU, Slurm, ", said)
        self.assertIn("give --coordinator_address host:port, --num_processes N and", said)

    @parameterized.parameters(
        (["--num_processes=two"], "num_processes"),
        (["--profile=10"], "--profile 10 is not START:STEPS"),
        (["--workdir=gs://bucket/run"], "--workdir gs://bucket/run: give a folder; gcsfuse mounts"),
    )
    def test_flags(self, flags, message):
        self.assertIn(message, self.fails(*flags))


class ScriptsTest(absltest.TestCase):
    """The scripts with stand-ins for the programs of a cloud, which write down their arguments."""

    def setUp(self):
        super().setUp()
        self.bin = Path(self.create_tempdir())
        self.log = self.bin / "log"

    def program(self, name: str, body: str) -> None:
        """A stand-in: notes its arguments, each ended by a 0, all by a 1, then runs `body`."""
        path = self.bin / name
        note = f"""printf '%s\\0' {name} "$@" >>{self.log}; printf '\\1' >>{self.log}"""
        path.write_text(f"#!/usr/bin/env bash\n{note}\n{body}\n")
        path.chmod(0o755)

    def calls(self) -> list[list[str]]:
        return [call.split("\0")[:-1] for call in self.log.read_text().split("\1")[:-1]]

    def run_script(self, name: str, *arguments: str, **variables: str):
        return subprocess.run(
            ["bash", str(SCRIPTS / name), *arguments],
            cwd=ROOT,
            env=os.environ | {"PATH": f"{self.bin}:{os.environ['PATH']}"} | variables,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def test_syntax(self):
        scripts = sorted(path for path in SCRIPTS.iterdir() if path.suffix != ".md")
        self.assertLen(scripts, 3)
        for script in scripts:
            subprocess.run(["bash", "-n", script], check=True)

    def pod(self, codes: list[int], *arguments: str):
        """tpu_pod.sh where the run ends with these codes, one after the other; 70: its host dies.

        Returns the process, the commands on the hosts, and the kinds of calls.
        """
        (self.bin / "codes").write_text("".join(f"{code}\n" for code in codes))
        self.program("sleep", "")
        self.program("git", "")
        self.program(
            "gcloud",
            f"""cd {self.bin}
case "$*" in
  *" describe "*) cat state; exit ;;
  *" delete "*) rm -f state; exit ;;
  *" create "*) [ -e tried ] || {{ touch tried; exit 1; }}; echo READY >state ;;
  *jaxrobust.main*)
    code=$(head -1 codes); sed -i 1d codes
    [ $code == 70 ] && {{ echo PREEMPTED >state; exit 255; }}
    exit $code ;;
esac""",
        )
        process = self.run_script(
            "tpu_pod.sh",
            *arguments,
            **{"TPU": "t", "ZONE": "z", "TYPE": "v5litepod-64", "VERSION": "v", "BUCKET": "b"},
        )
        calls = [c for c in self.calls() if c[0] == "gcloud"]
        commands = [c[c.index("--command") + 1] for c in calls if "--command" in c]
        for command in commands:
            subprocess.run(["bash", "-n", "-c", command], check=True)
        kinds = [c[4] for c in calls]
        return process, [c for c in commands if "jaxrobust.main" in c], kinds

    def test_tpu_pod_runs_again_while_it_is_preempted(self):
        arguments = ["--config", "configs/vit_s_cvst.py", "--workdir", "../bucket/a b"]
        process, commands, kinds = self.pod([75, 70, 0], *arguments)
        self.assertEqual(process.returncode, 0, process.stderr)
        self.assertLen(commands, 3)  # preempted; a host was lost with the slice; done
        self.assertEqual(kinds.count("create"), 3)  # none is free, then one; after the loss another
        self.assertEqual(kinds.count("scp"), 3)
        self.assertLen(set(commands), 1)
        self.assertEqual(
            shlex.split(commands[0].split("&&")[1]),
            ["../venv/bin/python", "-m", "jaxrobust.main", "--multihost", *arguments],
        )

    def test_tpu_pod_ends_with_the_code_of_another_end(self):
        for code in (0, 2, 3, 255):
            with self.subTest(code=code):
                process, commands, _ = self.pod([code])
                self.assertEqual(process.returncode, code, process.stderr)
                self.assertLen(commands, 1)
            self.log.unlink()

    def test_tpu_pod_says_what_it_needs(self):
        process = self.run_script("tpu_pod.sh")
        self.assertNotEqual(process.returncode, 0)
        self.assertIn("TPU: name of the slice", process.stderr)

    def test_xpk_submits_the_command(self):
        self.program("xpk", "")
        arguments = ["--config", "configs/vit_s_cvst.py", "--workdir", "/bucket/a b"]
        process = self.run_script(
            "xpk.sh", "robust", *arguments, CLUSTER="c", ZONE="z", TYPE="v5litepod-64", IMAGE="i"
        )
        self.assertEqual(process.returncode, 0, process.stderr)
        (call,) = self.calls()
        self.assertEqual(call[:3], ["xpk", "workload", "create"])
        given = dict(zip(call[3::2], call[4::2], strict=True))
        self.assertEqual(given["--restart-on-exit-codes"], "75")
        self.assertEqual(given["--workload"], "robust")
        self.assertEqual(
            shlex.split(given["--command"]),
            ["python", "-m", "jaxrobust.main", "--multihost", *arguments],
        )

    def slurm(self, code: int, **variables: str):
        """The calls of a job whose processes end with `code`, and how the job ends."""
        self.program("devices", "")
        self.program("srun", f'devices "$JAX_LOCAL_DEVICE_IDS"; exit {code}')
        self.program("scontrol", "")
        process = self.run_script(
            "slurm.sbatch", "--config", "a b.py", SLURM_JOB_ID="17", **variables
        )
        calls = self.calls()
        self.log.unlink()
        return calls, process.returncode

    def test_slurm_queues_again_what_was_preempted(self):
        command = ["srun", "python", "-m", "jaxrobust.main", "--multihost", "--config", "a b.py"]
        calls, code = self.slurm(75)
        self.assertEqual((calls[0], code), (command, 75))
        self.assertEqual(calls[-1], ["scontrol", "requeue", "17"])
        for end in (0, 2, 3):
            calls, code = self.slurm(end)
            self.assertEqual((len(calls), code), (2, end))

    def test_slurm_gives_a_process_every_gpu_of_its_node(self):
        calls, _ = self.slurm(0, SLURM_GPUS_ON_NODE="4")
        self.assertEqual(calls[1], ["devices", "0,1,2,3"])


SRUN = """
import os, signal, subprocess, sys
tasks = [
    subprocess.Popen(
        sys.argv[1:],
        env=os.environ | {
            "SLURM_STEP_NODELIST": "localhost",
            "SLURM_STEP_NUM_NODES": "1",
            "SLURM_NTASKS": "2",
            "SLURM_PROCID": str(task),
            "SLURM_LOCALID": str(task),
        },
    )
    for task in range(2)
]
signal.signal(signal.SIGTERM, lambda *_: [task.send_signal(signal.SIGTERM) for task in tasks])
print("srun", os.getpid(), file=sys.stderr, flush=True)
sys.exit(max(task.wait() % 256 for task in tasks))
"""


@pytest.mark.slow
class SlurmRunTest(absltest.TestCase):
    """slurm.sbatch for real, but for Slurm: a stand-in for srun starts two processes."""

    def setUp(self):
        super().setUp()
        self.folder = Path(self.create_tempdir())
        (self.folder / "srun").write_text(f"#!{sys.executable}\n{SRUN}")
        (self.folder / "scontrol").write_text(f'#!/bin/sh\necho "$@" >>{self.folder}/requeued\n')
        (self.folder / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
        for name in ("srun", "scontrol", "python"):
            (self.folder / name).chmod(0o755)

    def job(self):
        """(exit code, what was said) of the job, preempted in its second step."""
        variables = {
            "PATH": f"{self.folder}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "SLURM_JOB_ID": free_job(),
        }
        process = subprocess.Popen(
            [
                *("bash", str(SCRIPTS / "slurm.sbatch"), "--config=configs/quickstart.py"),
                *(f"--workdir={self.folder / 'run'}", "--config.log.every_steps=1"),
            ],
            cwd=ROOT,
            env=environment(**variables),
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        said, srun = [], 0
        for line in process.stderr:
            said.append(line)
            if match := re.match(r"srun (\d+)", line):
                srun = int(match[1])
            if re.match(r"pretrain \d+/", line) and srun:
                os.kill(srun, signal.SIGTERM)
                srun = 0
        process.stderr.close()
        return process.wait(300), "".join(said)

    def test_two_processes_join_stop_together_and_continue(self):
        code, said = self.job()
        self.assertEqual(code, 75, said)
        self.assertIn("2 x cpu", said)
        first = int(re.search(r"stopped after step (\d+)", said)[1])
        code, said = self.job()
        self.assertEqual(code, 75, said)
        self.assertIn(f"pretrain: step {first} of", said)
        self.assertGreater(int(re.search(r"stopped after step (\d+)", said)[1]), first)
        self.assertLen((self.folder / "requeued").read_text().splitlines(), 2)


if __name__ == "__main__":
    absltest.main()
