"""One process at a time, whatever becomes of it."""

import contextlib
import errno
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from absl.testing import absltest, parameterized

from jaxrobust.evaluation.engine import ledger
from jaxrobust.evaluation.network import fingerprint
from jaxrobust.runtime.files import jsonl, locks
from tests.support import paths, sweeps
from tests.support.processes import start, wait, written
from tests.support.runs import quiet_run, tiny

ROOT = paths.ROOT
VERDICT = {"attack": "square", "fooled": False, "flat": False}
IDS = np.arange(1, dtype=np.uint32)
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


def evaluated(network):
    """What a ledger says that it is of."""
    probe = {"logits": [[1.0]], "gradients": [[1.0]]}
    known = fingerprint.Fingerprint("program", "gradient", network, probe, fingerprint.versions())
    known_of_all = known._asdict() | {"images": "images"}
    return {"network": None, "fingerprint": known_of_all, "search": None}


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


class HeldTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.path = Path(self.create_tempdir()) / "lock"
        self.enter_context(mock.patch.object(locks, "_GRACE", 0.3))

    def test_another_process_is_named_until_it_ends(self):
        with holder(self.path) as process:
            words = rf"it is in use by process {process.pid} on {socket.gethostname()} since 2"
            with self.assertRaisesRegex(ValueError, f"{words}.*: wait for it.*take another$"):
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
        with holder(self.path) as process, mock.patch.object(locks, "_GRACE", 60):
            threading.Timer(0.3, process.kill).start()
            with held(self.path):
                pass

    def test_waits_as_long_as_it_takes_where_asked_to(self):
        """Two downloads of one file that start together."""
        said = io.StringIO()
        with holder(self.path) as process, contextlib.redirect_stderr(said):
            threading.Timer(1.5, process.stdin.close).start()  # five times the patience
            with locks.held(self.path, resource="it", otherwise="leave", wait=True):
                self.assertIsNotNone(process.wait())
        self.assertRegex(said.getvalue(), r"^it is in use by process \d+ on .*: waiting\n$")

    def test_one_that_waits_holds_one_open_file(self):
        opened, free = [], iter([False] * 5 + [True])
        open_file = os.open

        def opens(*given):
            opened.append(open_file(*given))
            return opened[-1]

        with (
            mock.patch.object(locks.os, "open", opens),
            mock.patch.object(locks, "_lock", lambda file: next(free)),
            mock.patch.object(locks.os, "close", wraps=os.close) as close,
            mock.patch.object(locks.time, "sleep") as sleep,
        ):
            file = locks._taken(self.path, "it", "leave", wait=True)
            closed = [call.args[0] for call in close.call_args_list]
        self.assertEqual(closed, opened[:5])  # each before the next is opened
        self.assertEqual((file, len(opened)), (opened[5], 6))
        self.assertEqual(sleep.mock_calls, [mock.call(0.2)] * 5)
        os.close(file)

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


class StartedTest(parameterized.TestCase):
    """When a process was started, by field 22 of /proc/PID/stat: a name may have brackets."""

    @sweeps.rows(("R", "22"), ("S", "22"), ("Z", None), ("X", None))
    def test_one_that_has_ended_was_never_started(self, state, expected):
        text = f"7 (a) R (b) {state} " + " ".join(map(str, range(4, 53)))
        with mock.patch.object(Path, "read_text", return_value=text):
            self.assertEqual(locks._started(7), expected)

    def test_one_that_is_not_known(self):
        for error in (FileNotFoundError, PermissionError):
            with mock.patch.object(Path, "read_text", side_effect=error):
                self.assertIsNone(locks._started(7))

    @sweeps.rows(
        (None, True),
        (ProcessLookupError, False),
        (PermissionError, True),  # another user's
    )
    def test_whether_it_runs(self, error, runs):
        me = {"pid": os.getpid() + 1, "started": "22"}
        with (
            mock.patch.object(os, "kill", side_effect=error) as asked,
            mock.patch.object(locks, "_started", return_value="22"),
        ):
            self.assertEqual(locks._runs(me), runs)
            self.assertFalse(locks._runs(me | {"started": "21"}))
            asked.assert_called_with(me["pid"], 0)
            self.assertFalse(locks._runs(me | {"pid": os.getpid()}))
            self.assertFalse(locks._runs(None))


class LedgerTest(absltest.TestCase):
    def test_of_another_process_is_refused(self):
        path = Path(self.create_tempdir()) / "a.jsonl"
        before = evaluated("one")
        with contextlib.closing(ledger.Ledger(path, before, IDS)) as book:
            book.add(0, VERDICT, None)
        with (
            mock.patch.object(locks, "_GRACE", 0.3),
            holder(path.with_suffix(".lock")) as process,
            self.assertRaisesRegex(ValueError, f"ledger {path} is in use by process {process.pid}"),
        ):
            ledger.Ledger(path, before, IDS)
        with contextlib.closing(ledger.Ledger(path, before, IDS)) as book:
            self.assertEqual(book.known()[0], 1)

    def test_what_it_refuses_can_be_opened_again(self):
        path = Path(self.create_tempdir()) / "a.jsonl"
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


class WorkdirTest(absltest.TestCase):
    def test_of_another_run_is_refused(self):
        workdir = Path(self.create_tempdir()) / "run"
        workdir.mkdir()
        with (
            mock.patch.object(locks, "_GRACE", 0.3),
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
        folder = Path(self.create_tempdir())
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


class AppendTest(absltest.TestCase):
    def test_of_several_processes_loses_nothing(self):
        path = Path(self.create_tempdir()) / "results.jsonl"
        command = [sys.executable, "-c", APPEND, str(path)]
        writers = [subprocess.Popen([*command, name], cwd=ROOT) for name in "ab"]
        self.assertEqual([writer.wait() for writer in writers], [0, 0])
        rows = jsonl.read(path)
        for name in "ab":
            self.assertEqual([r["number"] for r in rows if r["of"] == name], list(range(100)))
