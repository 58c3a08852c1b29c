"""Downloads that break off: what is there is kept, and what is missing is asked for once."""

import email.message
import hashlib
import io
import logging
import socket
import urllib.error
from pathlib import Path
from unittest import mock

from absl.testing import absltest, parameterized

from jaxrobust.runtime.files import caches, download
from tests.support import sweeps

CONTENT = bytes(range(256)) * 100


class HubTest(absltest.TestCase):
    def test_its_client_is_quiet_inside_alone(self):
        client = logging.getLogger("huggingface_hub.utils._http")
        before = client.level
        self.addCleanup(client.setLevel, before)
        client.setLevel(logging.INFO)
        with self.assertRaises(ZeroDivisionError), download.quiet_hub():
            self.assertFalse(client.isEnabledFor(logging.WARNING))
            self.assertTrue(client.isEnabledFor(logging.ERROR))
            raise ZeroDivisionError
        self.assertEqual(client.level, logging.INFO)


class Answer(io.BytesIO):
    """What a server sends."""

    def __init__(self, content, status=200, **headers):
        super().__init__(content)
        self.status, self.url = status, "https://a.b/c"
        self.headers = email.message.Message()
        for name, value in headers.items():
            self.headers[name.replace("_", "-")] = str(value)


def refusal(code, reason="no"):
    return urllib.error.HTTPError("https://a.b/c", code, reason, email.message.Message(), None)


class AnswersTest(parameterized.TestCase):
    """Answers one after the other, and what is asked, without a network."""

    def setUp(self):
        super().setUp()
        self.folder = Path(self.create_tempdir())
        self.enter_context(mock.patch.object(caches, "folder", lambda name: self.folder / name))
        self.enter_context(mock.patch.object(download, "_pause", lambda failures: None))
        self.said: list[str] = []

    def fetch(self, *answers, url="https://a.b/c/net%20x.pt?y=1", **how):
        self.asked, left = [], iter(answers)

        def answer(url, headers):
            self.asked.append(headers)
            if isinstance(one := next(left), Exception):
                raise one
            return one

        with mock.patch.object(download, "_answer", answer):
            path = download.fetch(url, "weights", tell=self.said.append, **how)
        self.assertEmpty([*left])
        return path

    def test_where_it_is_kept(self):
        path = self.fetch(Answer(CONTENT, Content_Length=len(CONTENT)))
        digest = hashlib.sha256(b"https://a.b/c/net%20x.pt?y=1").hexdigest()[:12]
        self.assertEqual(path, self.folder / "weights" / digest / "net x.pt")
        self.assertNotIn("Range", self.asked[0])
        again = self.fetch()
        self.assertEqual((again, self.asked), (path, []))
        self.assertIn("already downloaded", self.said[-1])
        other = self.fetch(Answer(b"x"), name="mine")
        self.assertEqual((other.name, other.read_bytes()), ("mine", b"x"))
        sha256 = hashlib.sha256(CONTENT + b"2").hexdigest()
        new = self.fetch(Answer(CONTENT + b"2"), sha256=sha256[:8].upper())
        self.assertEqual(new.read_bytes(), CONTENT + b"2")
        self.assertIn("does not have the requested sha256", self.said[-2])
        for url in ("https://a.b/", "nothing"):
            with self.assertRaisesRegex(ValueError, "names no file; give the address of the file"):
                self.fetch(url=url)

    def test_a_part_is_continued_only_if_it_is_the_same_file(self):
        half = Answer(CONTENT[:9], Content_Length=len(CONTENT), ETag="v1")
        rest = Answer(
            CONTENT[9:], 206, Content_Length=len(CONTENT) - 9, Content_Range="bytes 9-99/100"
        )
        path = self.fetch(half, rest, name="a")
        self.assertEqual(path.read_bytes(), CONTENT)
        wanted = {"Range": "bytes=9-", "If-Range": "v1"}
        self.assertEqual({k: self.asked[1][k] for k in wanted}, wanted)
        for name, tag in (("b", {"ETag": "W/v1"}), ("c", {})):  # nothing proves it
            half = Answer(CONTENT[:9], Content_Length=len(CONTENT), **tag)
            whole = Answer(CONTENT, Content_Length=len(CONTENT))
            self.assertEqual(self.fetch(half, whole, name=name).read_bytes(), CONTENT)
            self.assertNotIn("Range", self.asked[1])
        half = Answer(CONTENT[:9], Content_Length=len(CONTENT), Last_Modified="today")
        whole = Answer(CONTENT[::-1], Content_Length=len(CONTENT))  # it changed meanwhile
        self.assertEqual(self.fetch(half, whole, name="d").read_bytes(), CONTENT[::-1])
        self.assertEqual(self.asked[1]["If-Range"], "today")
        self.assertIn("the file changed, or its server cannot resume", " ".join(self.said))

    def test_more_is_here_than_there(self):
        half = Answer(CONTENT[:9], Content_Length=len(CONTENT), ETag="v1")
        whole = Answer(CONTENT, Content_Length=len(CONTENT))
        self.assertEqual(self.fetch(half, refusal(416), whole).read_bytes(), CONTENT)
        self.assertNotIn("Range", self.asked[2])

    @sweeps.rows(
        (401, "it requires a login"), (403, "access is forbidden"), (404, "there is no such file"),
        (410, "the file is gone"), (400, "check the address"),
    )  # fmt: skip
    def test_answers_that_no_other_try_changes(self, code, message):
        with self.assertRaisesRegex(ValueError, f"the server answers {code} no: {message}"):
            self.fetch(refusal(code))

    @sweeps.rows(500, 503, 429, 408)
    def test_answers_that_another_try_may_change(self, code):
        found = self.fetch(refusal(code), Answer(b"x"), name=str(code))
        self.assertEqual(found.read_bytes(), b"x")

    def test_how_often_it_is_tried(self):
        """Five times in a row without a new byte, of a name that nobody knows twice."""
        with self.assertRaisesRegex(download.Unreachable, "no, 5 times in a row; if this .*curl"):
            self.fetch(*[refusal(503)] * 5)
        unknown = urllib.error.URLError(socket.gaierror(-2, "unknown"))
        with self.assertRaisesRegex(download.Unreachable, "unknown, 2 times in a row"):
            self.fetch(*[unknown] * 2)
        half = Answer(CONTENT[:9], Content_Length=len(CONTENT), ETag="v1")
        answers = [*[ConnectionError("gone")] * 4, half, *[TimeoutError()] * 5]
        with self.assertRaisesRegex(
            download.Unreachable, r"TimeoutError, 5 times in a row \(9 bytes are saved; the same co"
        ):
            self.fetch(*answers)
        with self.assertRaises(PermissionError):  # which no other try makes better
            self.fetch(PermissionError("disk"))

    def test_hashes(self):
        file = self.folder / "x"
        file.write_bytes(b"x")
        digest = hashlib.sha256(b"x").hexdigest()
        for wanted in (None, "", digest, digest.upper(), digest[:8]):
            self.assertEqual(download.check_sha256(file, wanted), digest)
        for wanted in (digest[:7], "0" * 64):
            with self.assertRaisesRegex(ValueError, f"has sha256 {digest}, expected {wanted}"):
                download.check_sha256(file, wanted)
        with self.assertRaisesRegex(ValueError, "it was removed"):
            download.check_sha256(file, "0" * 64, remove=True)
        self.assertFalse(file.exists())

    def test_pages(self):
        page = """<html><title> Google Drive -
            virus </title>
            <form id="other" action="/no"><input type="hidden" name="n" value="0"></form>
            <form id="download-form" action="/get?id=7&at=1">
            <input type="hidden" name="at" value="x y"><input type="text" name="t" value="2">
            <input type="hidden" name="confirm" value="t"></form>
            <input type="hidden" name="late" value="3"></html>"""
        title, address = download.read_page(page, "https://a.b/c?q=1")
        self.assertEqual(title, "Google Drive - virus")
        self.assertEqual(address, "https://a.b/get?id=7&at=x+y&confirm=t")
        self.assertEqual(download.read_page("<title>In</title>", "https://a.b"), ("In", ""))

    def test_waits_grow(self):
        waits: list[float] = []
        with mock.patch.object(download.time, "sleep", waits.append):
            for failures in (1, 2, 4, 5, 9):
                PAUSE(failures)
        self.assertEqual(waits, [2, 4, 16, 30, 30])


PAUSE = download._pause
