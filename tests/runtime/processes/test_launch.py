"""Hosts that find each other or say why not, and the scripts that start them."""

import os
import socket
import subprocess
import sys
import time
import types
from pathlib import Path
from unittest import mock

import pytest
from absl.testing import parameterized

from jaxrobust.runtime.processes import launch
from tests.support import paths, processes, sweeps

ROOT = paths.ROOT


def environ(values: dict[str, str]):
    """Let a block have this environment, and no other."""
    return mock.patch.dict(os.environ, values, clear=True)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


class WithoutTpuTest(parameterized.TestCase):
    def asked(self, *, library=True, plugins=(), environment=None, **machine) -> bool:
        """Whether JAX is kept from a TPU's library on such a machine."""
        folder = Path(self.create_tempdir())
        for name, text in machine.items():
            path = folder / name.replace("__", "/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        own = {k: v for k, v in os.environ.items() if not k.startswith(("TPU_", "JAX_PLATFORM"))}
        find = lambda name: library if name == "libtpu" else None  # noqa: E731
        modules = [types.SimpleNamespace(name=name) for name in ("jax", "jaxlib", *plugins)]
        with (
            environ(own | (environment or {})),
            mock.patch.multiple(launch.importlib.util, find_spec=find),
            mock.patch.multiple(launch.pkgutil, iter_modules=lambda *where: modules),
        ):
            done = launch.without_tpu(folder / "dev", folder / "bus")
            self.assertEqual(os.environ.get("JAX_PLATFORMS") == "cpu", done)
            return done

    def test_a_library_without_its_machine(self):
        network = {"bus__0__vendor": "0x1ae0\n", "bus__0__class": "0x020000\n"}
        self.assertTrue(self.asked())
        self.assertTrue(self.asked(dev__null="", **network))  # Google's network card

    @sweeps.rows(
        {"library": False},
        {"plugins": ("jax_cuda12_plugin",)},
        {"environment": {"JAX_PLATFORMS": ""}},
        {"environment": {"TPU_ACCELERATOR_TYPE": "v5litepod-16"}},
        {"dev__accel0": ""},
        {"dev__vfio__0": ""},
        {"bus__0__vendor": "0x1ae0\n", "bus__0__class": "0x120000\n"},
    )
    def test_who_may_have_an_accelerator_is_left_alone(self, **machine):
        self.assertFalse(self.asked(**machine))


class MistakesTest(parameterized.TestCase):
    @sweeps.rows(
        ({"coordinator": "10.0.0.1"}, r"--coordinator_address 10.0.0.1 is not host:port; write "),
        ({"coordinator": "host:"}, "is not host:port"),
        ({"coordinator": ":8476"}, "is not host:port"),
        ({"coordinator": "host:port"}, "is not host:port"),
        ({"coordinator": "host:70000"}, "is not host:port"),
        ({"processes": 0}, "--num_processes 0 must be at least 1"),
        (
            {"processes": 4, "process": 4},
            "--process_id 4 is out of range for 4 processes; ids go from 0 to 3",
        ),
        ({"process": -1}, "--process_id -1 is out of range for N processes; ids go from 0 to N"),
        ({"timeout_s": 0.0}, "--coordinator_timeout 0 must be a number of seconds, such as 600"),
        ({"timeout_s": float("nan")}, "--coordinator_timeout nan must be a number of seconds"),
        ({"timeout_s": float("inf")}, "--coordinator_timeout inf must be a number of seconds"),
    )
    def test_is_one_sentence(self, given, message):
        with (
            environ(processes.environment()),
            self.assertRaisesRegex(ValueError, message),
        ):
            launch.join_hosts(**given)

    @sweeps.rows(
        ({"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES=two is not an integer"),
        ({"JAX_PROCESS_ID": "0.5"}, "JAX_PROCESS_ID=0.5 is not an integer"),
        (
            {"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"},
            "--process_id 2 is out of range for 2 processes",
        ),
        ({"JAX_COORDINATOR_ADDRESS": "host"}, "--coordinator_address host is not host:port"),
    )
    def test_the_environment_as_well(self, variables, message):
        with (
            environ(processes.environment(**variables)),
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
            env=processes.environment(**variables),
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
        self.assertIn(
            f"process 0 did not answer at --coordinator_address {address} within 3 s", said
        )
        self.assertIn("start the same command on every host", said)

    def test_nobody_comes_to_the_coordinator(self):
        said = self.fails(
            "--coordinator_timeout=3",
            JAX_COORDINATOR_ADDRESS=f"127.0.0.1:{free_port()}",
            JAX_NUM_PROCESSES="2",
            JAX_PROCESS_ID="0",
        )
        self.assertIn("not all 2 processes joined within 3 s; start the same", said)

    def test_a_port_that_is_taken(self):
        with socket.create_server(("", 0)) as taken:
            address = f"127.0.0.1:{taken.getsockname()[1]}"
            said = self.fails(
                f"--coordinator_address={address}", "--num_processes=2", "--process_id=0"
            )
        self.assertRegex(
            said,
            rf"--coordinator_address {address}: process 0 cannot listen on this port \(.*in use\); "
            "choose a different one",
        )

    def test_no_cluster(self):
        said = self.fails("--multihost")
        self.assertIn("no cluster was found (Cloud TPU, Slurm, ", said)
        self.assertIn("give --coordinator_address host:port, --num_processes N and", said)

    @sweeps.rows(
        (["--num_processes=two"], "num_processes"),
        (["--profile=10"], "--profile 10 is not START:STEPS"),
        (["--workdir=s3://bucket/run"], "is neither a folder nor gs://BUCKET/FOLDER"),
    )
    def test_flags(self, flags, message):
        self.assertIn(message, self.fails(*flags))


class CoresTest(parameterized.TestCase):
    @sweeps.rows(
        ({}, 5, "5"),
        ({"JAX_NUM_CPU_DEVICES": "2"}, None, "2"),
        ({"XLA_FLAGS": "--xla_force_host_platform_device_count=3"}, None, None),
        ({"XLA_FLAGS": "--other"}, 5, "5"),
    )
    def test_devices(self, environment, count, devices):
        with (
            environ(environment),
            mock.patch.object(os, "sched_getaffinity", lambda process: range(5), create=True),
        ):
            self.assertEqual(launch.cores(), count)
            launch.use_every_core()
            self.assertEqual(os.environ.get("JAX_NUM_CPU_DEVICES"), devices)
            self.assertEqual(launch.own_cores(), 5)

    @parameterized.parameters((1, 8, True), (2, 8, False), (1, 1, False))
    def test_a_process_that_is_bound_to_one_core(self, allowed, total, warns):
        affinity = mock.patch.object(
            os, "sched_getaffinity", lambda process: range(allowed), create=True
        )
        with affinity, mock.patch.object(os, "cpu_count", lambda: total):
            words = launch.few_cores()
        if warns:
            self.assertRegex(
                words, r"only one of 8 cores, .*\(srun --cpu-bind=none\).* \(--cpus-per-task 8\)"
            )
        else:
            self.assertIsNone(words)

    def test_patience(self):
        with environ({"XLA_FLAGS": "--own=1"}):
            launch.patient_collectives()
            flags = os.environ["XLA_FLAGS"].split()
        self.assertEqual(flags[-1], "--own=1")  # what a user says comes last, and wins
        self.assertIn("--xla_cpu_collective_call_terminate_timeout_seconds=3600", flags)
        with environ({}):
            launch.patient_collectives()
            self.assertLen(os.environ["XLA_FLAGS"].split(), 2)

    @sweeps.rows(
        ({}, "glibc", True),
        ({}, "", False),
        ({"JAXROBUST_ALLOCATOR": "system"}, "glibc", False),
        ({"JAXROBUST_ALLOCATOR": "ours"}, "glibc", True),
        ({"MALLOC_TRIM_THRESHOLD_": "1"}, "glibc", False),
        ({"GLIBC_TUNABLES": ""}, "glibc", False),
    )
    def test_the_allocator(self, environment, libc, again):
        started = []
        with (
            environ(environment),
            mock.patch.object(launch, "without_tpu", lambda: False),
            mock.patch.object(launch.platform, "libc_ver", lambda: (libc, "2")),
            mock.patch.object(os, "execve", lambda *given: started.append(given)),
            mock.patch.object(sys, "orig_argv", ["python", "-m", "x", "--y"]),
        ):
            launch.keep_large_buffers()
        expected = environment | launch.ALLOCATOR
        command = (sys.executable, [sys.executable, "-m", "x", "--y"], expected)
        self.assertEqual(started, [command] if again else [])


class JoinTest(parameterized.TestCase):
    """JAX's own meeting is a stand-in."""

    def join(self, environment=None, initialize=None, **how):
        calls = []

        def met(*given, **rest):
            calls.append((*given, rest))
            if initialize:
                initialize()

        with (
            environ(environment or {}),
            mock.patch("jax.distributed.initialize", met),
            mock.patch("jax.config.update") as update,
        ):
            launch.join_hosts(**how)
        update.assert_called_once_with("jax_enable_preemption_service", False)
        (call,) = calls
        return call

    def test_flags_come_before_the_environment(self):
        own = {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "3", "JAX_PROCESS_ID": "2"}
        self.assertEqual(self.join(own), ("a:1", 3, 2, {"initialization_timeout": 360}))
        given = self.join(own, coordinator="b:2", processes=5, process=4, timeout_s=9.5)
        self.assertEqual(given, ("b:2", 5, 4, {"initialization_timeout": 69}))
        empty = dict.fromkeys(own, "")
        self.assertEqual(self.join(empty)[:3], (None, None, None))

    def test_failures(self):
        def fails(error):
            def initialize():
                raise error

            return initialize

        with self.assertRaisesRegex(ValueError, "no cluster was found.*--process_id I.*which one"):
            self.join(initialize=fails(ValueError("which one")))
        broken = fails(RuntimeError("closed\nstack"))
        with self.assertRaisesRegex(ValueError, "^cannot join the hosts at a:1: closed$"):
            self.join(initialize=broken, coordinator="a:1", processes=2, process=1)
        with self.assertRaisesRegex(ValueError, "^cannot join the hosts of the cluster: closed$"):
            self.join(initialize=broken)
        with self.assertRaisesRegex(ValueError, "not all 2 processes joined within 0.05 s"):
            late = {"processes": 2, "process": 0, "timeout_s": 0.05}
            self.join(initialize=lambda: time.sleep(0.3), **late)
