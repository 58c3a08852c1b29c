"""The server of a page: what it answers, to whom, and what it refuses."""

import contextlib
import http.client
import io
import json
import threading
from pathlib import Path
from unittest import mock

import numpy as np
from absl.testing import absltest

from jaxrobust.commands import report as command
from jaxrobust.report import curves, watching
from jaxrobust.runtime.files import jsonl
from tests.support import reports


@contextlib.contextmanager
def serving(folder: Path):
    """The port of a server of this folder."""
    with watching.server([folder], host="127.0.0.1", port=0, every=5) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


def line(step: int) -> str:
    return json.dumps({"phase": "train", "step": step, "loss": 1 / step}) + "\n"


def ask(port: int, path: str = "/", **headers: str) -> tuple[int, str]:
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=20)) as asked:
        asked.request("GET", path, headers=headers)
        answer = asked.getresponse()
        body = answer.read()
        if answer.status == 200:
            kind = "text/html; charset=utf-8"
            assert (answer.headers["Cache-Control"], answer.headers["Content-Type"]) == (
                "no-store",
                kind,
            )
            assert int(answer.headers["Content-Length"]) == len(body)  # é is two bytes
        return answer.status, body.decode()


class FollowedTest(absltest.TestCase):
    def setUp(self):
        super().setUp()
        self.path = Path(self.create_tempdir().full_path) / "metrics.jsonl"
        self.path.write_text("".join(map(line, range(1, 6))))
        self.followed = curves.Followed()

    def check(self, new: int) -> curves.Metrics:
        """What is followed is what is read at once, from no more than so many lines."""
        with mock.patch.object(curves, "_row", side_effect=curves._row) as parsed:
            seen = self.followed.read(self.path)
        self.assertEqual(parsed.call_count, new)
        once = curves.read(self.path)
        self.assertEqual(seen.notes, once.notes)
        self.assertEqual(seen.events, once.events)
        self.assertEqual(seen.curves.keys(), once.curves.keys())
        both = [m.curves["train"]["loss"] for m in (seen, once)]
        for one, other in zip(*both, strict=True):
            np.testing.assert_array_equal(one, other)
        return seen

    def add(self, text: str) -> None:
        with self.path.open("a") as lines:
            lines.write(text)

    def test_only_what_was_added_is_read(self):
        self.check(new=5)
        self.check(new=0)
        self.add(line(6) + line(7))
        self.check(new=2)

    def test_a_line_that_is_being_written_counts_once_it_is_whole(self):
        self.check(new=5)
        self.add(line(6)[:20])
        for _ in range(2):
            seen = self.check(new=1)
            self.assertRegex(
                seen.notes[0], "The last line of .* was cut off; the 5 lines before it"
            )
        self.add(line(6)[20:-1])  # whole but for its end
        self.assertLen(self.check(new=1).curves["train"]["loss"].steps, 6)
        self.add("\n" + line(7))
        self.assertEmpty(self.check(new=1).notes)

    def test_a_run_that_goes_on_from_a_checkpoint_cuts_lines_off(self):
        self.check(new=5)
        jsonl.replace(self.path, "".join(map(line, (1, 2))))
        self.check(new=2)
        with self.path.open("w") as lines:  # the same file, as long as before
            lines.writelines(map(line, (1, 3)))
        self.check(new=2)
        self.path.unlink()
        self.assertEmpty(self.followed.read(self.path).curves)
        self.path.write_text(line(1))
        self.check(new=1)

    def test_damaged_lines_keep_their_numbers(self):
        self.add("nonsense\n")
        self.check(new=6)
        self.add(line(6) + "[]\n")
        self.assertRegex(self.check(new=2).notes[0], "2 damaged lines of .*: 6, 8")


class WatchingTest(absltest.TestCase):
    def setUp(self):
        super().setUp()
        self.folder = Path(self.create_tempdir().full_path) / "é <b> & run"

    def test_the_page_is_made_anew_while_the_run_goes_on(self):
        self.folder.mkdir()
        with serving(self.folder) as port:
            status, text = ask(port)
            self.assertEqual(status, 200)
            self.assertIn("é &lt;b&gt; &amp; run holds neither a run", text)
            self.assertIn('http-equiv="refresh" content="5"', text)
            self.folder.rmdir()
            reports.run(self.folder, lines=8)
            before = ask(port)[1]
            row = {"phase": "train", "step": 9, "loss": 0.5}
            with (self.folder / "metrics.jsonl").open("a") as lines:
                lines.write(json.dumps(row) + "\n")
            after = ask(port)[1]
        self.assertIn('data-refresh="5"', before)
        steps = [reports.read(t)[0]["t0-1-loss"]["series"][0]["x"][-1] for t in (before, after)]
        self.assertEqual(steps, [8, 9])

    def test_only_the_page_and_only_under_a_local_name(self):
        reports.run(self.folder, lines=8)
        with serving(self.folder) as port:
            self.assertEqual(ask(port, "/../etc/passwd")[0], 404)
            self.assertEqual(ask(port, "/?again=1")[0], 200)
            others = ("evil.example:80", "evil.example", "[evil", "10.0.0.1", "localhost.evil.org")
            for name in others:
                self.assertEqual(ask(port, Host=name)[0], 403, name)
            for name in ("localhost", f"localhost:{port}", "", "127.0.0.1", f"[::1]:{port}"):
                self.assertEqual(ask(port, Host=name)[0], 200, name)

    def test_a_taken_port_and_wrong_values_are_sentences(self):
        reports.run(self.folder, lines=8)
        with serving(self.folder) as port:
            for flags, code, wanted in (
                (["--port", port], 3, f"cannot listen on 127.0.0.1:{port}"),
                (
                    ["--port", 65536],
                    2,
                    "--port=65536 is not a valid port; give one from 1 to 65535",
                ),
                (["--port=-1"], 2, "--port=-1 is not a valid port"),
                (["--every", 0.99], 2, "--every=0.99 must be at least 1"),
                (["--json"], 2, "--watch serves the page and writes no file; leave out --out"),
            ):
                said = io.StringIO()
                with contextlib.redirect_stderr(said), self.assertRaises(SystemExit) as ended:
                    command.main([str(w) for w in (self.folder, "--watch", *flags)])
                self.assertEqual(ended.exception.code, code)
                self.assertIn(wanted, said.getvalue())

    def test_a_place_that_is_not_there(self):
        said = "nowhere does not exist; name a run that has begun, or a folder of runs"
        with self.assertRaisesRegex(ValueError, said):
            watching.serve([self.folder.parent, Path("nowhere")])

    def test_which_addresses_are_of_this_machine_alone(self):
        found = {"127.0.0.1": "127.0.0.1", "box": "127.9.0.1", "lan": "10.0.0.4", "all": "0.0.0.0"}
        with mock.patch.object(watching.socket, "gethostbyname", side_effect=found.__getitem__):
            local = [name for name in ("localhost", *found) if watching._is_loopback(name)]
        self.assertEqual(local, ["localhost", "127.0.0.1", "box"])
        for error in (OSError("unknown"), ValueError("too long")):
            with mock.patch.object(watching.socket, "gethostbyname", side_effect=error):
                self.assertFalse(watching._is_loopback("nobody"))

    def test_another_address_gets_a_warning(self):
        reports.run(self.folder, lines=8)
        for host, warned in (("0.0.0.0", True), ("127.0.0.1", False)):
            out, said = io.StringIO(), io.StringIO()
            stopped = mock.patch.object(
                watching.ThreadingHTTPServer, "serve_forever", side_effect=KeyboardInterrupt
            )
            with stopped, contextlib.redirect_stdout(out), contextlib.redirect_stderr(said):
                watching.serve([self.folder], host=host, port=0)
            self.assertEqual("without a password" in said.getvalue(), warned)
            self.assertIn(f"http://{host}:", out.getvalue())
