"""One process at a time, whatever becomes of it."""

import contextlib
import errno
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from unittest import mock

import pytest
from absl.testing import parameterized

from jaxrobust.evaluation.engine import ledger
from jaxrobust.runtime.files import jsonl, locks
from tests.support import paths, sweeps
from tests.support.processes import start, wait, written
from tests.support.runs import quiet_run, tiny
from tests.support.stored_verdicts import IDS, VERDICT, evaluated

ROOT = paths.ROOT
HOLD = """
import sys, time, pathlib
from jaxrobust.runtime.files import locks
locks._GRACE = 0.1
with locks.held(pathlib.Path(sys.argv[1]), resource="it", otherwise="leave"):
    print("held", flush=True)
    sys.stdin.read()
"""
APPEND = """
import sys, pathlib
from jaxrobust.runtime.files import jsonl
for number in range(100):
    jsonl.append(pathlib.Path(sys.argv[1]), {"of": sys.argv[2], "number": number})
"""


def held(path, what="it"):
    return locks.held(Path(path), resource=what, otherwise="take another")


@contextlib.contextmanager
def holder(path):
    """Another process that holds a lock until its input ends."""
    command = [sys.executable, "-c", HOLD, str(path)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process


class LocksCase(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.folder = Path(self.create_tempdir())
        self.path = self.folder / "lock"
        self.enter_context(mock.patch.object(locks, "_GRACE", 0.3))


class HeldTest(LocksCase):
    def test_another_process_is_named_until_it_ends(self):
        with holder(self.path) as process:
            words = rf"it is in use by process {process.pid} on {socket.gethostname()} since 2"
            with self.assertRaisesRegex(ValueError, f"{words}.*; wait for it.*take another$"):
                held(self.path).__enter__()
            process.stdin.close()
            process.wait()
        self.assertEqual(self.path.read_bytes(), b"")
        for _ in range(2):
            with held(self.path):
                self.assertEqual(json.loads(self.path.read_text())["pid"], os.getpid())

    def test_a_kill_gives_it_back(self):
        with holder(self.path) as process:
            process.send_signal(signal.SIGKILL)
            process.wait()
            self.assertEqual(json.loads(self.path.read_text())["pid"], process.pid)
            with held(self.path):
                pass

    def test_waits_a_moment_for_one_that_ends(self):
        with holder(self.path) as process:
            threading.Timer(0.1, process.kill).start()
            with held(self.path):
                pass

    def test_waits_as_long_as_it_takes_where_asked_to(self):
        """Two downloads of one file that start together; one that waits holds one open file."""
        said, opened = io.StringIO(), []
        with holder(self.path) as process, contextlib.redirect_stderr(said):

            def end():
                opened.append(len(os.listdir("/proc/self/fd")))
                process.stdin.close()

            before = len(os.listdir("/proc/self/fd"))
            threading.Timer(1.5, end).start()  # five times the patience
            with locks.held(self.path, resource="it", otherwise="leave", wait=True):
                self.assertIsNotNone(process.wait())
        self.assertRegex(said.getvalue(), r"^it is in use by process \d+ on .*: waiting\n$")
        self.assertLessEqual(opened[0], before + 1)

    def test_a_child_does_not_keep_it(self):
        """A worker that outlives its killed parent."""
        code = HOLD.replace("print(", "import os; os.fork() or time.sleep(60); print(")
        with mock.patch.dict(globals(), HOLD=code), holder(self.path) as process:
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
            process.kill()
            process.wait()
            with held(self.path):
                os.kill(int(children), signal.SIGKILL)

    def test_twice_in_a_process(self):
        link = self.path.with_name("link")
        link.symlink_to(self.path)
        with held(self.path):
            with self.assertRaisesRegex(ValueError, f"by process {os.getpid()} on "):
                held(link).__enter__()
            other = subprocess.run(
                [sys.executable, "-c", HOLD, self.path], cwd=ROOT, capture_output=True, text=True
            )
            self.assertIn(f"in use by process {os.getpid()} on ", other.stderr)
        with self.assertRaises(ZeroDivisionError), held(self.path):
            raise ZeroDivisionError
        with held(self.path):
            pass

    def test_where_the_kernel_has_none(self):
        no_locks = OSError(errno.ENOLCK, "No locks available")
        broken = mock.patch.object(locks.fcntl, "lockf", side_effect=no_locks)
        with holder(self.path) as process, broken:
            with self.assertRaisesRegex(ValueError, f"by process {process.pid}"):
                held(self.path).__enter__()
            process.kill()
            with held(self.path):  # a zombie does not count
                pass

    def write(self, **changes):
        me = {"host": "elsewhere", "pid": 1, "since": "2026", "started": None, "sign": "0"}
        self.path.write_text(json.dumps(me | changes))

    def test_another_process_under_the_number_of_one_that_ended(self):
        """Numbers come again; when a process was started tells it from the holder."""
        here = socket.gethostname()
        with holder(self.path) as process:
            signed = json.loads(self.path.read_text())
            process.kill()
            process.wait()
        self.write(**signed | {"host": here, "pid": os.getppid()})  # runs, and began earlier
        with held(self.path):
            pass

    def test_another_host_that_lives(self):
        """The kernel's locks end at the host."""
        self.write()
        timer = threading.Timer(0.3, self.write, kwargs={"sign": "1"})
        timer.start()
        message = f"it is in use by process 1 on elsewhere .*, or remove {self.path} if"
        with (
            contextlib.redirect_stderr(io.StringIO()) as said,
            self.assertRaisesRegex(ValueError, message),
        ):
            held(self.path).__enter__()
        self.assertRegex(said.getvalue(), "was .* elsewhere .*: waiting up to 150 s for a sign")

    def test_another_host_that_is_gone(self):
        self.write()
        quiet = contextlib.redirect_stderr(io.StringIO())
        with mock.patch.object(locks, "_PATIENCE", 0.5), quiet:
            begun = time.monotonic()
            with held(self.path):
                self.assertGreater(time.monotonic() - begun, 0.5)

    def test_gives_signs_of_life(self):
        with mock.patch.object(locks, "_BEAT", 0.05), held(self.path):
            seen = set()
            while len(seen) < 3:
                seen.add(json.loads(self.path.read_text())["sign"])

    @sweeps.rows("", "{", "[]", '{"host": "elsewhere"}')
    def test_a_damaged_file_is_free(self, text):
        self.path.write_text(text)
        with held(self.path):
            self.assertEqual(json.loads(self.path.read_text())["pid"], os.getpid())


class RunsTest(LocksCase):
    """Whether a holder is there still, by the state and the start that Linux notes of a process."""

    def test_one_that_ended_was_never_started(self):
        program = shutil.copy("/bin/sleep", self.folder / "a) Z (b")  # a name may have brackets
        with subprocess.Popen([program, "60"]) as process:
            started = locks._started(process.pid)
            self.assertGreaterEqual(int(started), int(locks._started(os.getpid())))
            holder_of = {"pid": process.pid, "started": started}
            self.assertTrue(locks._runs(holder_of))
            self.assertFalse(locks._runs(holder_of | {"started": "21"}))
            with mock.patch.object(os, "kill", side_effect=PermissionError):  # another user's
                self.assertTrue(locks._runs(holder_of))
            process.kill()
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
            self.assertIsNone(locks._started(process.pid))  # a zombie
            self.assertFalse(locks._runs(holder_of))
        self.assertIsNone(locks._started(process.pid))
        self.assertFalse(locks._runs({"pid": os.getpid(), "started": "21"}))
        self.assertFalse(locks._runs(None))


class UsersTest(LocksCase):
    """Ledgers and runs."""

    def test_a_ledger_that_it_refuses_can_be_opened_again(self):
        path = self.folder / "a.jsonl"
        for identity in ("one", "two", "two", "one"):
            opened = ledger.open_ledger(path, evaluated(identity), IDS)
            if identity == "two":
                with self.assertRaisesRegex(ValueError, "belongs to another"), opened:
                    pass
                continue
            with self.assertRaises(ZeroDivisionError), opened as book:
                book.add(0, VERDICT, None)
                with self.assertRaisesRegex(ValueError, "in use by process"):
                    ledger.Ledger(path, evaluated(identity), IDS)
                raise ZeroDivisionError

    def test_a_run_of_another_process_is_refused(self):
        workdir = self.folder / "run"
        workdir.mkdir()
        with (
            holder(workdir / "lock") as process,
            self.assertRaisesRegex(
                ValueError,
                f"workdir {workdir} is in use by process {process.pid} on .*another --workdir",
            ),
        ):
            quiet_run(tiny(), workdir)
        self.assertEqual([path.name for path in workdir.iterdir()], ["lock"])

    @pytest.mark.slow
    def test_two_commands(self):
        """As `srun` without --multihost starts them."""
        folder = self.folder
        command = [*written(folder, train__epochs=9999), f"--workdir={folder / 'run'}"]
        (first,) = start(1, 1, command)
        said = iter(first.stderr.readline, "")
        self.assertTrue(any(line.startswith("train 1/") for line in said))
        (code,), (refused,) = wait(start(1, 1, command))
        first.terminate()
        self.assertRegex(
            refused.splitlines()[-1],
            rf"^jaxrobust: workdir .* is in use by process {first.pid} on .* --multihost\)$",
        )
        self.assertEqual((code, wait([first])[0]), (2, [75]))

    def test_lines_that_several_processes_append_are_all_there(self):
        path = self.folder / "results.jsonl"
        command = [sys.executable, "-c", APPEND, str(path)]
        writers = [subprocess.Popen([*command, name], cwd=ROOT) for name in "ab"]
        self.assertEqual([writer.wait() for writer in writers], [0, 0])
        rows = jsonl.read(path)
        for name in "ab":
            self.assertEqual([r["number"] for r in rows if r["of"] == name], list(range(100)))
