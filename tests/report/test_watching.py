"""The server of a page: what it answers, to whom, and what it refuses."""

import contextlib
import http.client
import io
import json
import threading
from pathlib import Path
from unittest import mock

from absl.testing import absltest

from jaxrobust.report import __main__ as command
from jaxrobust.report import watching
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


def ask(port: int, path: str = "/", **headers: str) -> tuple[int, str]:
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=20)) as asked:
        asked.request("GET", path, headers=headers)
        answer = asked.getresponse()
        return answer.status, answer.read().decode()


class WatchingTest(absltest.TestCase):
    def setUp(self):
        super().setUp()
        self.folder = Path(self.create_tempdir().full_path) / "run"

    def test_the_page_is_made_anew_while_the_run_goes_on(self):
        self.folder.mkdir()
        with serving(self.folder) as port:
            status, text = ask(port)
            self.assertEqual(status, 200)
            self.assertIn("holds neither a run", text)
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
            self.assertEqual(ask(port, Host="evil.example:80")[0], 403)
            self.assertEqual(ask(port, Host=f"localhost:{port}")[0], 200)

    def test_a_taken_port_and_wrong_values_are_sentences(self):
        reports.run(self.folder, lines=8)
        with serving(self.folder) as port:
            for flags, code, wanted in (
                (["--port", port], 3, f"cannot listen on 127.0.0.1:{port}"),
                (["--port", 70_000], 2, "--port=70000 is no port"),
                (["--every", 0], 2, "--every=0 is too often"),
            ):
                said = io.StringIO()
                with contextlib.redirect_stderr(said), self.assertRaises(SystemExit) as ended:
                    command.main([str(w) for w in (self.folder, "--watch", *flags)])
                self.assertEqual(ended.exception.code, code)
                self.assertIn(wanted, said.getvalue())

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


if __name__ == "__main__":
    absltest.main()
